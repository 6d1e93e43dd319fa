# SPDX-License-Identifier: Apache-2.0
"""A device's workers as a group: forked, let fetch together, and ended."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ublkd import native
from ublkd.control import uapi
from ublkd.control.device import open_char
from ublkd.errors import UblkdError
from ublkd.supervisor import create
from ublkd.supervisor.child import Post, Worker
from ublkd.supervisor.events import StopRequested
from ublkd.worker import main as worker

if TYPE_CHECKING:
    from ublkd.control.commands import Operation
    from ublkd.supervisor.device import Device
    from ublkd.supervisor.events import Events


class Crew:
    """The workers of a device. other_fds: what else is open here that a worker has to close."""

    def __init__(self, device: Device, events: Events, other_fds: Callable[[], list[int]]) -> None:
        self.workers: list[Worker] = []
        self._device = device
        self._events = events
        self._other_fds = other_fds
        self._gate_w = -1

    def sleep(self, timeout: float, fds: Iterable[int] = ()) -> None:
        """Events.sleep(), and until a worker exits."""
        self._events.sleep(timeout, [*(w.pidfd for w in self.workers if w.exit_code is None), *fds])

    def sleep_for(self, op: Operation, timeout: float) -> None:
        """sleep(), and until a command has news."""
        self.sleep(timeout, [op.fileno()] if op.fileno() >= 0 else [])

    def dead(self) -> Worker | None:
        """A worker that has exited, the one with the most to say first."""
        dead = [w for w in self.workers if w.reap()]
        return min(dead, key=lambda w: "error" not in w.report) if dead else None

    def is_whole(self) -> bool:
        """Has every post a worker that lives?"""
        return self.dead() is None and len(self.workers) == len(self._device.posts)

    def has_fetched(self) -> bool:
        """Did every post's worker say that it has fetched, dead or alive?"""
        return len(self.workers) == len(self._device.posts) and all(w.has_said("ready") for w in self.workers)

    def check(self) -> None:
        """WorkerDied if one has."""
        dead = self.dead()
        if dead is not None:
            raise dead.death()

    @contextmanager
    def opened(self, queues: Sequence[int]) -> Iterator[Callable[[Post], None]]:
        """Open the device and map these queues' command buffers; gives the call that forks a worker."""
        device = self._device
        gate_r, self._gate_w = os.pipe2(os.O_CLOEXEC)
        fetched_r, fetched_w = os.pipe2(os.O_CLOEXEC)
        before = list(self.workers)
        cdevs: list[int] = []
        cmdbufs: dict[int, native.CommandBuffer] = {}
        try:
            # With shards a queue's server is whoever holds the file through which it was fetched.
            for _ in queues if device.has(uapi.F_SHARDS) else queues[:1]:
                cdevs.append(open_char(device.dev_id))
            files = dict(zip(queues, cdevs if len(cdevs) > 1 else cdevs * len(queues), strict=True))
            # In the supervisor, before the fork: the driver refuses all mappers but the first process, and a
            # child keeps what it inherits.
            for q in queues:
                cmdbufs[q] = native.CommandBuffer(files[q], q, device.info.depth)
            gc.collect()
            gc.freeze()  # children share the pages of what is there now
            pipes = {"gate_fd": gate_r, "fetched_r": fetched_r, "fetched_w": fetched_w}
            yield lambda post: self._fork(post, files, cmdbufs, pipes)
        except BaseException:
            self.end(besides=before)
            raise
        finally:
            for fd in (fetched_w, fetched_r, self._gate_w, gate_r):
                os.close(fd)
            self._gate_w = -1
            gc.unfreeze()
            # While we held any of it the driver would never see the device released.
            for cmdbuf in cmdbufs.values():
                cmdbuf.close()
            for fd in cdevs:
                os.close(fd)

    def spawn(self) -> None:
        """Fork all workers, and let them fetch."""
        with self.opened(range(self._device.info.queues)) as fork:
            for post in self._device.posts:
                fork(post)
            self.open_gate()

    def open_gate(self) -> None:
        """Let the workers fetch, all at the same time, once each of them is up to it.

        Between the first fetch and the last a device is in a state in which a worker had better not die: before
        6.16 see Device.fragile; 7.2 may oops at that queue's next request. What can take its time, or fail, comes
        before; and while they fetch the workers don't die with their supervisor.
        """
        self.await_all("prepared")
        # A byte for each: at the mere end of the pipe, which is when we were killed, they give up.
        os.write(self._gate_w, bytes(len(self._device.posts)))

    def await_all(self, word: str) -> None:
        """Wait until every worker has said this; WorkerDied, StopRequested, or UblkdError after start_timeout."""
        patience = self._device.spec.start_timeout
        deadline = time.monotonic() + patience
        while late := [w for w in self.workers if not w.has_said(word)]:
            self.check()
            if self._events.stop_asked() and not self._device.live:
                raise StopRequested
            if time.monotonic() >= deadline:
                raise UblkdError(
                    f"the workers were not {word} within {patience} seconds",
                    hint="raise --start-timeout if they only need longer",
                )
            self.sleep(deadline - time.monotonic(), [w.status_fd for w in late])

    def _fork(
        self, post: Post, files: dict[int, int], cmdbufs: dict[int, native.CommandBuffer], pipes: dict[str, int]
    ) -> None:
        device, qid, cpu = self._device, post.qid, self._device.cpus[post.slot]
        status_r, status_w = os.pipe2(os.O_CLOEXEC)
        wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        os.set_blocking(status_r, False)
        others = [fd for w in self.workers for fd in (w.status_fd, w.pidfd, w.wake_fd)]
        others += set(files.values()) - {files[qid]}
        plan = worker.WorkerPlan(
            dev_id=device.dev_id,
            name=str(post),
            qid=qid,
            share=post.share,
            shares=post.shares,
            cpu=cpu,
            cdev_fd=files[qid],
            depth=device.info.depth,
            max_io_bytes=device.info.max_io_bytes,
            transport=create.TRANSPORTS[device.transport],
            poll_us=device.spec.poll,
            dev_bytes=device.limits.size,
            cmdbufs=cmdbufs,
            shm=device.segment.buf,
            target=device.target,
            status_fd=status_w,
            wake_fd=wake_fd,
            **pipes,
            supervisor_pid=os.getpid(),
            close_fds=[*others, status_r, self._gate_w, *self._events.fds(), *self._other_fds()],
            control=device.ctl,
        )
        gc.disable()
        pid = os.fork()
        if pid == 0:
            worker.main(plan)
        gc.enable()
        os.close(status_w)
        self.workers.append(Worker(post, pid, cpu, status_r, wake_fd))

    def await_command(self, op: Operation, what: str) -> None:
        """Wait for a command that needs every worker; WorkerDied, StopRequested, or UblkdError after start_timeout."""
        patience = self._device.spec.start_timeout
        deadline = time.monotonic() + patience
        try:
            while op.poll() is None:
                self.check()
                if self._events.stop_asked():
                    raise StopRequested
                if time.monotonic() >= deadline:
                    raise UblkdError(
                        f"the device did not {what} within {patience} seconds",
                        hint="raise --start-timeout if its workers only need longer",
                    )
                self.sleep_for(op, deadline - time.monotonic())
        except BaseException:
            op.cancel()
            raise

    def remove(self, gone: Worker) -> None:
        """Forget one that was reaped."""
        gone.close()
        self.workers.remove(gone)

    def end(self, grace: float = 0.0, besides: Sequence[Worker] = ()) -> None:
        """Wait grace seconds for the workers to exit, then kill; none is left besides these."""
        ending = [w for w in self.workers if w not in besides]
        deadline = time.monotonic() + grace
        while grace and not all([w.reap() for w in ending]) and time.monotonic() < deadline:
            self.sleep(deadline - time.monotonic())
        for w in ending:
            if grace and w.exit_code is None:
                reason = f"still there after {grace:.0f} s"
                self._device.log.warning("worker killed", **w.post.facts(), pid=w.pid, reason=reason)
            w.kill()
        for w in ending:
            w.reap(block=True)
            self.remove(w)
