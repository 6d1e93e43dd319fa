# SPDX-License-Identifier: Apache-2.0
"""The one importer of the compiled engine: typed handles that own what the engine gave them.

Every call that fails raises OSError with the engine's own line as its text.
A handle is used by one process and one thread; close() may be called twice.
"""

from __future__ import annotations

import os
from typing import Any

from ublkd._engine import ffi, lib

TRANSPORT_COPY: int = lib.UBLKD_TRANSPORT_COPY
TRANSPORT_USER_COPY: int = lib.UBLKD_TRANSPORT_USER_COPY
TRANSPORT_ZERO_COPY: int = lib.UBLKD_TRANSPORT_ZERO_COPY
TRANSPORT_BATCH: int = lib.UBLKD_TRANSPORT_BATCH
RUN_DONE: int = lib.UBLKD_RUN_DONE
RUN_WAKE: int = lib.UBLKD_RUN_WAKE
RUN_DRAINED: int = lib.UBLKD_RUN_DRAINED
WAKE_PING: int = lib.UBLKD_WAKE_PING
WAKE_DRAIN: int = lib.UBLKD_WAKE_DRAIN
WAKE_DRAIN_IDLE: int = lib.UBLKD_WAKE_DRAIN_IDLE
WAKE_SERVE: int = lib.UBLKD_WAKE_SERVE
LOOP_BLOCK_DEVICE: int = lib.UBLKD_LOOP_BLOCK_DEVICE
LOOP_READ_ONLY: int = lib.UBLKD_LOOP_READ_ONLY

_ETIME = 62


def _check(ret: int) -> int:
    """ret itself, or the OSError it stands for."""
    if ret < 0:
        text = ffi.string(lib.ublkd_last_error()).decode(errors="replace")
        raise OSError(-ret, text or os.strerror(-ret))
    return ret


class ControlRing:
    """An SQE128 ring for commands to an open /dev/ublk-control, one at a time."""

    def __init__(self, control_fd: int) -> None:
        ret = ffi.new("struct ublkd_ctrl **")
        _check(lib.ublkd_ctrl_create(control_fd, ret))
        self._ctrl: Any = ret[0]
        self._keep: tuple[Any, ...] = ()

    def fileno(self) -> int:
        """Readable once the outstanding command has its result."""
        return int(lib.ublkd_ctrl_fd(self._ctrl))

    def submit(
        self,
        cmd_op: int,
        dev_id: int,
        queue_id: int = 0xFFFF,
        buf: bytearray | None = None,
        data0: int = 0,
        dev_path_len: int = 0,
    ) -> None:
        """Start a command. buf is kept alive, and may be written to, until wait() returned its result."""
        cmd = ffi.new("struct ublkd_ctrl_cmd_params *")
        cmd.cmd_op, cmd.dev_id, cmd.queue_id, cmd.data0 = cmd_op, dev_id, queue_id, data0
        cmd.dev_path_len = dev_path_len
        if buf is not None:
            view = ffi.from_buffer(buf, require_writable=True)
            cmd.buf, cmd.len = view, len(buf)
            self._keep = (buf, view)
        _check(lib.ublkd_ctrl_submit(self._ctrl, cmd))

    def wait(self, timeout_s: float | None) -> int | None:
        """Result of the outstanding command, >= 0 or -errno; None if timeout_s passed (None: wait on)."""
        res = ffi.new("int32_t *")
        ms = -1 if timeout_s is None else max(0, int(timeout_s * 1000))
        ret = lib.ublkd_ctrl_wait(self._ctrl, ms, res)
        if ret == -_ETIME:
            return None
        _check(ret)
        self._keep = ()
        return int(res[0])

    def cancel(self) -> None:
        """Ask the kernel to give the outstanding command up; its result still has to be waited for."""
        _check(lib.ublkd_ctrl_cancel(self._ctrl))

    def close(self) -> None:
        """Give the ring back."""
        if self._ctrl:
            lib.ublkd_ctrl_destroy(self._ctrl)
            self._ctrl = None


class CommandBuffer:
    """The mapped command buffer of one queue. Map it before the fork; a child uses the inherited mapping."""

    def __init__(self, cdev_fd: int, qid: int, depth: int) -> None:
        ret = ffi.new("void **")
        _check(lib.ublkd_cmdbuf_map(cdev_fd, qid, depth, ret))
        self.ptr: Any = ret[0]
        self._depth = depth

    def close(self) -> None:
        """Unmap it in this process."""
        if self.ptr:
            lib.ublkd_cmdbuf_unmap(self.ptr, self._depth)
            self.ptr = None


class NoCommands:
    """In the place of a command buffer, for a queue that is only fetched."""

    def __init__(self, depth: int) -> None:
        self.ptr: Any = ffi.new("char[]", depth * 24)  # struct ublksrv_io_desc


class EngineTarget:
    """A target of the engine. keep holds what its C side points to."""

    def __init__(self, ptr: Any, keep: tuple[Any, ...] = ()) -> None:
        self.ptr = ptr
        self._keep = keep

    def close(self) -> None:
        """Destroy it; its queue must be gone."""
        if self.ptr:
            lib.ublkd_target_destroy(self.ptr)
            self.ptr = None
            self._keep = ()


def null_target(zero_reads: bool) -> EngineTarget:
    """The null target."""
    config = ffi.new("struct ublkd_null_config *")
    config.zero_reads = zero_reads
    ret = ffi.new("struct ublkd_target **")
    _check(lib.ublkd_null_create(config, ret))
    return EngineTarget(ret[0])


def memory_file_bytes(size: int) -> int:
    """Bytes of the tmpfs file behind a memory disk of size bytes."""
    return int(lib.ublkd_memory_file_bytes(size))


def memory_target(mapping: Any, fd: int, size: int) -> EngineTarget:
    """The memory target on a writable shared mapping of fd, memory_file_bytes(size) bytes."""
    view = ffi.from_buffer(mapping, require_writable=True)
    config = ffi.new("struct ublkd_memory_config *")
    config.base, config.size, config.fd = view, size, fd
    ret = ffi.new("struct ublkd_target **")
    _check(lib.ublkd_memory_create(config, ret))
    return EngineTarget(ret[0], (view, mapping))


def loop_target(fd: int, flags: int, offset: int) -> EngineTarget:
    """The loop target on an open file or block device; flags are LOOP_*, offset in bytes."""
    config = ffi.new("struct ublkd_loop_config *")
    config.fd, config.flags, config.offset = fd, flags, offset
    ret = ffi.new("struct ublkd_target **")
    _check(lib.ublkd_loop_create(config, ret))
    return EngineTarget(ret[0])


def dio_align(path: str, writable: bool) -> int:
    """Smallest block, bytes, that direct I/O on path works with; 0 if it takes none."""
    return int(lib.ublkd_dio_align(os.fsencode(path), writable))


def can_punch(fd: int, end: int) -> bool:
    """Can holes be punched in the file, which ends at byte end?"""
    return bool(lib.ublkd_can_punch(fd, end))


def foreign_target(address: int, keep: tuple[Any, ...] = ()) -> EngineTarget:
    """A target that another extension module made: the address of its struct ublkd_target."""
    return EngineTarget(ffi.cast("struct ublkd_target *", address), keep)


class Queue:
    """One hardware queue in the worker that serves it."""

    def __init__(
        self,
        *,
        cdev_fd: int,
        qid: int,
        depth: int,
        max_io_bytes: int,
        transport: int,
        dev_bytes: int,
        cmdbuf: CommandBuffer | NoCommands,
        shm: Any,
        target: EngineTarget,
        share: int = 0,
        shares: int = 1,
        wake_fd: int = -1,
        poll_us: int = 0,
    ) -> None:
        """shm is the writable mapping of the statistics segment, or None. share: of the tags, each whose number
        modulo shares is share."""
        params = ffi.new("struct ublkd_queue_params *")
        params.cdev_fd, params.wake_fd, params.qid, params.depth = cdev_fd, wake_fd, qid, depth
        params.share, params.shares = share, shares
        params.max_io_bytes, params.transport, params.poll_us = max_io_bytes, transport, poll_us
        params.dev_bytes, params.cmdbuf = dev_bytes, cmdbuf.ptr
        view = None if shm is None else ffi.from_buffer(shm, require_writable=True)
        params.shm = ffi.NULL if view is None else view
        ret = ffi.new("struct ublkd_queue **")
        _check(lib.ublkd_queue_create(params, target.ptr, ret))
        self._queue: Any = ret[0]
        self._keep: tuple[Any, ...] = (cmdbuf, view, shm, target)

    def fetch(self) -> None:
        """Tell the driver that all tags are served here; run() then serves them."""
        _check(lib.ublkd_queue_fetch(self._queue))

    def run(self) -> int:
        """Serve until the device stops (RUN_DONE), or wake_fd says so (RUN_WAKE, RUN_DRAINED). The GIL is free."""
        return _check(lib.ublkd_queue_run(self._queue))

    def close(self) -> None:
        """Tear the queue down; the driver then sees its server as gone."""
        if self._queue:
            lib.ublkd_queue_destroy(self._queue)
            self._queue = None
            self._keep = ()


def ring_flags() -> int:
    """io_uring set-up flags that this kernel takes; OSError says why io_uring can't be used."""
    ret = ffi.new("unsigned *")
    _check(lib.ublkd_probe_ring(ret))
    return int(ret[0])


def set_title(title: str) -> None:
    """Name the calling process for ps and top."""
    lib.ublkd_set_title(title.encode())


def die_with_parent(parent_pid: int) -> None:
    """Let the kernel kill this process when its parent dies; OSError ESRCH if that has happened already."""
    _check(lib.ublkd_die_with_parent(parent_pid))


def outlive_parent() -> None:
    """No longer die_with_parent()."""
    _check(lib.ublkd_outlive_parent())


def adopt_orphans() -> None:
    """PR_SET_CHILD_SUBREAPER: processes below us whose parent ends become our children."""
    _check(lib.ublkd_adopt_orphans())


def be_batch_task() -> None:
    """SCHED_BATCH, with turns of a length that lets who submits requests finish his own; OSError if not allowed."""
    _check(lib.ublkd_be_batch_task())


def be_io_flusher() -> None:
    """PR_SET_IO_FLUSHER; OSError where the process lacks CAP_SYS_RESOURCE."""
    _check(lib.ublkd_be_io_flusher())


def private_mounts() -> None:
    """Leave for a mount namespace of our own; OSError where that is not allowed."""
    _check(lib.ublkd_private_mounts())


def detach_mount(path: str) -> None:
    """Unmount path lazily in this process's namespace; OSError if it is no mount point."""
    _check(lib.ublkd_detach_mount(os.fsencode(path)))
