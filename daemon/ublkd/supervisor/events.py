# SPDX-License-Identifier: Apache-2.0
"""What wakes a supervisor up: signals, and descriptors that have news."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequested(Exception):
    """A signal to stop came in during a step that is not the stop itself."""


class Events:
    """Signals are only noted when they come in, and seen to by whoever sleeps here. For the main thread."""

    def __init__(self) -> None:
        self._signals: list[int] = []
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._watched: dict[int, tuple[int, Callable[[], None]]] = {}
        for sig in (*STOP_SIGNALS, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(sig, lambda number, _frame: self._signals.append(number))
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)

    def fds(self) -> list[int]:
        """What a child closes."""
        return [self._wake_r, self._wake_w, *self._watched]

    def watch(self, fd: int, mask: int, callback: Callable[[], None]) -> None:
        """From now on have callback called within sleep() when fd has an event of mask (select.POLL*)."""
        self._watched[fd] = mask, callback

    def stop_asked(self) -> bool:
        """Has a signal to stop come in?"""
        return any(s in STOP_SIGNALS for s in self._signals)

    def forget_stop(self) -> None:
        """The next signal to stop is another one."""
        self._signals = [s for s in self._signals if s not in STOP_SIGNALS]

    def take_hangup(self) -> bool:
        """Has SIGHUP come in since this was last asked?"""
        found = signal.SIGHUP in self._signals
        self._signals = [s for s in self._signals if s != signal.SIGHUP]
        return found

    def sleep(self, timeout: float, fds: Iterable[int] = ()) -> None:
        """Until one of fds has input, a signal comes, what is watched has news, or timeout seconds passed."""
        poller = select.poll()
        for fd in (self._wake_r, *fds):
            poller.register(fd, select.POLLIN)
        for fd, (mask, _) in self._watched.items():
            poller.register(fd, mask)
        for fd, _ in poller.poll(max(0.0, timeout) * 1000):
            if fd in self._watched:
                self._watched[fd][1]()
        with suppress(BlockingIOError):
            os.read(self._wake_r, 4096)
