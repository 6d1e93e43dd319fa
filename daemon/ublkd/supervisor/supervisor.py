# SPDX-License-Identifier: Apache-2.0
"""One device's supervisor: creates it, forks its workers, keeps it served, takes it down.

The order of the steps is not free; docs/architecture.md says why each comes where it does.
"""

from __future__ import annotations

import errno
import gc
import os
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ublkd import inventory, log, native
from ublkd._version import __version__
from ublkd.control import uapi
from ublkd.control.commands import AddRequest, Control, DeviceInfo, Operation
from ublkd.control.device import open_char, path_of
from ublkd.errors import DriverError, UblkdError, UsageError, errno_of
from ublkd.shm import layout
from ublkd.shm.segment import Segment
from ublkd.supervisor import create, placement
from ublkd.supervisor.child import Worker, WorkerDied
from ublkd.supervisor.crashes import CrashBudget
from ublkd.supervisor.endpoint import Endpoint
from ublkd.supervisor.failures import Failures
from ublkd.supervisor.handover import Successor, Upgraded
from ublkd.supervisor.mounts import mount_points
from ublkd.supervisor.watchdog import Watchdog
from ublkd.worker import main as worker

if TYPE_CHECKING:
    from ublkd.config.schema import DeviceSpec
    from ublkd.targets.base import ControlTarget, Limits

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
DRAIN_REPORT_S = 10.0
WORKER_EXIT_S = 5.0
DELETE_S = 10.0


class StopRequested(Exception):
    """A signal to stop came in during a step that is not the stop itself."""


class Supervisor:
    """Serves one device from start to end: run() is all there is to call.

    recover_id names a quiesced device to take over instead of making one. on_live is called once, with the
    record, when the device can be used. origin, {"config", "given"}, is where the settings came from, for SIGHUP.
    after run(), successor is the pid of the supervisor that serves the device now, if it was handed over.
    """

    def __init__(
        self,
        spec: DeviceSpec,
        target: ControlTarget,
        *,
        recover_id: int | None = None,
        on_live: Callable[[dict[str, Any]], None] = lambda record: None,
        origin: dict[str, Any] | None = None,
        background: bool = False,
    ) -> None:
        self.spec = spec
        self.origin = origin or {}
        self.background = background
        self.after_handover = False
        self.successor: int | None = None
        self.target = target
        self.recover_id = recover_id
        self.on_live = on_live
        self.workers: list[Worker] = []
        self._signals: list[int] = []
        self._crashes = CrashBudget(spec.crash_limit)
        self._exit = ExitStack()
        self._endpoint: Endpoint | None = None
        self._gate_w = -1
        self._live = False
        self._keep_device = False
        self.recoveries = 0
        self.record: dict[str, Any] = {}
        self.info: DeviceInfo
        self.limits: Limits
        self.log = log.get()

    # The whole life

    def run(self) -> int:
        """Serve until told to stop: exit status. UblkdError if the device could not be made or kept."""
        with self._exit:
            self._catch_signals()
            limits = self.target.open(self.recover_id)
            self._exit.callback(self._close_target)
            self._protect()
            try:
                self.ctl = self._exit.enter_context(Control())
                if self.recover_id is None:
                    self._create(limits)
                else:
                    self._adopt(self.recover_id, limits)
                self._go_live()
                return self._watch()
            except StopRequested:
                self.log.info("stopped before the device was live")
                return 0
            finally:
                if self.successor and self._stop_asked():
                    with suppress(ProcessLookupError):
                        os.kill(self.successor, signal.SIGTERM)

    def _close_target(self) -> None:
        self.target.close(discard=not self._keep_device)

    def _catch_signals(self) -> None:
        """Handlers only note the number and wake the loop up; all else happens there."""
        self._wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wake_fds = [self._wake_r, wake_w]
        for sig in (*STOP_SIGNALS, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(sig, lambda number, _frame: self._signals.append(number))
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)

    def _protect(self) -> None:
        """What keeps a block server out of its own way. None of it is worth failing for."""
        # A mount of our own device in our namespace could keep us from exiting (libublk-rs issues 50 and 51):
        # _drop_own_mounts() takes away those that come from others.
        for step in (native.private_mounts, native.be_io_flusher):
            try:
                step()
            except OSError as e:
                self.log.debug("not protected", reason=e.strerror)
        # Readable, so to speak, whenever a mount comes or goes.
        self._mounts = self._exit.enter_context(open("/proc/self/mountinfo", "rb"))  # noqa: SIM115
        try:
            with open("/proc/self/oom_score_adj", "w") as f:
                f.write("-1000")
        except OSError as e:
            self.log.debug("the OOM killer may choose ublkd", reason=e.strerror)

    def _drop_own_mounts(self) -> None:
        """Our namespace holds no file system of our disk: as the last to hold it we would wait for ourselves."""
        for point in mount_points(self.dev_id):
            try:
                native.detach_mount(point)
            except OSError as e:
                self.log.debug("a mount of our own stays", reason=str(e))

    # Making the device

    def _create(self, limits: Limits) -> None:
        spec, features = self.spec, self.ctl.get_features()
        self.transport = create.choose_transport(spec, self.target, features)
        flags = create.choose_flags(spec, self.target, self.transport, features)
        params = create.build_params(limits, spec.max_io_size)
        self.info = self.ctl.add_dev(
            AddRequest(
                dev_id=spec.number, queues=spec.queues, depth=spec.depth, max_io_bytes=spec.max_io_size, flags=flags
            )
        )
        self._exit.callback(self._remove)
        self.dev_id = self.info.dev_id
        self.log = log.get(device=self.dev_id)
        self._check_granted()
        params.check(self.info.max_io_bytes, self.info.flags)
        self.ctl.set_params(self.dev_id, params)
        self.target.added(self.dev_id)
        self.limits = limits
        self._place()
        self._make_segment()
        self._spawn()
        self._await(self.ctl.begin_start_dev(self.dev_id, os.getpid()), "start")

    def _check_granted(self) -> None:
        """The driver drops flags it doesn't know or want; without some the device would not work."""
        if not self.info.dropped:
            return
        names = uapi.flag_names(self.info.dropped)
        if self.info.dropped & create.TRANSPORT_FLAGS[self.transport]:
            raise UblkdError(f"the driver did not grant {', '.join(names)}", hint="give --transport copy")
        self.log.warning("the driver dropped flags", flags=names)

    def _make_segment(self) -> None:
        self.segment = Segment(
            self.dev_id, self.info.queues, self.info.depth, self.limits.size, go_on=self.recover_id is not None
        )
        self._exit.callback(self._drop_segment)
        self._watchdog = Watchdog(self.segment, self.spec.hang_timeout)
        self._failures = Failures(self.segment, self.info.queues)

    def _drop_segment(self) -> None:
        if not self.successor:
            self.segment.unlink()

    def _place(self) -> None:
        masks = [self.ctl.queue_affinity(self.dev_id, q) for q in range(self.info.queues)]
        self.cpus = placement.place(masks, self.spec.cpus, placement.topology())
        self.remark = placement.remark(self.spec.queues, self.info.queues, self.cpus)
        if self.remark:
            self.log.warning("placement", remark=self.remark, cpus=self.cpus)

    # Workers

    @contextmanager
    def _opened(self) -> Iterator[Callable[[int], None]]:
        """Open the device and map every queue's command buffer; gives the call that forks a queue's worker."""
        cdev = open_char(self.dev_id)
        gate_r, self._gate_w = os.pipe2(os.O_CLOEXEC)
        cmdbufs: list[native.CommandBuffer] = []
        try:
            # In the supervisor, before the fork: the driver refuses all mappers but the first process, and a
            # child keeps what it inherits.
            for q in range(self.info.queues):
                cmdbufs.append(native.CommandBuffer(cdev, q, self.info.depth))
            gc.collect()
            gc.freeze()  # children share the pages of what is there now
            yield lambda qid: self._fork(qid, cdev, cmdbufs, gate_r)
        except BaseException:
            # Before the gate is closed, which would have those that wait there fetch.
            self._end_workers()
            raise
        finally:
            gc.unfreeze()
            self._close_gate()
            os.close(gate_r)
            # While we held any of it the driver would never see the device released.
            for cmdbuf in cmdbufs:
                cmdbuf.close()
            os.close(cdev)

    def _spawn(self) -> None:
        """Fork all workers, and let them fetch."""
        with self._opened() as fork:
            for q in range(self.info.queues):
                fork(q)
            self._open_gate()

    def _open_gate(self) -> None:
        """Let the workers fetch, all at the same time, once each of them is up to it.

        Between the first fetch and the last a device is in a state in which a worker had better not die: before
        6.16 see _fragile; 7.2 may oops at that queue's next request. What can take its time, or fail, comes before.
        """
        deadline = time.monotonic() + self.spec.start_timeout
        while late := [w for w in self.workers if not w.has_said("prepared")]:
            dead = self._dead_worker()
            if dead is not None:
                raise WorkerDied(dead.obituary(), hint=dead.report.get("hint", ""))
            if self._stop_asked() and not self._live:
                raise StopRequested
            if time.monotonic() >= deadline:
                raise UblkdError(
                    f"the workers were not ready within {self.spec.start_timeout} seconds",
                    hint="raise --start-timeout if they only need longer",
                )
            self._sleep(None, deadline - time.monotonic(), [w.status_fd for w in late])
        self._close_gate()

    def _close_gate(self) -> None:
        """The gate is a pipe, and open at its end: should the supervisor be killed, it opens too."""
        if self._gate_w >= 0:
            os.close(self._gate_w)
            self._gate_w = -1

    def _fork(self, qid: int, cdev: int, cmdbufs: list[native.CommandBuffer], gate_fd: int) -> None:
        status_r, status_w = os.pipe2(os.O_CLOEXEC)
        wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        os.set_blocking(status_r, False)
        me = os.getpid()
        others = [fd for w in self.workers for fd in (w.status_fd, w.pidfd, w.wake_fd)]
        plan = worker.WorkerPlan(
            dev_id=self.dev_id,
            qid=qid,
            cpu=self.cpus[qid],
            cdev_fd=cdev,
            depth=self.info.depth,
            max_io_bytes=self.info.max_io_bytes,
            transport=create.TRANSPORTS[self.transport],
            dev_bytes=self.limits.size,
            cmdbufs=cmdbufs,
            shm=self.segment.buf,
            target=self.target,
            status_fd=status_w,
            wake_fd=wake_fd,
            gate_fd=gate_fd,
            supervisor_pid=me,
            close_fds=[*others, status_r, *self._wake_fds, self._mounts.fileno(), *self._other_fds()],
            control=self.ctl,
            late_death=self._fragile,
        )
        gc.disable()
        pid = os.fork()
        if pid == 0:
            worker.main(plan)
        gc.enable()
        os.close(status_w)
        self.workers.append(Worker(qid, pid, self.cpus[qid], status_r, wake_fd))

    def _other_fds(self) -> list[int]:
        gate = [self._gate_w] if self._gate_w >= 0 else []
        return gate + (self._endpoint.fds() if self._endpoint else [])

    def _dead_worker(self) -> Worker | None:
        """A worker that has exited, the one with the most to say first."""
        dead = [w for w in self.workers if w.reap()]
        return min(dead, key=lambda w: "error" not in w.report) if dead else None

    def _end_workers(self, grace: float = 0.0) -> None:
        """Wait grace seconds for the workers to exit, then kill; none is left."""
        deadline = time.monotonic() + grace
        while grace and not all([w.reap() for w in self.workers]) and time.monotonic() < deadline:
            self._sleep(None, deadline - time.monotonic())
        for w in self.workers:
            w.kill()
        for w in self.workers:
            w.reap(block=True)
            w.close()
        self.workers.clear()

    # Waiting

    def _sleep(self, op: Operation | None, timeout: float, others: Iterable[int] = ()) -> None:
        """Until op has news, another fd has input, a worker exits, a signal comes, or timeout seconds passed."""
        poller = select.poll()
        poller.register(self._wake_r, select.POLLIN)
        poller.register(self._mounts, select.POLLPRI)
        for fd in others:
            poller.register(fd, select.POLLIN)
        for fd in self._endpoint.fds() if self._endpoint and op is None else ():
            poller.register(fd, select.POLLIN)
        if op is not None and op.fileno() >= 0:
            poller.register(op.fileno(), select.POLLIN)
        for w in self.workers:
            if w.exit_code is None:
                poller.register(w.pidfd, select.POLLIN)
        if any(fd == self._mounts.fileno() for fd, _ in poller.poll(max(0.0, timeout) * 1000)):
            self._drop_own_mounts()
        with suppress(BlockingIOError):
            os.read(self._wake_r, 4096)

    def _stop_asked(self) -> bool:
        return any(s in STOP_SIGNALS for s in self._signals)

    def _await(self, op: Operation, what: str) -> None:
        """Wait for a command that needs every worker; WorkerDied, StopRequested, or UblkdError after start_timeout."""
        deadline = time.monotonic() + self.spec.start_timeout
        try:
            while op.poll() is None:
                dead = self._dead_worker()
                if dead is not None:
                    raise WorkerDied(dead.obituary(), hint=dead.report.get("hint", ""))
                if self._stop_asked():
                    raise StopRequested
                if time.monotonic() >= deadline:
                    raise UblkdError(
                        f"the device did not {what} within {self.spec.start_timeout} seconds",
                        hint="raise --start-timeout if its workers only need longer",
                    )
                self._sleep(op, deadline - time.monotonic())
        except BaseException:
            op.cancel()
            raise

    # Live

    def _go_live(self) -> None:
        self._live = True
        self._set_scheduler()
        self._open_endpoint()
        self._write_record()
        for w in self.workers:
            self.log.info("queue served", queue=w.qid, pid=w.pid, cpu=w.cpu)
        self.log.info("live", path=path_of(self.dev_id), size=self.limits.size, transport=self.transport)
        native.set_title(f"ublkd-{self.dev_id}")
        self._notify_systemd()
        self.on_live(self.record)

    def _open_endpoint(self) -> None:
        try:
            self._endpoint = Endpoint(self.dev_id)
        except OSError as e:
            self.log.warning("`ublkd upgrade` can't reach this supervisor", reason=e.strerror)
            return
        self._exit.callback(self._close_endpoint)

    def _close_endpoint(self) -> None:
        if self._endpoint:
            self._endpoint.close(unlink=not self.successor)
            self._endpoint = None

    def _set_scheduler(self) -> None:
        """An elevator sends single requests through kblockd; `none` is the largest single gain there is."""
        if self.spec.scheduler != "none":
            return
        try:
            with open(f"/sys/block/ublkb{self.dev_id}/queue/scheduler", "r+") as f:
                # A disk that was taken over mostly has it already, and a change stops the queues for a moment.
                if "[none]" not in f.read():
                    f.write("none")
        except OSError as e:
            self.log.warning("the disk keeps its scheduler", reason=e.strerror)

    def _write_record(self) -> None:
        self.record = {
            "format": 1,
            "id": self.dev_id,
            "path": path_of(self.dev_id),
            "target": self.spec.target,
            "backing": self.target.backing(),
            "backing_id": self.target.backing_id(),
            "size": self.segment.dev_bytes(),
            "queues": self.info.queues,
            "depth": self.info.depth,
            "block_size": self.limits.block_size,
            "transport": self.transport,
            "flags": self.info.flags,
            "on_crash": create.policy_of(self.info.flags),
            "recoveries": self.recoveries,
            "read_only": self.limits.read_only,
            "remark": self.remark,
            "details": self.target.details(),
            "supervisor": {"pid": os.getpid(), "start_time": inventory.start_time(os.getpid())},
            "workers": [{"queue": w.qid, "pid": w.pid, "cpu": w.cpu} for w in self.workers],
            "settings": self.spec.to_dict(),
            "origin": self.origin,
            "version": __version__,
            "boot_id": inventory.boot_id(),
            "files": self.target.files(),
        }
        inventory.write_record(self.record)

    def _notify_systemd(self, main_pid: int = 0) -> None:
        address = os.environ.get("NOTIFY_SOCKET")
        if not address:
            return
        import socket

        if address.startswith("@"):
            address = "\0" + address[1:]
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
                pid = main_pid or os.getpid()
                s.sendto(f"READY=1\nMAINPID={pid}\nSTATUS=serving {path_of(self.dev_id)}".encode(), address)
        except OSError as e:
            self.log.warning("systemd was not told", reason=e.strerror)

    def _watch(self) -> int:
        """Until a signal to stop: exit status. A worker that dies is replaced, within the crash budget."""
        try:
            while not self._stop_asked() and not self.successor:
                dead = self._dead_worker()
                if dead is None:
                    self._look_for_hangs()
                    for op, errors in self._failures.look():
                        self.log.error("requests failed", op=op, errors=errors)
                    if self._take_requests():
                        continue
                    self._sleep(None, min(self._watchdog.interval, self._failures.interval))
                    continue
                if self._stopped_by_others():
                    self.log.warning("the device was stopped from outside")
                    return 0
                self.log.error("worker died", queue=dead.qid, pid=dead.pid, reason=dead.obituary())
                self._recover()
        except StopRequested:
            pass
        except BaseException:
            # Whatever went wrong with us, the device's users and its data are better off with a quiesced
            # device that can be recovered.
            self._keep_device = True
            self._end_workers()
            raise
        if self.successor:
            return 0
        self.log.info("stopping")
        return 0

    def _look_for_hangs(self) -> None:
        for w, finding in self._watchdog.look(self.workers):
            say = self.log.error if finding.hung else self.log.warning
            say(finding.event, queue=w.qid, pid=w.pid, **finding.facts)
            if finding.hung and self.spec.on_hang == "recover":
                w.blame(f"hung in {finding.facts['where']}, killed")

    def _stopped_by_others(self) -> bool:
        try:
            return self.ctl.get_info(self.dev_id).state_name == "dead"
        except DriverError as e:
            return e.errno == errno.ENODEV

    # Recovery

    def _recover(self) -> None:
        """Replace all workers: the driver gives a device one server, and takes no new one beside the old."""
        if not self.info.flags & uapi.F_USER_RECOVERY:
            raise UblkdError("a worker died, and this driver can't recover a device", hint="see the log")
        while True:
            pause = self._crashes.died()
            if pause is None:
                raise self._give_up()
            if pause:
                self._sleep(None, pause)
            try:
                self._replace_server()
                return
            except WorkerDied as e:
                self.log.error("recovery failed", reason=e.message)

    def _give_up(self) -> UblkdError:
        """End a device whose workers die all the time: the error to leave with. It stays to be looked at."""
        reason = f"workers died {self._crashes.count} times within {CrashBudget.WINDOW_S:.0f} seconds: giving up"
        self._end_workers()
        self._keep_device = True
        if self.spec.give_up == "wait":
            return UblkdError(
                reason,
                hint=f"its users wait: `ublkd recover {self.dev_id}` tries again, `ublkd del {self.dev_id}` removes it",
            )
        try:
            # The driver fails what waits, takes the disk away, and leaves the device dead.
            self.ctl.stop_dev(self.dev_id)
        except DriverError as e:
            self.log.error("not stopped", reason=e.message)
        self.record["failed"] = reason
        inventory.write_record(self.record)
        return UblkdError(reason, hint=f"its users get I/O errors: `ublkd del {self.dev_id}` removes what is left")

    def _replace_server(self, planned: bool = False) -> None:
        began = time.monotonic()
        self._end_workers()
        if self._fragile:
            self._replace_server_of_old_driver()
        else:
            self.ctl.start_recovery(self.dev_id, timeout=self.spec.start_timeout)
            self._spawn()
        self._await(self.ctl.begin_end_recovery(self.dev_id, os.getpid()), "recover")
        self.recoveries += not planned
        self._write_record()
        self.log.info("taken over" if planned else "recovered", seconds=round(time.monotonic() - began, 3))

    @property
    def _fragile(self) -> bool:
        """Is this a driver that must not be asked to begin a recovery again before every queue was fetched?

        Up to 6.15 START_USER_RECOVERY takes the task of each queue's last fetch for granted: with some queues
        fetched and others not, it oopses; with none, it says EINVAL. The drivers with a task per tag don't.
        """
        return not self.ctl.get_features().has("PER_IO_DAEMON")

    def _replace_server_of_old_driver(self) -> None:
        """Up to the moment where every queue has a live worker that fetched, whatever dies on the way."""
        self._await_all_fetched()
        try:
            self.ctl.start_recovery(self.dev_id, timeout=self.spec.start_timeout)
        except DriverError as e:
            if e.errno != errno.EINVAL:
                raise
            self.log.debug("a recovery that nobody fetched in goes on")
        self.segment.clear_fetched(self.info.queues)
        died: WorkerDied | None = None
        deadline = time.monotonic() + self.spec.start_timeout
        with self._opened() as fork:
            for q in range(self.info.queues):
                fork(q)
            self._open_gate()
            while late := [w for w in self.workers if not w.has_said("ready")]:
                if time.monotonic() >= deadline:
                    raise UblkdError(f"the workers did not begin to serve within {self.spec.start_timeout} seconds")
                self._sleep(None, deadline - time.monotonic(), [w.status_fd for w in late])
                for w in [w for w in self.workers if w.reap()]:
                    died = WorkerDied(w.obituary(), hint=w.report.get("hint", ""))
                    if self.segment.words(w.qid)["fetched"]:
                        w.report["ready"] = True
                        continue
                    self.log.error("worker died before it served", queue=w.qid, reason=died.message)
                    pause = self._crashes.died()
                    if pause is None:
                        raise self._give_up()
                    self._sleep(None, pause)
                    w.close()
                    self.workers.remove(w)
                    fork(w.qid)
        if died is None and self._dead_worker() is None:
            return
        # Now all queues were fetched, and the recovery can begin anew.
        raise died or WorkerDied("a worker died while the others began")

    def _await_all_fetched(self) -> None:
        """Workers of a supervisor that was killed go on until they fetched, and then end."""
        deadline = time.monotonic() + self.spec.start_timeout
        while True:
            words = [self.segment.words(q)["fetched"] for q in range(self.info.queues)]
            if all(word == layout.FETCHED for word in words):
                return
            if not inventory.holders_of(self.dev_id):
                if not any(words):
                    return
                self._keep_device = True
                raise UblkdError(
                    f"device {self.dev_id} lost its workers while they took it over: this driver can't recover it",
                    hint=f"`ublkd del {self.dev_id}` removes it; drivers since Linux 6.16 have no such limit",
                )
            if time.monotonic() >= deadline:
                raise UblkdError(f"device {self.dev_id} is held by processes of its last server", "see `ublkd show`")
            self._sleep(None, 0.02)

    def _adopt(self, dev_id: int, limits: Limits) -> None:
        """Take over a device whose supervisor died."""
        self.dev_id = dev_id
        self.log = log.get(device=dev_id)
        self.info = self.ctl.get_info(dev_id)
        # Failing to take it over is no reason to remove it, nor its data.
        self._keep_device = True
        self._drop_own_mounts()
        size = self.ctl.get_params(dev_id).basic.size
        self.limits = limits._replace(size=size)
        self.transport = create.transport_of(self.info.flags)
        self._place()
        self._make_segment()
        self._exit.callback(self._end_workers)
        before = inventory.read_record(dev_id) or {}
        self.recoveries = int(before.get("recoveries") or 0)
        self._replace_server(self.after_handover)
        self._keep_device = False
        self._exit.callback(self._remove)

    # Upgrade: handover.py has the states

    def _take_requests(self) -> bool:
        """See to what came in by the socket or as SIGHUP; whether there was anything."""
        asked = False
        for request in self._endpoint.requests() if self._endpoint else ():
            asked = True
            try:
                if request.op != "upgrade":
                    raise UblkdError(f"{request.op!r} is nothing that this version of ublkd knows")
                done = self._upgrade(self._changed(request.body.get("settings")), str(request.body.get("python") or ""))
                request.answer(pid=done.pid, version=done.version, pause_ms=round(done.pause_s * 1000, 1))
            except StopRequested:
                raise
            except Exception as e:
                request.refuse(self._not_upgraded(e))
                if not self.workers:
                    raise
            if self.successor:
                break
        if signal.SIGHUP in self._signals and not self.successor:
            asked = True
            self._signals = [s for s in self._signals if s != signal.SIGHUP]
            try:
                self._upgrade(self._reread())
            except StopRequested:
                raise
            except Exception as e:
                self._not_upgraded(e)
                if not self.workers:
                    raise
        return asked

    def _not_upgraded(self, e: Exception) -> UblkdError:
        """Whatever an upgrade dies of, who serves a disk goes on; without workers there is nothing to go on with."""
        error = e if isinstance(e, UblkdError) else UblkdError(f"{type(e).__name__}: {e}", "this is a fault of ublkd")
        self.log.error("not upgraded", reason=error.message, exc_info=error is not e)
        return error

    def _changed(self, settings: object) -> DeviceSpec:
        """Our spec with these settings."""
        from ublkd.config.schema import DeviceSpec

        if settings is None:
            settings = {}
        if not isinstance(settings, dict):
            raise UsageError("settings are a table of names and values")
        return self._only_hot(DeviceSpec.from_dict({**self.spec.to_dict(), **settings}))

    def _reread(self) -> DeviceSpec:
        """What the configuration file says now, if we are served from one."""
        from ublkd.config import loader

        if not self.origin.get("config"):
            return self.spec
        return self._only_hot(loader.resolve(self.origin["given"], self.origin["config"]))

    def _only_hot(self, spec: DeviceSpec) -> DeviceSpec:
        from ublkd.config.schema import SETTINGS, check_cpus

        for name, setting in SETTINGS.items():
            if setting.scope != "hot" and getattr(spec, name) != getattr(self.spec, name):
                raise UsageError(
                    f"{name} can't change while the device is live",
                    hint=f"`ublkd del {self.dev_id}` and add it anew, or leave {name} as it is",
                )
        check_cpus(spec.cpus or ())
        return spec

    def _upgrade(self, spec: DeviceSpec, python: str = "") -> Upgraded:
        """Hand the device to a new supervisor; UblkdError if that didn't work and we serve on."""
        if not self.info.flags & uapi.F_USER_RECOVERY:
            raise UblkdError("this driver ends a device with its server", hint="it lacks USER_RECOVERY (Linux 6.1)")
        if self.info.flags & uapi.F_USER_RECOVERY_FAIL_IO:
            raise UblkdError(
                "its users would get I/O errors: there is a moment without a server, and --on-crash is error",
                hint=f"`ublkd del {self.dev_id}` and add it anew when nobody uses it",
            )
        self.log.info("upgrade asked for", python=python or None)
        hello = {
            "dev_id": self.dev_id,
            "settings": spec.to_dict(),
            "origin": self.origin,
            "background": self.background,
        }
        new = Successor(python, hello)
        try:
            ready = new.await_word("ready", spec.start_timeout, self._sleep_while_serving)
            began = time.monotonic()
            self._quiesce()
        except BaseException:
            new.end()
            raise
        self.target.close(discard=False)
        new.go()
        try:
            new.await_word("live", spec.start_timeout, self._sleep_until)
        except Exception as e:
            new.end()
            self.log.error("upgrade failed, rolling back", reason=str(e))
            self._roll_back()
            raise
        new.release()
        # Nothing of the device is ours any more.
        self._keep_device = True
        self.successor = new.pid
        done = Upgraded(new.pid, str(ready.get("version")), time.monotonic() - began)
        self.log.info("upgraded", pid=done.pid, version=done.version, pause_ms=round(done.pause_s * 1000, 1))
        self._notify_systemd(new.pid)
        return done

    def _sleep_while_serving(self, fd: int, timeout: float) -> None:
        if self._stop_asked():
            raise StopRequested
        if self._dead_worker() is not None:
            raise UblkdError("a worker died before the new version was ready", hint="try again")
        self._sleep_until(fd, timeout, self.workers)

    def _sleep_until(self, fd: int, timeout: float, workers: list[Worker] | None = None) -> None:
        """Until fd can be read, a signal comes, one of the workers ends, or timeout seconds passed."""
        poller = select.poll()
        for each in (fd, self._wake_r, *(w.pidfd for w in workers or [])):
            poller.register(each, select.POLLIN)
        poller.poll(max(0.0, timeout) * 1000)
        with suppress(BlockingIOError):
            os.read(self._wake_r, 4096)

    def _quiesce(self) -> None:
        """End the workers such that no request fails for it; UblkdError if that can't be, and they serve on."""
        patience = float(self.spec.start_timeout)
        if self.info.flags & uapi.F_QUIESCE:
            try:
                self.ctl.quiesce(self.dev_id, timeout=patience)
            except DriverError as e:
                # There is no way back from a quiesce: the driver holds new requests from here on.
                self.log.warning("not all requests were finished", reason=e.message)
                patience = 0.0
            self._end_workers(grace=patience)
            return
        reissued = bool(self.info.flags & uapi.F_USER_RECOVERY_REISSUE)
        for w in self.workers:
            w.wake(native.WAKE_DRAIN if reissued else native.WAKE_DRAIN_IDLE)
        if not reissued:
            # What a worker held when it ended would fail. The first that ends with nothing makes the driver hold
            # all new requests, and the others then finish theirs.
            deadline = time.monotonic() + patience
            while self._dead_worker() is None and time.monotonic() < deadline:
                self._sleep(None, deadline - time.monotonic())
            if self._dead_worker() is None:
                for w in self.workers:
                    w.wake(native.WAKE_SERVE)
                raise UblkdError(
                    f"no queue was without a request for {patience:.0f} seconds, and those in flight would fail",
                    hint="try again when the device is less busy",
                )
        self._end_workers(grace=patience)

    def _roll_back(self) -> None:
        """Serve again what a successor failed to."""
        self.target.open(self.dev_id)
        try:
            self._replace_server(planned=True)
        except WorkerDied as e:
            self.log.error("recovery failed", reason=e.message)
            self._recover()

    # The end

    def _remove(self) -> None:
        """Stop, drain, delete. Runs once, however it came to that."""
        if self._keep_device:
            return
        self._signals = [s for s in self._signals if s not in STOP_SIGNALS]
        self._stop()
        self._end_workers(grace=WORKER_EXIT_S)
        try:
            self.ctl.del_dev(self.dev_id, timeout=DELETE_S)
        except DriverError as e:
            if e.errno != errno.ENODEV:
                self.log.error("not deleted", reason=e.message, hint=e.hint)
        if self._live:
            inventory.remove_record(self.dev_id)
            self.log.info("removed")

    def _stop(self) -> None:
        """STOP_DEV while the workers serve: it flushes through them. Without them all it could do is hang."""
        if not self._live or self._dead_worker() is not None:
            self._end_workers()
        try:
            op = self.ctl.begin_stop_dev(self.dev_id)
            report = time.monotonic() + DRAIN_REPORT_S
            while op.poll() is None:
                if self.workers and (self._stop_asked() or self._died_badly()):
                    self.log.warning("not waiting for requests in flight")
                    self._end_workers()
                if time.monotonic() >= report:
                    self.log.warning("still draining; a second signal ends it")
                    report += DRAIN_REPORT_S
                self._sleep(op, report - time.monotonic())
        except DriverError as e:
            if e.errno != errno.ENODEV:
                self.log.error("not stopped", reason=e.message)

    def _died_badly(self) -> bool:
        """During the stop a worker exits with status 0 when its queue is done; any other end is a death."""
        return any(w.reap() and w.exit_code != worker.EXIT_DONE for w in self.workers)


def explain(e: BaseException) -> dict[str, Any]:
    """An exception as the other end of a pipe can raise it again."""
    if isinstance(e, UblkdError):
        return {"error": e.message, "hint": e.hint, "status": e.exit_status}
    return {"error": f"{type(e).__name__}: {e}", "hint": "", "status": 1, "errno": errno_of(e)}
