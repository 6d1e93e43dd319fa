# SPDX-License-Identifier: Apache-2.0
"""The crash budget: when workers are replaced, and when no more."""

from __future__ import annotations

import pytest

from ublkd.supervisor import crashes
from ublkd.supervisor.crashes import CrashBudget


class Clock:
    """time.monotonic() as the test wants it."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(crashes, "time", clock)
    return clock


def test_the_first_death_is_answered_at_once(clock: Clock) -> None:
    assert CrashBudget(5).died() == 0


def test_false_starts_wait_longer_each_time(clock: Clock) -> None:
    budget = CrashBudget(0)
    pauses = []
    for _ in range(8):
        pauses.append(budget.died())
        clock.now += (pauses[-1] or 0) + 0.1
    assert pauses[0] == 0 and all(pause is not None for pause in pauses)
    for pause, middle in zip(pauses[1:], (0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0), strict=True):
        assert pause is not None and 0.75 * middle <= pause <= 1.25 * middle


def test_a_steady_run_is_no_false_start(clock: Clock) -> None:
    budget = CrashBudget(0)
    for _ in range(100):
        assert budget.died() == 0
        clock.now += crashes.STEADY_S + 0.1


def test_too_many_within_the_window(clock: Clock) -> None:
    budget = CrashBudget(3)
    for _ in range(3):
        assert budget.died() is not None
        clock.now += 5
    assert budget.died() is None and budget.count == 4
    # What is longer ago does not count.
    clock.now += CrashBudget.WINDOW_S
    assert budget.died() == 0 and budget.count == 1
