# SPDX-License-Identifier: Apache-2.0
"""Hung, idle, or waiting: what the watchdog makes of heartbeats, stages and process states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ublkd.shm import layout
from ublkd.supervisor import watchdog
from ublkd.supervisor.child import Post
from ublkd.supervisor.watchdog import Finding, Watchdog


class World:
    """One worker, its words in shared memory, its state in /proc, and the time."""

    post, pid = Post(1, 1, 2), 77

    def __init__(self, proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.pings = 0
        self.sound = True  # answers pings
        self.slot = {"heartbeat_ns": 1, "started": 0, "completed": 0, "stage": layout.STAGE_WAITING}
        self._stat = proc / str(self.pid) / "stat"
        self._stat.parent.mkdir()
        self.state("S")
        monkeypatch.setattr(watchdog, "PROC", str(proc))
        monkeypatch.setattr(watchdog, "time", self)

    def state(self, letter: str, wchan: str = "") -> None:
        self._stat.write_text(f"{self.pid} (ublkd (0)/q0) {letter} 1 2 3")
        (self._stat.parent / "wchan").write_text(wchan)

    def monotonic(self) -> float:
        return self.now

    def ping(self) -> None:
        self.pings += 1
        if self.sound:
            self.slot["heartbeat_ns"] += 1

    def words(self, slot: int) -> dict[str, int]:
        assert slot == 3
        return dict(self.slot)

    def watch(self, dog: Watchdog, seconds: float) -> list[Finding]:
        """Let time go by, in steps as the supervisor's: what was found."""
        found = []
        end = self.now + seconds
        while self.now < end:
            this: Any = self
            found += [finding for _, finding in dog.look([this])]
            self.now += dog.interval
        return found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def dog(world: World, timeout: float = 10) -> Watchdog:
    segment: Any = world
    return Watchdog(segment, timeout)


def test_an_idle_worker(world: World) -> None:
    assert world.watch(dog(world), 300) == [] and world.pings > 10


def test_a_busy_one_is_not_pinged(world: World) -> None:
    d = dog(world)
    for _ in range(50):
        world.slot["heartbeat_ns"] += 1
        assert world.watch(d, d.interval) == []
    assert world.pings == 0


def test_no_timeout_no_watch(world: World) -> None:
    world.sound = False
    d = dog(world, 0)
    assert d.interval > 60
    assert world.watch(d, 10000) == [] and world.pings == 0


@pytest.mark.parametrize(
    ("state", "stage", "where", "hung"),
    [
        ("R", layout.STAGE_PYTHON, "Python code", True),
        ("S", layout.STAGE_ENGINE, "the engine", True),
        ("S", layout.STAGE_WAITING, "io_uring_enter", True),
        ("T", layout.STAGE_WAITING, "a stop signal", True),
        ("t", layout.STAGE_PYTHON, "a debugger", False),
        ("D", layout.STAGE_PYTHON, "blocked in the kernel (nfs_wait): the backing does not answer", False),
    ],
)
def test_a_silent_one(state: str, stage: int, where: str, hung: bool, world: World) -> None:
    """It is reported once, and once more when it comes round."""
    d = dog(world)
    assert world.watch(d, 30) == []
    world.sound = False
    world.state(state, "nfs_wait")
    world.slot["stage"] = stage
    assert world.watch(d, 9) == []
    [finding] = world.watch(d, 60)
    assert (finding.event, finding.facts["where"], finding.hung) == (
        "worker hangs" if hung else "worker waits",
        where,
        hung,
    )
    world.slot["heartbeat_ns"] += 1
    world.sound = True
    assert [finding.event for finding in world.watch(d, 60)] == ["worker came round again"]


def test_a_backing_that_does_not_answer(world: World) -> None:
    d = dog(world)
    world.slot["started"] = 5
    world.slot["completed"] = 2
    assert world.watch(d, 9) == []
    [finding] = world.watch(d, 60)
    assert finding.event == "the backing does not answer" and finding.facts["requests"] == 3 and not finding.hung
    world.slot["completed"] = 3
    assert [finding.event for finding in world.watch(d, 9)] == ["the backing answers again"]


def test_a_replaced_worker_starts_anew(world: World) -> None:
    d = dog(world)
    world.sound = False
    assert [finding.event for finding in world.watch(d, 60)] == ["worker hangs"]
    world.pid = 78
    world._stat.parent.rename(world._stat.parent.parent / "78")
    assert [finding.event for finding in world.watch(d, 60)] == ["worker hangs"]


def test_a_process_that_is_gone(world: World) -> None:
    world.sound = False
    world._stat.unlink()
    assert [finding.hung for finding in world.watch(dog(world), 60)] == [True]
