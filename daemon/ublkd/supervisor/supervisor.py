# SPDX-License-Identifier: Apache-2.0
"""One device's supervisor: creates it, forks its workers, keeps it served, takes it down.

The order of the steps is not free; docs/architecture.md says why each comes where it does.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from ublkd import inventory, native
from ublkd.control import uapi
from ublkd.control.commands import AddRequest, Control
from ublkd.control.device import path_of
from ublkd.errors import DriverError, UblkdError, errno_of
from ublkd.shm.segment import Segment
from ublkd.supervisor import create, disk
from ublkd.supervisor.crew import Crew
from ublkd.supervisor.device import Device
from ublkd.supervisor.endpoint import Endpoint
from ublkd.supervisor.events import Events, StopRequested
from ublkd.supervisor.failures import Failures
from ublkd.supervisor.mounts import mount_points
from ublkd.supervisor.recovery import Recovery
from ublkd.supervisor.upgrades import Upgrade
from ublkd.supervisor.watchdog import Watchdog
from ublkd.worker import main as worker

if TYPE_CHECKING:
    from ublkd.config.schema import DeviceSpec
    from ublkd.targets.base import ControlTarget, Limits

DRAIN_REPORT_S = 10.0
WORKER_EXIT_S = 5.0
DELETE_S = 10.0


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
        self.device = Device(spec, target)
        self.recover_id = recover_id
        self.on_live = on_live
        self.origin = origin or {}
        self.background = background
        self.after_handover = False
        self._exit = ExitStack()
        self._endpoint: Endpoint | None = None
        self._keep_device = False

    @property
    def dev_id(self) -> int:
        """The device's number, once it has one."""
        return self.device.dev_id

    @property
    def successor(self) -> int | None:
        """The pid of the supervisor that serves the device now, if it was handed over."""
        return self._upgrade.successor

    # The whole life

    def run(self) -> int:
        """Serve until told to stop: exit status. UblkdError if the device could not be made or kept."""
        device = self.device
        with self._exit:
            self._events = Events()
            self._crew = Crew(device, self._events, self._other_fds)
            self._recovery = Recovery(device, self._crew, self._events, self._write_record)
            self._upgrade = Upgrade(device, self._crew, self._recovery, self._events, self.origin, self.background)
            limits = device.target.open(self.recover_id)
            self._exit.callback(self._close_target)
            self._protect()
            try:
                device.ctl = self._exit.enter_context(Control())
                if self.recover_id is None:
                    self._create(limits)
                else:
                    self._adopt(self.recover_id, limits)
                self._go_live()
                return self._watch()
            except StopRequested:
                device.log.info("stopped before the device was live")
                return 0
            finally:
                if self.successor and self._events.stop_asked():
                    with suppress(ProcessLookupError):
                        os.kill(self.successor, signal.SIGTERM)

    def _close_target(self) -> None:
        self.device.target.close(discard=not self._keep_device)

    def _other_fds(self) -> list[int]:
        return self._endpoint.fds() if self._endpoint else []

    def _protect(self) -> None:
        """What keeps a block server out of its own way. None of it is worth failing for."""
        # A mount of our own device in our namespace could keep us from exiting (libublk-rs issues 50 and 51):
        # _drop_own_mounts() takes away those that come from others.
        for step in (native.private_mounts, native.be_io_flusher):
            try:
                step()
            except OSError as e:
                self.device.log.debug("not protected", reason=e.strerror)
        # Readable, so to speak, whenever a mount comes or goes.
        mounts = self._exit.enter_context(open("/proc/self/mountinfo", "rb"))  # noqa: SIM115
        self._events.watch(mounts.fileno(), select.POLLPRI, self._drop_own_mounts)
        try:
            with open("/proc/self/oom_score_adj", "w") as f:
                f.write("-1000")
        except OSError as e:
            self.device.log.debug("the OOM killer may choose ublkd", reason=e.strerror)

    def _drop_own_mounts(self) -> None:
        """Our namespace holds no file system of our disk: as the last to hold it we would wait for ourselves."""
        for point in mount_points(self.dev_id):
            try:
                native.detach_mount(point)
            except OSError as e:
                self.device.log.debug("a mount of our own stays", reason=str(e))

    # Making the device, or taking it over

    def _create(self, limits: Limits) -> None:
        device = self.device
        spec, features = device.spec, device.ctl.get_features()
        device.transport = create.choose_transport(spec, device.target, features)
        flags = create.choose_flags(spec, device.target, device.transport, features)
        most = create.max_io_bytes(spec, device.transport)
        params = create.build_params(limits, most)
        device.info = device.ctl.add_dev(
            AddRequest(
                dev_id=spec.number, queues=spec.queues, depth=spec.depth, max_io_bytes=most, flags=flags
            )
        )
        self._exit.callback(self._remove)
        device.number(device.info.dev_id)
        self._check_granted()
        params.check(device.info.max_io_bytes, device.info.flags)
        device.ctl.set_params(device.dev_id, params)
        device.target.added(device.dev_id)
        device.limits = limits
        device.place()
        self._make_segment()
        self._crew.spawn()
        self._crew.await_command(device.ctl.begin_start_dev(device.dev_id, os.getpid()), "start")

    def _check_granted(self) -> None:
        """The driver drops flags it doesn't know or want; without some the device would not work."""
        dropped = self.device.info.dropped
        if not dropped:
            return
        names = uapi.flag_names(dropped)
        if dropped & create.TRANSPORT_FLAGS[self.device.transport]:
            raise UblkdError(f"the driver did not grant {', '.join(names)}", hint="give --transport copy")
        self.device.log.warning("the driver dropped flags", flags=names)

    def _make_segment(self) -> None:
        device = self.device
        device.segment = Segment(
            device.dev_id,
            device.info.queues,
            device.info.depth,
            device.limits.size,
            device.spec.workers_per_queue,
            go_on=self.recover_id is not None,
        )
        self._exit.callback(self._drop_segment)
        self._watchdog = Watchdog(device.segment, device.spec.hang_timeout)
        self._failures = Failures(device.segment)

    def _drop_segment(self) -> None:
        if not self.successor:
            self.device.segment.unlink()

    def _adopt(self, dev_id: int, limits: Limits) -> None:
        """Take over a device whose supervisor died."""
        device = self.device
        device.number(dev_id)
        device.info = device.ctl.get_info(dev_id)
        # Failing to take it over is no reason to remove it, nor its data.
        self._keep_device = True
        self._drop_own_mounts()
        device.limits = limits._replace(size=device.ctl.get_params(dev_id).basic.size)
        device.transport = create.transport_of(device.info.flags)
        device.place()
        self._make_segment()
        self._exit.callback(self._crew.end)
        before = inventory.read_record(dev_id) or {}
        device.recoveries = int(before.get("recoveries") or 0)
        self._recovery.replace_server(planned=self.after_handover)
        self._keep_device = False
        self._exit.callback(self._remove)

    # Live

    def _go_live(self) -> None:
        device = self.device
        device.live = True
        self._set_scheduler()
        self._open_endpoint()
        self._write_record()
        for w in self._crew.workers:
            device.log.info("queue served", **w.post.facts(), pid=w.pid, cpu=w.cpu)
        device.log.info("live", path=path_of(device.dev_id), size=device.limits.size, transport=device.transport)
        native.set_title(f"ublkd-{device.dev_id}")
        self._notify_systemd()
        self.on_live(device.record)

    def _open_endpoint(self) -> None:
        try:
            self._endpoint = Endpoint(self.dev_id)
        except OSError as e:
            self.device.log.warning("`ublkd upgrade` can't reach this supervisor", reason=e.strerror)
            return
        self._exit.callback(self._close_endpoint)

    def _close_endpoint(self) -> None:
        if self._endpoint:
            self._endpoint.close(unlink=not self.successor)
            self._endpoint = None

    def _set_scheduler(self) -> None:
        """An elevator sends single requests through kblockd; `none` is the largest single gain there is."""
        if self.device.spec.scheduler == "none":
            wrong = disk.set_scheduler(self.dev_id, "none")
            if wrong:
                self.device.log.warning("the disk keeps its scheduler", reason=wrong)

    def _write_record(self) -> None:
        self.device.write_record(self._crew.workers, self.origin)

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
            self.device.log.warning("systemd was not told", reason=e.strerror)

    def _watch(self) -> int:
        """Until a signal to stop: exit status. A worker that dies is replaced, within the crash budget."""
        try:
            while not self._events.stop_asked() and not self.successor:
                dead = self._crew.dead()
                if dead is None:
                    self._look_for_hangs()
                    for op, errors in self._failures.look():
                        self.device.log.error("requests failed", op=op, errors=errors)
                    if self._upgrade.take_requests(self._endpoint):
                        continue
                    self._crew.sleep(min(self._watchdog.interval, self._failures.interval), self._other_fds())
                    continue
                if self._stopped_by_others():
                    self.device.log.warning("the device was stopped from outside")
                    return 0
                self.device.log.error("worker died", **dead.post.facts(), pid=dead.pid, reason=dead.obituary())
                self._recovery.recover()
        except StopRequested:
            pass
        except BaseException:
            # Whatever went wrong with us, the device's users and its data are better off with a quiesced
            # device that can be recovered.
            self._keep_device = True
            self._crew.end()
            raise
        if self.successor:
            # Nothing of the device is ours any more.
            self._keep_device = True
            self._notify_systemd(self.successor)
        else:
            self.device.log.info("stopping")
        return 0

    def _look_for_hangs(self) -> None:
        for w, finding in self._watchdog.look(self._crew.workers):
            say = self.device.log.error if finding.hung else self.device.log.warning
            say(finding.event, **w.post.facts(), pid=w.pid, **finding.facts)
            if finding.hung and self.device.spec.on_hang == "recover":
                w.blame(f"hung in {finding.facts['where']}, killed")

    def _stopped_by_others(self) -> bool:
        try:
            return self.device.ctl.get_info(self.dev_id).state_name == "dead"
        except DriverError as e:
            return e.errno == errno.ENODEV

    # The end

    def _remove(self) -> None:
        """Stop, drain, delete. Runs once, however it came to that."""
        if self._keep_device:
            return
        self._events.forget_stop()
        self._stop()
        self._crew.end(grace=WORKER_EXIT_S)
        try:
            self.device.ctl.del_dev(self.dev_id, timeout=DELETE_S)
        except DriverError as e:
            if e.errno != errno.ENODEV:
                self.device.log.error("not deleted", reason=e.message, hint=e.hint)
        if self.device.live:
            inventory.remove_record(self.dev_id)
            self.device.log.info("removed")

    def _stop(self) -> None:
        """STOP_DEV while the workers serve: it flushes through them. Without them all it could do is hang."""
        if not self.device.live or not self._crew.is_whole():
            self._crew.end()
        try:
            op = self.device.ctl.begin_stop_dev(self.dev_id)
            report = time.monotonic() + DRAIN_REPORT_S
            while op.poll() is None:
                if self._crew.workers and (self._events.stop_asked() or self._died_badly()):
                    self.device.log.warning("not waiting for requests in flight")
                    self._crew.end()
                if time.monotonic() >= report:
                    self.device.log.warning("still draining; a second signal ends it")
                    report += DRAIN_REPORT_S
                self._crew.sleep_for(op, report - time.monotonic())
        except DriverError as e:
            if e.errno != errno.ENODEV:
                self.device.log.error("not stopped", reason=e.message)

    def _died_badly(self) -> bool:
        """During the stop a worker exits with status 0 when its queue is done; any other end is a death."""
        return any(w.reap() and w.exit_code != worker.EXIT_DONE for w in self._crew.workers)


def explain(e: BaseException) -> dict[str, Any]:
    """An exception as the other end of a pipe can raise it again."""
    if isinstance(e, UblkdError):
        return {"error": e.message, "hint": e.hint, "status": e.exit_status}
    return {"error": f"{type(e).__name__}: {e}", "hint": "", "status": 1, "errno": errno_of(e)}
