# SPDX-License-Identifier: Apache-2.0
"""Settings of a live disk that the kernel may take its time for."""

from __future__ import annotations

import os
import select

CHANGE_S = 2.0

# In the background of a shell that ends at once, so that nobody has to wait for it.
_CHANGE = '{ echo "$1" >"$2" && echo done; } 2>/dev/null &'


def set_scheduler(dev_id: int, name: str) -> str:
    """Give a live disk this scheduler: what is wrong, or nothing.

    The kernel lets no request begin, and the writer, uninterruptibly, waits until those in flight have ended. If their
    worker dies meanwhile only the supervisor can see to that. So another process writes, and if CHANGE_S seconds are
    not enough it goes on alone.
    """
    path = f"/sys/block/ublkb{dev_id}/queue/scheduler"
    try:
        with open(path) as f:
            # A disk that was taken over mostly has it already, and a change stops the queues for a moment.
            if f"[{name}]" in f.read():
                return ""
        return _change(name, path)
    except OSError as e:
        return str(e.strerror)


def _change(value: str, path: str) -> str:
    ours, theirs = os.pipe()
    try:
        try:
            output = [(os.POSIX_SPAWN_DUP2, theirs, 1)]
            pid = os.posix_spawn("/bin/sh", ["sh", "-c", _CHANGE, "sh", value, path], {}, file_actions=output)
        finally:
            os.close(theirs)
        os.waitpid(pid, 0)
        poller = select.poll()
        poller.register(ours, select.POLLIN)
        if not poller.poll(CHANGE_S * 1000):
            return "requests in flight hold the change up; it comes when they have ended"
        return "" if os.read(ours, 16) else "the kernel refuses it"
    finally:
        os.close(ours)
