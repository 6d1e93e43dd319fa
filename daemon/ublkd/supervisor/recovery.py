# SPDX-License-Identifier: Apache-2.0
"""A device whose workers died gets new ones, as often as its crash budget allows."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ublkd.control import uapi
from ublkd.control.device import open_char
from ublkd.errors import DriverError, UblkdError
from ublkd.supervisor import create
from ublkd.supervisor.child import WorkerDied
from ublkd.supervisor.crashes import CrashBudget
from ublkd.supervisor.events import StopRequested
from ublkd.worker import standin

if TYPE_CHECKING:
    from ublkd.supervisor.crew import Crew
    from ublkd.supervisor.device import Device
    from ublkd.supervisor.events import Events


class Recovery:
    """Of one device; on_served is called whenever it has new workers."""

    def __init__(self, device: Device, crew: Crew, events: Events, on_served: Callable[[], None]) -> None:
        self._device = device
        self._crew = crew
        self._events = events
        self._on_served = on_served
        self._crashes = CrashBudget(device.spec.crash_limit)

    def recover(self) -> None:
        """Replace those that died where queues have servers of their own; else all of them: the driver then gives a
        device one server, and takes no new one beside the old."""
        if not self._device.has(uapi.F_USER_RECOVERY):
            raise UblkdError("a worker died, and this driver can't recover a device", hint="see the log")
        while True:
            self._pause()
            try:
                if self._device.has(uapi.F_SHARDS):
                    self._replace_dead()
                else:
                    self.replace_server()
                return
            except WorkerDied as e:
                self._device.log.error("recovery failed", reason=e.message)

    def _pause(self) -> None:
        """A worker died: wait as long as the crash budget says, or give up."""
        pause = self._crashes.died()
        if pause is None:
            raise self._give_up()
        if pause:
            self._crew.sleep(pause)

    def _give_up(self) -> UblkdError:
        """End a device whose workers die all the time: the error to leave with. It stays to be looked at."""
        device = self._device
        reason = f"workers died {self._crashes.count} times within {CrashBudget.WINDOW_S:.0f} seconds: giving up"
        self._crew.end()
        if device.spec.give_up == "wait":
            return UblkdError(
                reason,
                hint=f"its users wait: `ublkd recover {device.dev_id}` tries again, "
                f"`ublkd del {device.dev_id}` removes it",
            )
        try:
            # The driver fails what waits, takes the disk away, and leaves the device dead.
            device.ctl.stop_dev(device.dev_id)
        except DriverError as e:
            device.log.error("not stopped", reason=e.message)
        device.write_failed(reason)
        return UblkdError(reason, hint=f"its users get I/O errors: `ublkd del {device.dev_id}` removes what is left")

    def replace_server(self, planned: bool = False) -> None:
        """One try; WorkerDied if a worker does meanwhile. planned: nothing had crashed."""
        device = self._device
        began = time.monotonic()
        fetched = self._crew.has_fetched()
        self._crew.end()
        if device.fragile and not fetched:
            self._fetch_what_is_left()
        device.ctl.start_recovery(device.dev_id, timeout=device.spec.start_timeout)
        self._crew.spawn()
        self._crew.await_command(device.ctl.begin_end_recovery(device.dev_id, os.getpid()), "recover")
        device.recoveries += not planned
        self._on_served()
        device.log.info("taken over" if planned else "recovered", seconds=round(time.monotonic() - began, 3))

    def _fetch_what_is_left(self) -> None:
        """Make sure that a fragile driver can begin a recovery, whatever became of the last one."""
        device = self._device
        # The driver allows one open file: that it can be opened means that the last server is gone.
        cdev = open_char(device.dev_id, device.spec.start_timeout)
        try:
            transport = create.TRANSPORTS[device.transport]
            status = standin.fetch_what_is_left(cdev, device.info.queues, device.info.depth, transport)
        finally:
            os.close(cdev)
        if status != 0:
            raise UblkdError(f"device {device.dev_id} can't be recovered: its queues could not be fetched", "try again")

    def _replace_dead(self) -> None:
        """One try, of a device with shards: the other queues are served all the while."""
        device, crew = self._device, self._crew
        began = time.monotonic()
        for w in [w for w in crew.workers if w.reap()]:
            crew.remove(w)
        # Those of earlier tries, too.
        posts = sorted(set(device.posts) - {w.post for w in crew.workers})
        queues = [post.qid for post in posts]
        with crew.opened(queues) as fork:
            for post in posts:
                fork(post)
            self._await_orphaned(queues)
            crew.open_gate()
        crew.await_all("ready")
        device.recoveries += 1
        self._on_served()
        device.log.info("recovered", queues=queues, seconds=round(time.monotonic() - began, 3))

    def _await_orphaned(self, queues: list[int]) -> None:
        """A worker's ring, and so its I/O, may outlive it for a moment; before its end no other may fetch."""
        device = self._device
        said, late = False, time.monotonic() + device.spec.start_timeout
        while True:
            states = device.ctl.queue_states(device.dev_id, device.info.queues)
            held = [q for q in queues if not states[q].is_orphaned]
            if not held:
                return
            self._crew.check()
            if self._events.stop_asked():
                raise StopRequested
            if not said and time.monotonic() >= late:
                said = True
                device.log.warning("workers that died still hold requests: the backing does not answer", queues=held)
            self._crew.sleep(0.1 if said else 0.001)
