# SPDX-License-Identifier: Apache-2.0
"""Tells a worker that hangs from one that waits: for requests, or for what is behind the device.

A worker that comes round leaves a heartbeat in shared memory. One that has nothing to do leaves none, so it is
sent a ping, which a sound one answers with a pass. What a hung one hangs in shows in its stage and in /proc.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from ublkd.inventory import PROC
from ublkd.shm import layout

if TYPE_CHECKING:
    from ublkd.shm.segment import Segment
    from ublkd.supervisor.child import Worker

_LONGEST_INTERVAL_S = 30.0


class Finding(NamedTuple):
    """Something to be logged of a worker; hung: it does not come round, and killing it would help."""

    event: str
    facts: dict[str, object]
    hung: bool = False


class _Watched:
    """What is known of one worker."""

    def __init__(self) -> None:
        self.heartbeat = 0
        self.pinged: float | None = None
        self.hang_said = False
        self.completed = -1
        self.moved = time.monotonic()
        self.stall_said = False


class Watchdog:
    """Looks at a device's workers every `interval` seconds. In the supervisor; timeout in seconds, 0: never looks."""

    def __init__(self, segment: Segment, timeout: float) -> None:
        self.timeout = timeout
        self.interval = min(timeout / 4, _LONGEST_INTERVAL_S) if timeout else 3600.0
        self._segment = segment
        self._watched: dict[int, _Watched] = {}
        self._next = 0.0

    def look(self, workers: list[Worker]) -> list[tuple[Worker, Finding]]:
        """What is new. Costs nothing between two intervals."""
        now = time.monotonic()
        if not self.timeout or now < self._next:
            return []
        self._next = now + self.interval
        self._watched = {w.pid: self._watched.get(w.pid) or _Watched() for w in workers}
        found = []
        for worker in workers:
            watched, words = self._watched[worker.pid], self._segment.words(worker.post.slot)
            finding = self._heartbeat(worker, watched, words, now) or self._progress(watched, words, now)
            if finding:
                found.append((worker, finding))
        return found

    def _heartbeat(self, worker: Worker, watched: _Watched, words: dict[str, int], now: float) -> Finding | None:
        if words["heartbeat_ns"] != watched.heartbeat:
            watched.heartbeat, watched.pinged = words["heartbeat_ns"], None
            if watched.hang_said:
                watched.hang_said = False
                return Finding("worker came round again", {})
            return None
        if watched.pinged is None:
            worker.ping()
            watched.pinged = now
            return None
        silent = now - watched.pinged
        if silent < self.timeout or watched.hang_said:
            return None
        watched.hang_said = True
        where, hung = _where(worker.pid, words["stage"])
        return Finding("worker hangs" if hung else "worker waits", {"where": where, "seconds": round(silent, 1)}, hung)

    def _progress(self, watched: _Watched, words: dict[str, int], now: float) -> Finding | None:
        """Of a worker that does come round: does what it waits for answer?"""
        busy = words["started"] - words["completed"]
        if words["completed"] != watched.completed or not busy:
            waited, watched.completed, watched.moved = now - watched.moved, words["completed"], now
            if watched.stall_said:
                watched.stall_said = False
                return Finding("the backing answers again", {"seconds": round(waited, 1)})
            return None
        if now - watched.moved < self.timeout or watched.stall_said:
            return None
        watched.stall_said = True
        return Finding("the backing does not answer", {"requests": busy, "seconds": round(now - watched.moved, 1)})


def _where(pid: int, stage: int) -> tuple[str, bool]:
    """What a silent worker is in, and whether it is to blame: not for a system call that does not come back."""
    try:
        with open(f"{PROC}/{pid}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        state = "?"
    if state == "t":
        return "a debugger", False
    if state == "T":
        return "a stop signal", True
    if state == "D":
        return f"blocked in the kernel{_wchan(pid)}: the backing does not answer", False
    if stage == layout.STAGE_PYTHON:
        return "Python code", True
    return "the engine" if stage == layout.STAGE_ENGINE else "io_uring_enter", True


def _wchan(pid: int) -> str:
    try:
        with open(f"{PROC}/{pid}/wchan") as file:
            name = file.read().strip()
    except OSError:
        return ""
    return f" ({name})" if name not in ("", "0") else ""
