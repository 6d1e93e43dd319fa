# SPDX-License-Identifier: Apache-2.0
"""Failing requests are said once, whatever their number."""

from __future__ import annotations

from typing import Any

import pytest

from ublkd.supervisor import failures
from ublkd.supervisor.failures import Failures


class Counters:
    """A segment whose counters the test sets."""

    def __init__(self) -> None:
        self.counts = {"write": 3}

    def errors(self, op: str) -> int:
        return self.counts.get(op, 0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(failures.time, "monotonic", lambda: now[0])
    return now


def test_failing_requests_are_said_once(clock: list[float]) -> None:
    counters: Any = Counters()
    watched = Failures(counters)
    clock[0] += 6
    assert watched.look() == []  # those were there before
    counters.counts = {"write": 10, "flush": 1}
    assert watched.look() == []  # not yet the time to look
    clock[0] += 6
    assert watched.look() == [("write", 7), ("flush", 1)]
    counters.counts = {"write": 5000, "flush": 1}
    clock[0] += 6
    assert watched.look() == []
    clock[0] += failures.REPEAT_S
    assert watched.look() == [("write", 4990)]
