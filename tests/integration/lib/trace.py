# SPDX-License-Identifier: Apache-2.0
"""The kernel's own account of what happened: tracefs events."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TRACEFS = Path("/sys/kernel/tracing")


def _there(event: str) -> bool:
    return os.path.exists(TRACEFS / "events" / event)


# Linux 6.4 gave it its name of today.
SUBMIT = "io_uring_submit_req" if _there("io_uring/io_uring_submit_req") else "io_uring_submit_sqe"
"""io_uring's event of a submission."""


class Events:
    """Lines of the trace, there once the recording is over."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def of(self, event: str, *words: str) -> list[str]:
        """The lines of one event that hold all these words."""
        return [line for line in self.lines if f" {event}: " in line and all(word in line for word in words)]


def number(path: str) -> str:
    """A block device as block events print it."""
    dev = os.stat(path).st_rdev
    return f"{os.major(dev)},{os.minor(dev)}"


@contextmanager
def recording(*events: str) -> Iterator[Events]:
    """Record events ("block/block_rq_issue") for the length of a with statement."""
    found = Events()
    (TRACEFS / "trace").write_text("")
    try:
        for event in events:
            (TRACEFS / "events" / event / "enable").write_text("1")
        (TRACEFS / "tracing_on").write_text("1")
        yield found
        found.lines = (TRACEFS / "trace").read_text().splitlines()
    finally:
        for event in events:
            (TRACEFS / "events" / event / "enable").write_text("0")
