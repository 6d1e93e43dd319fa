# SPDX-License-Identifier: Apache-2.0
"""The memory target, control side: a RAM disk in a named tmpfs file, which outlives any crash of ours."""

from __future__ import annotations

import mmap
import os

from ublkd import native
from ublkd.errors import UblkdError
from ublkd.targets.base import MAX_RANGE_BYTES, ControlTarget, Limits
from ublkd.targets.sizes import block_sizes, whole_blocks
from ublkd.units import format_size

SHM_DIR = "/dev/shm"


def data_path(dev_id: int | str) -> str:
    """The file that holds the contents of a memory device."""
    return f"{SHM_DIR}/ublkd-{dev_id}.data"


class MemoryTarget(ControlTarget):
    """A RAM disk in one shared mapping."""

    name = "memory"
    transports = ("user-copy", "copy")
    _fd = -1
    _path = ""
    _map: mmap.mmap | None = None

    def open(self, dev_id: int | None = None) -> Limits:
        spec = self.spec
        lbs, pbs = block_sizes(spec, 512, 4096)
        self._size = whole_blocks("--size", spec.size or 0, lbs)
        nbytes = native.memory_file_bytes(self._size)
        # The number isn't known yet; a name with our pid tells apart what a crash left behind.
        self._path = data_path(f"new-{os.getpid()}" if dev_id is None else dev_id)
        try:
            if dev_id is None:
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                os.ftruncate(self._fd, nbytes)
                # The marks have their memory from the start: on a full tmpfs touching one would be a SIGBUS.
                os.posix_fallocate(self._fd, self._size, nbytes - self._size)
            else:
                self._fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
                if os.fstat(self._fd).st_size != nbytes:
                    raise UblkdError(f"{self._path} has not the size of the device it should hold")
            self._map = mmap.mmap(self._fd, nbytes)
        except OSError as e:
            if dev_id is None:
                self.close(discard=True)
            raise UblkdError(
                f"cannot set up {format_size(self._size)} of memory in {self._path}: {e.strerror}",
                hint=f"is {SHM_DIR} a tmpfs with that much address space?",
            ) from None
        return Limits(
            size=self._size,
            block_size=lbs,
            physical_block_size=pbs,
            io_min=pbs,
            read_only=spec.read_only,
            discard_granularity=0 if spec.read_only else 4096,
            max_discard=0 if spec.read_only else MAX_RANGE_BYTES,
            max_write_zeroes=0 if spec.read_only else MAX_RANGE_BYTES,
        )

    def added(self, dev_id: int) -> None:
        os.rename(self._path, data_path(dev_id))
        self._path = data_path(dev_id)

    def engine_target(self, qid: int) -> native.EngineTarget:
        return native.memory_target(self._map, self._fd, self._size)

    def files(self) -> list[str]:
        return [self._path]

    def close(self, *, discard: bool) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if discard and self._path:
            try:
                os.unlink(self._path)
            except FileNotFoundError:
                pass
