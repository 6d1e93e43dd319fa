# SPDX-License-Identifier: Apache-2.0
"""Byte streams that come out of a guest, and where they end."""

from __future__ import annotations


class MarkedStream:
    """A stream that is over when a mark goes by, whoever may still hold its other end open."""

    def __init__(self, mark: str) -> None:
        self._mark = mark.encode()
        self._held = b""
        self.ended = False

    def feed(self, data: bytes) -> bytes:
        """Take what arrived, return what is surely output: the mark and all after it are not."""
        if self.ended:
            return b""
        data = self._held + data
        before, found, _ = data.partition(self._mark)
        if found:
            self.ended, self._held = True, b""
            return before
        keep = self._partial_mark(data)
        self._held = data[len(data) - keep :]
        return data[: len(data) - keep]

    def rest(self) -> bytes:
        """What was held back because it might have become the mark, once nothing more will come."""
        held, self._held = self._held, b""
        return held

    def _partial_mark(self, data: bytes) -> int:
        for length in range(min(len(self._mark) - 1, len(data)), 0, -1):
            if data.endswith(self._mark[:length]):
                return length
        return 0
