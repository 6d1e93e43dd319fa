# SPDX-License-Identifier: Apache-2.0
"""The supervisor's side of the statistics segment: it alone makes and removes it.

Made before the fork: workers write through the mapping they inherit.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from multiprocessing import shared_memory
from typing import Any

from ublkd.errors import UblkdError
from ublkd.shm import layout


def _untracked(name: str, size: int = 0) -> shared_memory.SharedMemory:
    """A segment, new if it is given a size, that Python's resource tracker knows nothing of.

    The tracker would be one more process per device, and would remove the
    segment under the workers when a supervisor dies; `track` came with 3.13
    (https://github.com/python/cpython/issues/82300).
    """
    if sys.version_info >= (3, 13):
        return shared_memory.SharedMemory(name, create=bool(size), size=size, track=False)
    tracker: Any = shared_memory.resource_tracker  # type: ignore[attr-defined]
    register = tracker.register
    tracker.register = lambda *_args: None
    try:
        return shared_memory.SharedMemory(name, create=bool(size), size=size)
    finally:
        tracker.register = register


class Segment:
    """The segment of one device; .buf is its writable mapping."""

    def __init__(
        self, dev_id: int, queues: int, depth: int, dev_bytes: int, shares: int = 1, go_on: bool = False
    ) -> None:
        """shares: workers per queue. go_on: keep the counters of the device's last server, if of this layout."""
        self.buf: Any
        name = layout.name_of(dev_id)
        self.path = f"/dev/shm/{name}"
        self._slots = queues * shares
        if go_on and self._attach(name, shares):
            struct.pack_into("<Q", self.buf, layout.SUPERVISOR_PID_OFFSET, os.getpid())
            self.set_dev_bytes(dev_bytes)
            return
        # What a killed supervisor of this number left behind is of no use to anybody now.
        self.unlink()
        self._shm = _untracked(name, layout.segment_bytes(self._slots))
        self._allocate()
        os.chmod(self.path, 0o644)
        mapping: Any = self._shm.buf
        self.buf = mapping
        struct.pack_into(
            layout.HEADER_FORMAT,
            self.buf,
            0,
            layout.MAGIC,
            layout.VERSION,
            layout.HEADER_BYTES,
            layout.SLOT_BYTES,
            self._slots,
            dev_id,
            depth,
            os.getpid(),
            time.time_ns(),
            dev_bytes,
            shares,
            0,
        )

    def _allocate(self) -> None:
        """All its pages now: on a full tmpfs, the first count in a page that is not there would be a SIGBUS."""
        fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, layout.segment_bytes(self._slots))
        except OSError as e:
            self.unlink()
            raise UblkdError(
                f"cannot set up the statistics in {self.path}: {e.strerror}", hint="make room in /dev/shm"
            ) from None
        finally:
            os.close(fd)

    def _attach(self, name: str, shares: int) -> bool:
        try:
            self._shm = _untracked(name)
        except (OSError, ValueError):  # none there, or an empty one
            return False
        mapping: Any = self._shm.buf
        self.buf = mapping
        size = struct.calcsize(layout.HEADER_FORMAT)
        if len(self.buf) >= size:
            *head, _dev, _depth, _pid, _start, _bytes, had, _ = struct.unpack_from(layout.HEADER_FORMAT, self.buf)
            ours = [layout.MAGIC, layout.VERSION, layout.HEADER_BYTES, layout.SLOT_BYTES, self._slots]
            if head == ours and (had or 1) == shares and len(self.buf) >= layout.segment_bytes(self._slots):
                return True
        del self.buf, mapping
        self._shm.close()
        return False

    def set_dev_bytes(self, dev_bytes: int) -> None:
        """Tell the engines of a new device size, bytes."""
        struct.pack_into("<Q", self.buf, layout.DEV_BYTES_OFFSET, dev_bytes)

    def words(self, slot: int) -> dict[str, int]:
        """The words of a worker's slot that are not counters of operations, by layout.QUEUE_WORDS."""
        at = layout.HEADER_BYTES + slot * layout.SLOT_BYTES
        values = struct.unpack_from(f"<{len(layout.QUEUE_WORDS)}Q", self.buf, at)
        return dict(zip(layout.QUEUE_WORDS, values, strict=True))

    def errors(self, op: str) -> int:
        """Requests of one kind that failed, over all queues."""
        place = layout.QUEUE_HEAD_WORDS + layout.OPS.index(op) * layout.COUNTER_WORDS + 2
        first = layout.HEADER_BYTES + 8 * place
        return sum(
            struct.unpack_from("<Q", self.buf, first + slot * layout.SLOT_BYTES)[0] for slot in range(self._slots)
        )

    def unlink(self) -> None:
        """Remove the name; mappings live on."""
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass

    def dev_bytes(self) -> int:
        """The device size that the engines go by, bytes."""
        size: int = struct.unpack_from("<Q", self.buf, layout.DEV_BYTES_OFFSET)[0]
        return size
