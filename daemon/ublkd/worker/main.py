# SPDX-License-Identifier: Apache-2.0
"""The life of a worker, from the fork on. Nothing here returns to the code that forked."""

from __future__ import annotations

import gc
import json
import os
import select
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from ublkd import native
from ublkd.errors import UblkdError

if TYPE_CHECKING:
    from ublkd.control.commands import Control
    from ublkd.targets.base import ControlTarget

EXIT_DONE = 0
EXIT_BOOT = 3  # never served; the reason went through the status pipe
EXIT_FAILED = 4  # served, then had to give up; likewise

FETCHED_S = 5.0  # at most, for all others to fetch: that takes each of them a moment


class WorkerPlan(NamedTuple):
    """All that a worker needs to know, made before the fork."""

    dev_id: int
    name: str
    qid: int
    share: int
    shares: int
    cpu: int
    cdev_fd: int
    depth: int
    max_io_bytes: int
    transport: int
    poll_us: int
    dev_bytes: int
    cmdbufs: dict[int, native.CommandBuffer]
    shm: Any
    target: ControlTarget
    status_fd: int
    wake_fd: int
    gate_fd: int
    fetched_r: int
    fetched_w: int
    supervisor_pid: int
    close_fds: list[int]
    control: Control


def tell(fd: int, **message: object) -> None:
    """One line of JSON to the supervisor; one write, so that it arrives whole."""
    os.write(fd, json.dumps(message).encode() + b"\n")


def _settle(plan: WorkerPlan) -> None:
    """Become a worker: own signals, own CPU, nothing of the others' left open."""
    native.die_with_parent(plan.supervisor_pid)
    # The supervisor decides when to go; a Ctrl-C at the terminal reaches us too.
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(sig, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    native.set_title(f"ublkd-{plan.dev_id}/q{plan.name}")
    for fd in plan.close_fds:
        os.close(fd)
    plan.control.close()
    # A mapping of another queue would keep the device from being released when its worker has died.
    for qid, cmdbuf in plan.cmdbufs.items():
        if qid != plan.qid:
            cmdbuf.close()
    os.sched_setaffinity(0, {plan.cpu})
    # Our CPU is the one that submits to our queue: woken for each request we would push the submitter aside, and
    # never see more than one at a time. A batch task waits for its turn.
    with suppress(OSError):  # some containers forbid it, and it is only speed
        native.be_batch_task()


def _serve(plan: WorkerPlan) -> None:
    target = plan.target.engine_target(plan.qid)
    queue = native.Queue(
        cdev_fd=plan.cdev_fd,
        qid=plan.qid,
        share=plan.share,
        shares=plan.shares,
        depth=plan.depth,
        max_io_bytes=plan.max_io_bytes,
        transport=plan.transport,
        poll_us=plan.poll_us,
        dev_bytes=plan.dev_bytes,
        cmdbuf=plan.cmdbufs[plan.qid],
        shm=plan.shm,
        target=target,
        wake_fd=plan.wake_fd,
    )
    tell(plan.status_fd, prepared=True)
    _fetch_with_the_others(plan, queue)
    ended = native.RUN_WAKE
    try:
        while ended == native.RUN_WAKE:
            ended = queue.run()
    finally:
        # With commands still in the driver the ring is left to the end of this process. Closed before, it would be
        # torn down by a kernel thread beside that, for which 6.12 has panicked (io_ring_exit_work).
        if ended == native.RUN_DONE:
            queue.close()
        target.close()


def _fetch_with_the_others(plan: WorkerPlan, queue: native.Queue) -> None:
    """Once all are prepared. Should the supervisor die meanwhile, all fetch or none does: see Crew.open_gate()."""
    native.outlive_parent()
    may_fetch = os.read(plan.gate_fd, 1)
    os.close(plan.gate_fd)
    if not may_fetch:
        raise UblkdError("the supervisor is gone")
    queue.fetch()
    with suppress(BrokenPipeError):
        tell(plan.status_fd, ready=True)
    os.close(plan.fetched_w)
    all_have = select.poll()
    all_have.register(plan.fetched_r)  # at its end, that is: each of the others has fetched or is dead
    all_have.poll(FETCHED_S * 1000)
    os.close(plan.fetched_r)
    native.die_with_parent(plan.supervisor_pid)


def main(plan: WorkerPlan) -> NoReturn:
    """Serve plan's queue until the device stops. Called in the forked child."""
    status = EXIT_DONE
    try:
        _settle(plan)
        gc.enable()
        _serve(plan)
    except BaseException as e:
        status = EXIT_BOOT
        hint = e.hint if isinstance(e, UblkdError) else ""
        text = e.message if isinstance(e, UblkdError) else e.strerror if isinstance(e, OSError) else ""
        try:
            tell(plan.status_fd, error=text or f"{type(e).__name__}: {e}", hint=hint)
        except OSError:
            status = EXIT_FAILED
    finally:
        # Not sys.exit(): what the supervisor registered to run at exit is not ours to run.
        os._exit(status)
