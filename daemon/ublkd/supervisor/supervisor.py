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
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ublkd import inventory, log, native
from ublkd.control import uapi
from ublkd.control.commands import AddRequest, Control, DeviceInfo, Operation
from ublkd.control.device import open_char, path_of
from ublkd.errors import DriverError, UblkdError, errno_of
from ublkd.shm.segment import Segment
from ublkd.supervisor import create, placement
from ublkd.supervisor.child import Worker, WorkerDied
from ublkd.supervisor.crashes import CrashBudget
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
    record, when the device can be used. on_gone is called when the device was removed.
    """

    def __init__(
        self,
        spec: DeviceSpec,
        target: ControlTarget,
        *,
        recover_id: int | None = None,
        on_live: Callable[[dict[str, Any]], None] = lambda record: None,
    ) -> None:
        self.spec = spec
        self.target = target
        self.recover_id = recover_id
        self.on_live = on_live
        self.workers: list[Worker] = []
        self._signals: list[int] = []
        self._crashes = CrashBudget(spec.crash_limit)
        self._exit = ExitStack()
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

    def _close_target(self) -> None:
        self.target.close(discard=not self._keep_device)

    def _catch_signals(self) -> None:
        """Handlers only note the number and wake the loop up; all else happens there."""
        self._wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._wake_fds = [self._wake_r, wake_w]
        for sig in (*STOP_SIGNALS, signal.SIGCHLD):
            signal.signal(sig, lambda number, _frame: self._signals.append(number))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
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
        self.segment = Segment(self.dev_id, self.info.queues, self.info.depth, self.limits.size)
        self._exit.callback(self.segment.unlink)
        self._watchdog = Watchdog(self.segment, self.spec.hang_timeout)

    def _place(self) -> None:
        masks = [self.ctl.queue_affinity(self.dev_id, q) for q in range(self.info.queues)]
        self.cpus = placement.place(masks, self.spec.cpus, placement.topology())
        self.remark = placement.remark(self.spec.queues, self.info.queues, self.cpus)
        if self.remark:
            self.log.warning("placement", remark=self.remark, cpus=self.cpus)

    # Workers

    def _spawn(self) -> None:
        """Open the device, map every queue's command buffer, fork, and let go of all of it again."""
        cdev = open_char(self.dev_id)
        cmdbufs: list[native.CommandBuffer] = []
        try:
            # In the supervisor, before the fork: the driver refuses all mappers but the first process, and a
            # child keeps what it inherits.
            for q in range(self.info.queues):
                cmdbufs.append(native.CommandBuffer(cdev, q, self.info.depth))
            gc.collect()
            gc.freeze()  # children share the pages of what is there now
            for q in range(self.info.queues):
                self._fork(q, cdev, cmdbufs)
        finally:
            gc.unfreeze()
            # While we held any of it the driver would never see the device released.
            for cmdbuf in cmdbufs:
                cmdbuf.close()
            os.close(cdev)

    def _fork(self, qid: int, cdev: int, cmdbufs: list[native.CommandBuffer]) -> None:
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
            supervisor_pid=me,
            close_fds=[*others, status_r, *self._wake_fds, self._mounts.fileno()],
            control=self.ctl,
        )
        gc.disable()
        pid = os.fork()
        if pid == 0:
            worker.main(plan)
        gc.enable()
        os.close(status_w)
        self.workers.append(Worker(qid, pid, self.cpus[qid], status_r, wake_fd))

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

    def _sleep(self, op: Operation | None, timeout: float) -> None:
        """Until op has news, a worker exits, a signal comes, or timeout seconds passed."""
        poller = select.poll()
        poller.register(self._wake_r, select.POLLIN)
        poller.register(self._mounts, select.POLLPRI)
        if op is not None and op.fileno() >= 0:
            poller.register(op.fileno(), select.POLLIN)
        for w in self.workers:
            if w.exit_code is None:
                poller.register(w.pidfd, select.POLLIN)
        if any(fd == self._mounts.fileno() for fd, _ in poller.poll(max(0.0, timeout) * 1000)):
            self._drop_own_mounts()
        try:
            os.read(self._wake_r, 4096)
        except BlockingIOError:
            pass

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
        self._write_record()
        for w in self.workers:
            self.log.info("queue served", queue=w.qid, pid=w.pid, cpu=w.cpu)
        self.log.info("live", path=path_of(self.dev_id), size=self.limits.size, transport=self.transport)
        native.set_title(f"ublkd-{self.dev_id}")
        self._notify_systemd()
        self.on_live(self.record)

    def _set_scheduler(self) -> None:
        """An elevator sends single requests through kblockd; `none` is the largest single gain there is."""
        if self.spec.scheduler != "none":
            return
        try:
            with open(f"/sys/block/ublkb{self.dev_id}/queue/scheduler", "w") as f:
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
            "boot_id": inventory.boot_id(),
            "files": self.target.files(),
        }
        inventory.write_record(self.record)

    def _notify_systemd(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET")
        if not address:
            return
        import socket

        if address.startswith("@"):
            address = "\0" + address[1:]
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
                s.sendto(f"READY=1\nMAINPID={os.getpid()}\nSTATUS=serving {path_of(self.dev_id)}".encode(), address)
        except OSError as e:
            self.log.warning("systemd was not told", reason=e.strerror)

    def _watch(self) -> int:
        """Until a signal to stop: exit status. A worker that dies is replaced, within the crash budget."""
        try:
            while not self._stop_asked():
                dead = self._dead_worker()
                if dead is None:
                    self._look_for_hangs()
                    self._sleep(None, self._watchdog.interval)
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

    def _replace_server(self) -> None:
        began = time.monotonic()
        self._end_workers()
        self.ctl.start_recovery(self.dev_id, timeout=self.spec.start_timeout)
        self._spawn()
        self._await(self.ctl.begin_end_recovery(self.dev_id, os.getpid()), "recover")
        self.recoveries += 1
        self._write_record()
        self.log.info("recovered", seconds=round(time.monotonic() - began, 3))

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
        self._replace_server()
        self._keep_device = False
        self._exit.callback(self._remove)

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
