# SPDX-License-Identifier: Apache-2.0
"""The loop target, control side: a regular file or a block device behind the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from typing import TYPE_CHECKING, TypeVar

from ublkd import native
from ublkd.errors import UblkdError, UsageError
from ublkd.targets.base import MAX_RANGE_BYTES, ControlTarget, Limits
from ublkd.targets.sizes import block_sizes, whole_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

_LOOK_AGAIN_S = 0.01
T = TypeVar("T")


class LoopTarget(ControlTarget):
    """Serves a backing file."""

    name = "loop"
    transports = ("zero-copy", "copy", "user-copy")
    _fd = -1
    _dio_align = 0
    _taken_over: int | None = None  # the device that had a server before
    _patient_until = 0.0

    def preflight(self) -> None:
        self._path = os.path.abspath(self.spec.file or "")
        self._stat()

    def open(self, dev_id: int | None = None) -> Limits:
        spec = self.spec
        self._path = os.path.abspath(spec.file or "")
        self._taken_over = dev_id
        self._patient_until = time.monotonic() + spec.start_timeout if dev_id is not None else 0
        st = self._stat()
        self._is_bdev = stat.S_ISBLK(st.st_mode)
        self._id = f"{os.major(st.st_rdev)}:{os.minor(st.st_rdev)}" if self._is_bdev else f"{st.st_dev}:{st.st_ino}"
        self._fd = self._open_file()
        try:
            self._lock()
            return self._limits(st)
        except BaseException:
            self.close(discard=False)
            raise

    def _stat(self) -> os.stat_result:
        try:
            st = os.stat(self._path)
        except FileNotFoundError:
            raise UsageError(
                f"the backing file {self._path} does not exist", hint=f"make one: truncate -s 1G {self._path}"
            ) from None
        except OSError as e:
            raise UsageError(f"the backing file {self._path} can't be reached: {e.strerror}") from None
        if stat.S_ISDIR(st.st_mode):
            raise UsageError(f"the backing file {self._path} is a directory", hint="name a file or a block device")
        if not stat.S_ISREG(st.st_mode) and not stat.S_ISBLK(st.st_mode):
            raise UsageError(f"the backing file {self._path} is neither a regular file nor a block device")
        return st

    def _open_file(self) -> int:
        flags = os.O_CLOEXEC | (os.O_RDONLY if self.spec.read_only else os.O_RDWR)
        # On a block device O_EXCL means: not while it is mounted or otherwise claimed.
        if self._is_bdev and not self.spec.read_only and not self.spec.force:
            flags |= os.O_EXCL
        try:
            return self._claimed(lambda: os.open(self._path, flags))
        except OSError as e:
            raise self._open_error(e) from None

    def _claimed(self, claim: Callable[[], T]) -> T:
        """claim(), repeated while a server that died still holds the file: its workers end a moment after it."""
        while True:
            try:
                return claim()
            except OSError as e:
                if e.errno not in (errno.EBUSY, errno.EWOULDBLOCK) or time.monotonic() >= self._patient_until:
                    raise
            time.sleep(_LOOK_AGAIN_S)

    def _open_error(self, e: OSError) -> UblkdError:
        if e.errno == errno.EBUSY:
            return UsageError(
                f"the backing device {self._path} is in use (mounted, or part of another device)",
                hint="--force serves it all the same",
            )
        if self.spec.read_only:
            return UsageError(f"the backing file {self._path} can't be read: {e.strerror}")
        if e.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return UsageError(
                f"the backing file {self._path} can't be written: {e.strerror}",
                hint="serve it with --read-only, or change its permissions",
            )
        return UsageError(f"the backing file {self._path} can't be opened: {e.strerror}")

    def _lock(self) -> None:
        """One writer alone, or any number of readers; workers hold the lock too, through the inherited file."""
        if self.spec.force:
            return
        how = (fcntl.LOCK_SH if self.spec.read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB
        try:
            self._claimed(lambda: fcntl.flock(self._fd, how))
        except BlockingIOError:
            raise self._locked() from None

    def _locked(self) -> UblkdError:
        from ublkd import inventory

        holder = next((record for record in inventory.records() if record.get("backing_id") == self._id), None)
        if holder and holder["id"] == self._taken_over:
            return UblkdError(
                f"the backing file {self._path} is still locked, by a worker of {holder['path']} or another program",
                hint="a worker ends as soon as the file answers it; `lslocks` names who has the lock",
            )
        where = f" as {holder['path']}" if holder else " or locked by another program"
        return UsageError(
            f"the backing file {self._path} is already being served{where}",
            hint="--force serves it all the same; two writers corrupt it",
        )

    def _limits(self, st: os.stat_result) -> Limits:
        spec = self.spec
        total = os.lseek(self._fd, 0, os.SEEK_END)
        # The device's blocks: as small as 512 unless the backing device's own are bigger.
        floor = self._queue_limit("logical_block_size", 512) if self._is_bdev else 512
        self._direct, floor = self._choose_direct(floor)
        physical = self._queue_limit("physical_block_size", 4096) if self._is_bdev else min(st.st_blksize, 4096)
        lbs, pbs = block_sizes(spec, floor, max(physical, floor))
        size = self._size(total, lbs)
        discard = 0 if spec.read_only else self._max_discard(total)
        granularity = self._queue_limit("discard_granularity", pbs) if self._is_bdev else max(st.st_blksize, lbs)
        return Limits(
            size=size,
            block_size=lbs,
            physical_block_size=pbs,
            io_min=pbs,
            io_opt=self._queue_limit("optimal_io_size", 0) if self._is_bdev else 0,
            read_only=spec.read_only,
            rotational=bool(self._queue_limit("rotational", 0)),
            volatile_cache=not spec.read_only,
            fua=not spec.read_only,
            discard_granularity=granularity if discard else 0,
            max_discard=discard,
            max_write_zeroes=0 if spec.read_only else MAX_RANGE_BYTES,
            # A request's own pages may go straight to the backing device: they must suit it.
            dma_align=self._queue_limit("dma_alignment", 0) + 1 if self._direct else 0,
        )

    def _size(self, total: int, lbs: int) -> int:
        spec = self.spec
        if total == 0:
            raise UsageError(f"the backing file {self._path} is empty", hint=f"truncate -s 1G {self._path}")
        if spec.offset >= total:
            raise UsageError(f"the offset {spec.offset} is beyond the end of {self._path} ({total} bytes)")
        left = total - spec.offset
        if spec.size_limit:
            if spec.size_limit > left:
                raise UsageError(
                    f"the size limit {spec.size_limit} is beyond the end of {self._path}: "
                    f"{left} bytes from the offset on"
                )
            return whole_blocks("the size limit", spec.size_limit, lbs)
        if left % lbs:
            raise UsageError(
                f"{self._path} has {left} bytes to serve, which is no multiple of the block size {lbs}",
                hint=f"--size-limit {left - left % lbs} serves the whole blocks, --block-size makes them smaller",
            )
        return left

    def _choose_direct(self, floor: int) -> tuple[bool, int]:
        """(direct I/O or not, the smallest block that then works), by asking the file itself."""
        spec = self.spec
        if spec.direct == "off":
            return False, floor
        align = native.dio_align(self._path, not spec.read_only)
        reason = ""
        if not align:
            reason = "it doesn't take direct I/O"
        elif spec.offset % align:
            reason = f"its direct I/O needs an offset in multiples of {align}"
        elif spec.block_size and spec.block_size < align:
            reason = f"its direct I/O needs blocks of {align}"
        if not reason:
            fd = os.open(self._path, (os.O_RDONLY if spec.read_only else os.O_RDWR) | os.O_DIRECT | os.O_CLOEXEC)
            # The lock and the claim belong to the first descriptor: it stays open beside this one.
            self._claim_fd, self._fd = self._fd, fd
            self._dio_align = align
            return True, max(floor, align)
        if spec.direct == "on":
            raise UsageError(f"{self._path} can't be served with --direct: {reason}", hint="use --buffered")
        return False, floor

    def _queue_limit(self, name: str, default: int) -> int:
        """A queue attribute of the backing device, or of the disk that the backing file lives on."""
        st = os.fstat(self._fd)
        dev = st.st_rdev if self._is_bdev else st.st_dev
        base = f"/sys/dev/block/{os.major(dev)}:{os.minor(dev)}"
        for path in (f"{base}/queue/{name}", f"{base}/../queue/{name}"):  # the second: a partition's disk
            try:
                with open(path) as f:
                    return int(f.read())
            except (OSError, ValueError):
                continue
        return default

    def _max_discard(self, total: int) -> int:
        if self._is_bdev:
            return min(self._queue_limit("discard_max_bytes", 0), MAX_RANGE_BYTES)
        return MAX_RANGE_BYTES if native.can_punch(self._fd, total) else 0

    _claim_fd = -1

    def engine_target(self, qid: int) -> native.EngineTarget:
        flags = (native.LOOP_BLOCK_DEVICE if self._is_bdev else 0) | (
            native.LOOP_READ_ONLY if self.spec.read_only else 0
        )
        return native.loop_target(self._own_file(), flags, self.spec.offset)

    def _own_file(self) -> int:
        """The file, opened by this worker: what could not be written back is told once to each that opened it, so
        with one for all, the flush of one queue would take the error that another's has to report."""
        mode = os.O_RDONLY if self.spec.read_only else os.O_RDWR
        direct = os.O_DIRECT if self._direct else 0
        try:
            return os.open(f"/proc/self/fd/{self._fd}", mode | direct | os.O_CLOEXEC)
        except OSError:  # no /proc in a container
            return self._fd

    def backing(self) -> str:
        return self._path

    def backing_id(self) -> str | None:
        return self._id

    def details(self) -> dict[str, object]:
        return {"direct": self._direct, "direct_alignment": self._dio_align, "offset": self.spec.offset}

    def resized(self, size: int | None) -> int:
        self._path = os.path.abspath(self.spec.file or "")
        lbs = self.spec.block_size or 512
        fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            left = os.lseek(fd, 0, os.SEEK_END) - self.spec.offset
        finally:
            os.close(fd)
        if size is None:
            return left - left % lbs
        if size > left:
            raise UsageError(
                f"{self._path} has only {left} bytes from the offset on",
                hint=f"grow it first: truncate -s {size + self.spec.offset} {self._path}",
            )
        return whole_blocks("the new size", size, lbs)

    def close(self, *, discard: bool) -> None:
        for fd in (self._fd, self._claim_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._claim_fd = -1
