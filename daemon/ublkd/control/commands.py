# SPDX-License-Identifier: Apache-2.0
"""The control commands, one method each.

No call waits for ever. A command that does not answer in time is cancelled; if
the kernel does not let it go (STOP_DEV sleeps uninterruptibly), its ring is
abandoned. What that means for the process is said in engine/ctrl.c.
"""

from __future__ import annotations

import errno
import os
import time
from types import TracebackType
from typing import NamedTuple

from ublkd import native
from ublkd.control import advice, uapi
from ublkd.control.advice import driver_error
from ublkd.control.device import char_path_of
from ublkd.control.features import FALLBACK, Features
from ublkd.control.operation import CANCEL_GRACE, Operation
from ublkd.control.params import Params
from ublkd.control.uapi import Command
from ublkd.errors import DriverError, UsageError

__all__ = ["AddRequest", "Control", "DeviceInfo", "Operation"]

DEFAULT_TIMEOUT = 10.0  # seconds

# Kept by the driver in ublksrv_flags, for us alone: this device is ublkd's.
SERVER_FLAGS = int.from_bytes(b"ublkd", "big")

_AFFINITY_BYTES = 1024  # 8192 CPUs, as many as any distribution's kernel has

# Answers of a driver that may not have understood the opcode.
_RECOVERY_PAUSE_S = 0.005  # between looks at whether a dead server's last file is closed
_NOT_UNDERSTOOD = {-errno.EINVAL, -errno.ENODEV, -errno.EOPNOTSUPP, -errno.ENOTTY, -errno.ENOSYS}


class AddRequest(NamedTuple):
    """What ADD_DEV is asked for. `dev_id` -1 picks a free number; `flags` are uapi.F_*."""

    dev_id: int = -1
    queues: int = 1
    depth: int = 128
    max_io_bytes: int = 512 << 10
    flags: int = 0
    server_flags: int = SERVER_FLAGS

    def check(self) -> None:
        """UsageError for what no driver takes."""
        if not 1 <= self.queues <= uapi.MAX_QUEUES:
            raise UsageError(f"{self.queues} queues: must be from 1 to {uapi.MAX_QUEUES}")
        if not 1 <= self.depth <= uapi.MAX_DEPTH:
            raise UsageError(f"depth {self.depth}: must be from 1 to {uapi.MAX_DEPTH}")
        page = os.sysconf("SC_PAGESIZE")
        if not page <= self.max_io_bytes <= uapi.MAX_IO_BYTES:
            raise UsageError(
                f"largest request {self.max_io_bytes}: must be from {page} to {uapi.MAX_IO_BYTES} bytes"
            )
        recovery = uapi.F_USER_RECOVERY | uapi.F_USER_RECOVERY_REISSUE | uapi.F_USER_RECOVERY_FAIL_IO
        if self.flags & recovery not in (
            0,
            uapi.F_USER_RECOVERY,
            uapi.F_USER_RECOVERY | uapi.F_USER_RECOVERY_REISSUE,
            uapi.F_USER_RECOVERY | uapi.F_USER_RECOVERY_FAIL_IO,
        ):
            raise UsageError(
                "recovery by re-issue and by fail-io exclude each other; both need USER_RECOVERY"
            )
        for flag, needs in (
            (uapi.F_QUIESCE, uapi.F_USER_RECOVERY),
            (uapi.F_SHARDS, uapi.F_USER_RECOVERY),
            (uapi.F_INTEGRITY, uapi.F_USER_COPY),
            (uapi.F_ZONED, uapi.F_USER_COPY | uapi.F_SUPPORT_ZERO_COPY),
        ):
            if self.flags & flag and not self.flags & needs:
                wanted = " or ".join(uapi.flag_names(needs))
                raise UsageError(f"flag {uapi.flag_names(flag)[0]} needs {wanted}")


class QueueState(NamedTuple):
    """A queue of a device with shards: its server's pid or -1, how many it has had, what that one has in hand."""

    state: int
    pid: int
    generation: int
    fetched: int
    inflight: int

    @property
    def is_orphaned(self) -> bool:
        """Nobody serves it, and whoever fetches its tags does so from then on."""
        return self.state == uapi.QUEUE_ORPHANED


class DeviceInfo(NamedTuple):
    """A device as the driver knows it. `dropped`: flags that ADD_DEV was asked for and did not grant."""

    dev_id: int
    queues: int
    depth: int
    state: int
    max_io_bytes: int
    pid: int
    flags: int
    server_flags: int
    owner_uid: int
    owner_gid: int
    dropped: int = 0

    @property
    def state_name(self) -> str:
        """live, quiesced, fail-io, dead or unknown."""
        return uapi.STATE_NAMES.get(self.state, "unknown")

    def pack(self) -> bytearray:
        """struct ublksrv_ctrl_dev_info."""
        return bytearray(
            uapi.DEV_INFO.pack(
                self.queues,
                self.depth,
                self.state,
                0,
                self.max_io_bytes,
                self.dev_id & uapi.DEV_ID_AUTO,
                self.pid,
                0,
                self.flags,
                self.server_flags,
                self.owner_uid,
                self.owner_gid,
                0,
                0,
            )
        )

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> DeviceInfo:
        """From struct ublksrv_ctrl_dev_info."""
        queues, depth, state, _, max_io, dev_id, pid, _, flags, server_flags, uid, gid, _, _ = (
            uapi.DEV_INFO.unpack_from(data, 0)
        )
        return cls(dev_id, queues, depth, state, max_io, pid, flags, server_flags, uid, gid)


class Control:
    """An open /dev/ublk-control. For one process and one thread; a child opens its own.

    Methods raise DriverError; `timeout` is in seconds.
    """

    def __init__(self, path: str = uapi.CONTROL_PATH, timeout: float = DEFAULT_TIMEOUT) -> None:
        self.timeout = timeout
        self._fd = _open_control(path)
        self._ring: native.ControlRing | None = None  # at rest, for the next command
        self._last: Operation | None = None
        self._unprivileged: dict[int, bool] = {}
        # Drivers before 6.4 take bare numbers only; None until one answer has told.
        self._encoded: bool | None = None
        self._features = FALLBACK
        try:
            self._probe()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Control:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it, cancelling what is under way. May be called twice, and in a child of fork."""
        if self._last is not None:
            self._last.abandon()
            self._last = None
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def fileno(self) -> int:
        """Readable when the operation begun last has its result; -1 if none is under way."""
        return self._last.fileno() if self._last is not None else -1

    # Devices

    def add_dev(self, request: AddRequest) -> DeviceInfo:
        """Make a device; what the driver granted, which may be less than what was asked for."""
        request.check()
        wish = DeviceInfo(
            request.dev_id,
            request.queues,
            request.depth,
            0,
            request.max_io_bytes,
            -1,
            request.flags,
            request.server_flags,
            0,
            0,
        )
        buf = wish.pack()
        self._run(Command.ADD_DEV, request.dev_id, buf)
        info = DeviceInfo.unpack(buf)
        self._unprivileged[info.dev_id] = bool(info.flags & uapi.F_UNPRIVILEGED_DEV)
        return info._replace(dropped=request.flags & ~info.flags)

    def get_info(self, dev_id: int) -> DeviceInfo:
        """What the driver knows of a device."""
        buf = bytearray(uapi.DEV_INFO.size)
        # The second form proves access by the node's path. Both, form and path, may be missing.
        if self._encoded is not None and not self._features.assumed:
            result = self._result_of(Command.GET_DEV_INFO2, dev_id, buf, path=True)
        else:
            result = -errno.EOPNOTSUPP
        if result in (-errno.EOPNOTSUPP, -errno.EINVAL, -errno.ENOENT):
            self._run(Command.GET_DEV_INFO, dev_id, buf, path=False)
        elif result < 0:
            raise driver_error(Command.GET_DEV_INFO2, dev_id, -result)
        info = DeviceInfo.unpack(buf)
        self._unprivileged[dev_id] = bool(info.flags & uapi.F_UNPRIVILEGED_DEV)
        return info

    def set_params(self, dev_id: int, params: Params) -> None:
        """Before the start only. See Params.check() for errors that say more."""
        self._run(Command.SET_PARAMS, dev_id, params.pack())

    def get_params(self, dev_id: int) -> Params:
        """As set, plus the device numbers."""
        buf = bytearray(uapi.PARAMS_BYTES)
        uapi.PARAMS_HEADER.pack_into(buf, 0, len(buf), 0)
        self._run(Command.GET_PARAMS, dev_id, buf)
        return Params.unpack(buf)

    def queue_affinity(self, dev_id: int, queue: int) -> set[int]:
        """The CPUs whose requests go to a queue."""
        buf = bytearray(_AFFINITY_BYTES)
        self._run(Command.GET_QUEUE_AFFINITY, dev_id, buf, queue_id=queue, data0=queue)
        mask = int.from_bytes(buf, "little")
        return {cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1}

    def begin_start_dev(self, dev_id: int, pid: int) -> Operation:
        """Start: ends once every queue is served. pid: of the process that opened the char device."""
        return self._begin(Command.START_DEV, dev_id, data0=pid)

    def start_dev(self, dev_id: int, pid: int, timeout: float | None = None) -> None:
        """begin_start_dev(), waited for."""
        self._wait(self.begin_start_dev(dev_id, pid), timeout)

    def begin_stop_dev(self, dev_id: int) -> Operation:
        """Stop: ends once the disk's I/O has been answered and the disk is gone."""
        return self._begin(Command.STOP_DEV, dev_id)

    def stop_dev(self, dev_id: int, timeout: float | None = None) -> None:
        """begin_stop_dev(), waited for."""
        self._wait(self.begin_stop_dev(dev_id), timeout)

    def try_stop(self, dev_id: int, timeout: float | None = None) -> None:
        """Stop a device whose disk nobody has open; EBUSY otherwise."""
        self._wait(self._begin(Command.TRY_STOP_DEV, dev_id), timeout)

    def begin_del_dev(self, dev_id: int) -> Operation:
        """Delete: ends once the number is free, which takes all users of the char device to be gone."""
        op = self._begin(Command.DEL_DEV, dev_id)
        self._unprivileged.pop(dev_id, None)  # the number may come back as another kind of device
        return op

    def del_dev(self, dev_id: int, wait: bool = True, timeout: float | None = None) -> None:
        """Delete a device. Without wait (not in all drivers) its number may stay taken for a while."""
        if wait:
            self._wait(self.begin_del_dev(dev_id), timeout)
        else:
            self._run(Command.DEL_DEV_ASYNC, dev_id)
            self._unprivileged.pop(dev_id, None)

    # Recovery

    def start_recovery(self, dev_id: int, timeout: float | None = None) -> None:
        """Begin to replace a dead server; repeated while the driver still waits for its end. 0 tries once."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        while True:
            try:
                self._run(Command.START_USER_RECOVERY, dev_id)
                return
            except DriverError as exc:
                if exc.errno != errno.EBUSY or time.monotonic() >= deadline:
                    raise
            time.sleep(_RECOVERY_PAUSE_S)

    def begin_end_recovery(self, dev_id: int, pid: int) -> Operation:
        """The new server takes over: ends once every queue is served. pid as in begin_start_dev()."""
        return self._begin(Command.END_USER_RECOVERY, dev_id, data0=pid)

    def end_recovery(self, dev_id: int, pid: int, timeout: float | None = None) -> None:
        """begin_end_recovery(), waited for."""
        self._wait(self.begin_end_recovery(dev_id, pid), timeout)

    def quiesce(self, dev_id: int, timeout: float | None = None) -> None:
        """Take a live device from its server, which then sees its tags aborted and should exit."""
        seconds = self.timeout if timeout is None else timeout
        op = self._begin(Command.QUIESCE_DEV, dev_id, data0=max(1, int(seconds * 1000)))
        op.wait(seconds + CANCEL_GRACE)

    # What only some drivers have

    def get_features(self) -> Features:
        """The driver's; features.FALLBACK if it predates the question."""
        return self._features

    def update_size(self, dev_id: int, size: int) -> None:
        """Change a live device's size, in bytes. The driver checks nothing."""
        if size <= 0 or size % uapi.SECTOR:
            raise UsageError(f"device size {size}: must be a positive multiple of {uapi.SECTOR} bytes")
        self._run(Command.UPDATE_SIZE, dev_id, data0=size // uapi.SECTOR)

    def reg_buf(self, dev_id: int, address: int, length: int, read_only: bool = False) -> int:
        """Pin this process's pages as a shared buffer of the device: its index. Whole pages, up to 4 GiB."""
        flags = uapi.SHMEM_BUF_READ_ONLY if read_only else 0
        buf = bytearray(uapi.SHMEM_BUF_REG.pack(address, length, flags, 0))
        return self._run(Command.REG_BUF, dev_id, buf)

    def unreg_buf(self, dev_id: int, index: int) -> None:
        """Give a shared buffer back."""
        self._run(Command.UNREG_BUF, dev_id, data0=index)

    def queue_states(self, dev_id: int, queues: int) -> list[QueueState]:
        """Who serves each queue of a device with F_SHARDS."""
        buf = bytearray(uapi.QUEUE_STATE.size * queues)
        self._run(Command.GET_QUEUE_STATES, dev_id, buf)
        return [QueueState(*fields) for fields in uapi.QUEUE_STATE.iter_unpack(buf)]

    # How a command gets to the driver

    def _probe(self) -> None:
        buf = bytearray(8)
        op = self._submit(Command.GET_FEATURES, -1, uapi.encoded(Command.GET_FEATURES), buf)
        result = op.wait_raw(self.timeout)
        if result >= 0:
            self._encoded = True
            self._features = Features(int.from_bytes(buf, "little"))

    def _run(
        self,
        command: Command,
        dev_id: int,
        buf: bytearray | None = None,
        *,
        queue_id: int = uapi.QUEUE_NONE,
        data0: int = 0,
        path: bool | None = None,
    ) -> int:
        result = self._result_of(command, dev_id, buf, queue_id=queue_id, data0=data0, path=path)
        if result < 0:
            raise driver_error(command, dev_id, -result)
        return result

    def _result_of(
        self,
        command: Command,
        dev_id: int,
        buf: bytearray | None = None,
        *,
        queue_id: int = uapi.QUEUE_NONE,
        data0: int = 0,
        path: bool | None = None,
    ) -> int:
        """Result of a short command, negative if the driver refused; path as in _path_prefix()."""
        prefix = self._path_prefix(dev_id, path) if command != Command.ADD_DEV else b""

        def once(opcode: int) -> int:
            return self._submit(command, dev_id, opcode, buf, prefix, queue_id, data0).wait_raw(self.timeout)

        if self._encoded is not None:
            return once(uapi.encoded(command) if self._encoded else command)
        result = once(uapi.encoded(command))
        if result >= 0:
            self._encoded = True
        elif result in _NOT_UNDERSTOOD:
            bare = once(command)
            if bare >= 0 or bare not in _NOT_UNDERSTOOD:
                self._encoded = False
                return bare
        return result

    def _begin(self, command: Command, dev_id: int, data0: int = 0) -> Operation:
        """Start a long command on a ring of its own."""
        prefix = self._path_prefix(dev_id)  # which also settles the encoding
        opcode = command if self._encoded is False else uapi.encoded(command)
        self._last = self._submit(command, dev_id, opcode, None, prefix, data0=data0)
        return self._last

    def _submit(
        self,
        command: Command,
        dev_id: int,
        opcode: int,
        buf: bytearray | None,
        prefix: bytes = b"",
        queue_id: int = uapi.QUEUE_NONE,
        data0: int = 0,
    ) -> Operation:
        if self._fd < 0:
            raise ValueError("control is closed")
        ring, self._ring = self._ring, None
        if ring is None:
            try:
                ring = native.ControlRing(self._fd)
            except OSError as exc:
                reason = exc.strerror or ""
                raise DriverError("io_uring", -1, exc.errno or errno.EIO, reason=reason) from exc
        op = Operation(ring, command, dev_id, buf, prefix, self._give_back)
        op.submit(opcode, queue_id, data0)
        return op

    def _wait(self, op: Operation, timeout: float | None) -> int:
        return op.wait(self.timeout if timeout is None else timeout)

    def _path_prefix(self, dev_id: int, wanted: bool | None = None) -> bytes:
        """What goes before a command's buffer: the char device's path if the device is unprivileged.

        With wanted None the driver is asked, once, what kind of device it is.
        """
        if dev_id < 0:
            return b""
        if wanted is None:
            if dev_id not in self._unprivileged:
                try:
                    self.get_info(dev_id)
                except DriverError as exc:
                    if exc.errno == errno.ETIMEDOUT:
                        raise
                    # The command itself will tell what is wrong.
            wanted = self._unprivileged.get(dev_id, False)
        return os.fsencode(char_path_of(dev_id)) + b"\0" if wanted else b""

    def _give_back(self, ring: native.ControlRing) -> None:
        if self._ring is None and self._fd >= 0:
            self._ring = ring
        else:
            ring.close()


def _open_control(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        number = exc.errno or errno.EIO
        hint = ""
        if number in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            hint = advice.LOAD_DRIVER
        elif number in (errno.EACCES, errno.EPERM):
            hint = advice.ROOT
        reason = "missing" if number == errno.ENOENT else ""
        raise DriverError(f"open {path}", -1, number, hint, reason) from exc
