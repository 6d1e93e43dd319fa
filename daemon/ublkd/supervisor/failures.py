# SPDX-License-Identifier: Apache-2.0
"""Says in the log, once and not per request, that requests fail. Workers only count."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ublkd.shm import layout

if TYPE_CHECKING:
    from ublkd.shm.segment import Segment

INTERVAL_S = 5.0
# As long as requests go on failing, this often.
REPEAT_S = 300.0


class Failures:
    """Looks at a device's error counters every `interval` seconds. In the supervisor."""

    interval = INTERVAL_S

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        # those of a server before this one are old news
        self._said = {op: segment.errors(op) for op in layout.OPS}
        self._said_at: dict[str, float] = {}
        self._next = time.monotonic() + self.interval

    def look(self) -> list[tuple[str, int]]:
        """(operation, requests of it that failed since it was last said). Costs nothing between two intervals."""
        now = time.monotonic()
        if now < self._next:
            return []
        self._next = now + self.interval
        found = []
        for op in layout.OPS:
            errors = self._segment.errors(op)
            if errors > self._said[op] and now - self._said_at.get(op, -REPEAT_S) >= REPEAT_S:
                found.append((op, errors - self._said[op]))
                self._said[op], self._said_at[op] = errors, now
        return found
