# SPDX-License-Identifier: Apache-2.0
"""The old side of a handover: requests to be replaced, or to run with other settings. handover.py has the states."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from ublkd import native
from ublkd.control import uapi
from ublkd.errors import DriverError, UblkdError, UsageError
from ublkd.supervisor.child import WorkerDied
from ublkd.supervisor.events import StopRequested
from ublkd.supervisor.handover import Successor

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublkd.config.schema import DeviceSpec
    from ublkd.supervisor.crew import Crew
    from ublkd.supervisor.device import Device
    from ublkd.supervisor.endpoint import Endpoint
    from ublkd.supervisor.events import Events
    from ublkd.supervisor.recovery import Recovery


class Upgraded(NamedTuple):
    """A confirmed handover."""

    pid: int
    version: str
    pause_s: float


def changed(spec: DeviceSpec, settings: object) -> DeviceSpec:
    """A live device's spec with these settings; UblkdError if they make no sense, or can't change while it is live."""
    from ublkd.config.schema import DeviceSpec

    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise UsageError("settings are a table of names and values")
    return _only_hot(spec, DeviceSpec.from_dict({**spec.to_dict(), **settings}))


def reread(spec: DeviceSpec, origin: dict[str, Any]) -> DeviceSpec:
    """What the configuration file says now, if the device is served from one; errors as changed()."""
    from ublkd.config import loader

    if not origin.get("config"):
        return spec
    return _only_hot(spec, loader.resolve(origin["given"], origin["config"]))


def _only_hot(before: DeviceSpec, after: DeviceSpec) -> DeviceSpec:
    from ublkd.config.schema import SETTINGS, check_cpus

    for name, setting in SETTINGS.items():
        if setting.scope != "hot" and getattr(after, name) != getattr(before, name):
            raise UsageError(
                f"{name} can't change while the device is live",
                hint=f"`ublkd del` the device and add it anew, or leave {name} as it is",
            )
    check_cpus(after.cpus or ())
    return after


class Upgrade:
    """Hands a device to a new supervisor: `successor` is its pid once that serves."""

    def __init__(
        self, device: Device, crew: Crew, recovery: Recovery, events: Events, origin: dict[str, Any], background: bool
    ) -> None:
        self.successor: int | None = None
        self._device = device
        self._crew = crew
        self._recovery = recovery
        self._events = events
        self._origin = origin
        self._background = background

    def take_requests(self, endpoint: Endpoint | None) -> bool:
        """See to what came in by the socket or as SIGHUP; whether there was anything."""
        asked = False
        for request in endpoint.requests() if endpoint else ():
            asked = True

            def settings(body: dict[str, Any] = request.body) -> DeviceSpec:
                return changed(self._device.spec, body.get("settings"))

            if request.op != "upgrade":
                request.refuse(UblkdError(f"{request.op!r} is nothing that this version of ublkd knows"))
                continue
            done = self._attempt(settings, str(request.body.get("python") or ""), request.refuse)
            if done:
                request.answer(pid=done.pid, version=done.version, pause_ms=round(done.pause_s * 1000, 1))
                return True
        if self._events.take_hangup():
            asked = True
            self._attempt(lambda: reread(self._device.spec, self._origin), "", lambda error: None)
        return asked

    def _attempt(
        self, settings: Callable[[], DeviceSpec], python: str, refuse: Callable[[UblkdError], None]
    ) -> Upgraded | None:
        """Whatever it dies of, who serves a disk goes on; without workers there is nothing to go on with."""
        try:
            return self._upgrade(settings(), python)
        except StopRequested:
            raise
        except Exception as e:
            error = e if isinstance(e, UblkdError) else UblkdError(f"{type(e).__name__}: {e}", "a fault of ublkd")
            self._device.log.error("not upgraded", reason=error.message, exc_info=error is not e)
            refuse(error)
            if not self._crew.workers:
                raise
            return None

    def _upgrade(self, spec: DeviceSpec, python: str) -> Upgraded:
        """UblkdError if that didn't work and we serve on."""
        device = self._device
        if not device.has(uapi.F_USER_RECOVERY):
            raise UblkdError("this driver ends a device with its server", hint="it lacks USER_RECOVERY (Linux 6.1)")
        if device.has(uapi.F_USER_RECOVERY_FAIL_IO):
            raise UblkdError(
                "its users would get I/O errors: there is a moment without a server, and --on-crash is error",
                hint=f"`ublkd del {device.dev_id}` and add it anew when nobody uses it",
            )
        device.log.info("upgrade asked for", python=python or None)
        hello = {
            "dev_id": device.dev_id,
            "settings": spec.to_dict(),
            "origin": self._origin,
            "background": self._background,
        }
        new = Successor(python, hello)
        try:
            ready = new.await_word("ready", spec.start_timeout, self._sleep_while_serving)
            began = time.monotonic()
            self._quiesce()
        except BaseException:
            new.end()
            raise
        device.target.close(discard=False)
        new.go()
        try:
            new.await_word("live", spec.start_timeout, lambda fd, timeout: self._events.sleep(timeout, [fd]))
        except Exception as e:
            new.end()
            device.log.error("upgrade failed, rolling back", reason=str(e))
            self._roll_back()
            raise
        new.release()
        self.successor = new.pid
        done = Upgraded(new.pid, str(ready.get("version")), time.monotonic() - began)
        device.log.info("upgraded", pid=done.pid, version=done.version, pause_ms=round(done.pause_s * 1000, 1))
        return done

    def _sleep_while_serving(self, fd: int, timeout: float) -> None:
        if self._events.stop_asked():
            raise StopRequested
        if self._crew.dead() is not None:
            raise UblkdError("a worker died before the new version was ready", hint="try again")
        self._crew.sleep(timeout, [fd])

    def _quiesce(self) -> None:
        """End the workers such that no request fails for it; UblkdError if that can't be, and they serve on."""
        device, crew = self._device, self._crew
        patience = float(device.spec.start_timeout)
        if device.has(uapi.F_QUIESCE):
            try:
                device.ctl.quiesce(device.dev_id, timeout=patience)
            except DriverError as e:
                # There is no way back from a quiesce: the driver holds new requests from here on.
                device.log.warning("not all requests were finished", reason=e.message)
                patience = 0.0
            device.log.debug("quiesced")
            # The driver took back the tags that were idle, and none of those that were not, once they are answered.
            for w in crew.workers:
                w.wake(native.WAKE_DRAIN_IDLE)
            crew.end(grace=patience)
            return
        reissued = device.has(uapi.F_USER_RECOVERY_REISSUE)
        for w in crew.workers:
            w.wake(native.WAKE_DRAIN if reissued else native.WAKE_DRAIN_IDLE)
        if not reissued:
            # What a worker held when it ended would fail. The first that ends with nothing makes the driver hold
            # all new requests, and the others then finish theirs.
            deadline = time.monotonic() + patience
            while crew.dead() is None and time.monotonic() < deadline:
                crew.sleep(deadline - time.monotonic())
            if crew.dead() is None:
                for w in crew.workers:
                    w.wake(native.WAKE_SERVE)
                raise UblkdError(
                    f"no queue was without a request for {patience:.0f} seconds, and those in flight would fail",
                    hint="try again when the device is less busy",
                )
        crew.end(grace=patience)

    def _roll_back(self) -> None:
        """Serve again what a successor failed to."""
        self._device.target.open(self._device.dev_id)
        try:
            self._recovery.replace_server(planned=True)
        except WorkerDied as e:
            self._device.log.error("recovery failed", reason=e.message)
            self._recovery.recover()
