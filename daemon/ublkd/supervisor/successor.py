# SPDX-License-Identifier: Apache-2.0
"""The new side of a handover: `python -m ublkd.supervisor.successor FD`, started by the supervisor that it replaces.

What it says and is told is an interface between versions: {dev_id, settings, origin, background} first, then
{ready, version}, {go}, {live, pid}; or {error, hint} at any time.
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from typing import Any

from ublkd import log
from ublkd._version import __version__
from ublkd.config.schema import DeviceSpec
from ublkd.control.commands import Control
from ublkd.supervisor import lifecycle
from ublkd.supervisor.handover import receive, send
from ublkd.supervisor.supervisor import Supervisor, explain


def main(fd: int) -> int:
    """Take over what the other side names, and serve it to its end: exit status."""
    channel = socket.socket(fileno=fd)
    channel.set_inheritable(False)
    hello = receive(channel)
    if hello is None:
        return 1
    live = False

    def on_live(record: dict[str, Any]) -> None:
        nonlocal live
        live = True
        with suppress(OSError):  # it was killed meanwhile: the device is ours all the same
            send(channel, live=True, pid=record["supervisor"]["pid"])
        channel.close()

    try:
        dev_id: int = hello["dev_id"]
        spec = DeviceSpec.from_dict(hello["settings"])
        log.setup(spec.log_level, spec.log_format)
        target = lifecycle.make_target(spec)
        target.preflight()
        with Control() as ctl:
            ctl.get_info(dev_id)
        supervisor = Supervisor(
            spec,
            target,
            recover_id=dev_id,
            on_live=on_live,
            origin=hello["origin"],
            background=hello["background"],
        )
        supervisor.after_handover = True
        send(channel, ready=True, version=__version__)
        if receive(channel) is None:
            return 0
        status = supervisor.run()
    except BaseException as e:
        if live:
            log.get().error("the supervisor failed", reason=str(e), exc_info=True)
        else:
            with suppress(OSError):
                send(channel, **explain(e))
        return int(getattr(e, "exit_status", 1))
    if status == 0 and hello["background"] and not supervisor.successor:
        with suppress(OSError):
            os.unlink(lifecycle.log_path(dev_id))
    return status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
