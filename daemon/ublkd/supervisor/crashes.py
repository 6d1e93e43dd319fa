# SPDX-License-Identifier: Apache-2.0
"""How often workers may die, and how long to wait before the next try."""

from __future__ import annotations

import random
import time

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
# A server that ran this long before it died was no false start.
STEADY_S = 2.0


class CrashBudget:
    """limit deaths within WINDOW_S seconds are forgiven; 0: all of them."""

    WINDOW_S = 60.0

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._times: list[float] = []
        self._pause = 0.0

    @property
    def count(self) -> int:
        """Deaths within the window, the last one included."""
        return len(self._times)

    def died(self) -> float | None:
        """A worker died now: seconds to wait before it is replaced, or None to give up.

        At once after a steady run, since requests are waiting; then longer each time, with jitter, so that many
        devices on one broken backing don't all come back in the same moment.
        """
        now = time.monotonic()
        steady = not self._times or now - self._times[-1] > STEADY_S + self._pause
        self._times = [t for t in self._times if now - t < self.WINDOW_S] + [now]
        if self.limit and len(self._times) > self.limit:
            return None
        self._pause = 0.0 if steady else min(max(FIRST_PAUSE_S, self._pause * 2), LONGEST_PAUSE_S)
        return self._pause * random.uniform(0.75, 1.25)
