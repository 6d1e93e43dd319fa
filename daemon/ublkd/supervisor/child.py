# SPDX-License-Identifier: Apache-2.0
"""A worker process as its supervisor sees it."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from typing import Any, NamedTuple

from ublkd import native
from ublkd.errors import UblkdError


class WorkerDied(UblkdError):
    """A worker is gone that should be serving."""


class Post(NamedTuple):
    """What a worker serves: of a queue's tags each whose number modulo shares is share."""

    qid: int
    share: int = 0
    shares: int = 1

    @property
    def slot(self) -> int:
        """Its number among all of the device."""
        return self.qid * self.shares + self.share

    def facts(self) -> dict[str, int]:
        """For records and the log."""
        return {"queue": self.qid} | ({"worker": self.share} if self.shares > 1 else {})

    def __str__(self) -> str:
        return f"{self.qid}.{self.share}" if self.shares > 1 else str(self.qid)


class Worker:
    """A forked worker: its end of the pipes, and how it ended."""

    def __init__(self, post: Post, pid: int, cpu: int, status_fd: int, wake_fd: int) -> None:
        self.post = post
        self.pid = pid
        self.cpu = cpu
        self.status_fd = status_fd
        self.wake_fd = wake_fd
        self.pidfd = os.pidfd_open(pid)
        self.exit_code: int | None = None  # as subprocess has it: negative for a signal
        self.report: dict[str, Any] = {}
        self._line = b""

    def read_status(self) -> None:
        """Take in what it wrote to its status pipe."""
        while True:
            try:
                data = os.read(self.status_fd, 65536)
            except BlockingIOError:
                return
            if not data:
                return
            self._line += data
            *lines, self._line = self._line.split(b"\n")
            for line in lines:
                self.report.update(json.loads(line))

    def has_said(self, word: str) -> bool:
        """Whether it is that far: "prepared" to fetch its tags, or "ready", having fetched them."""
        if word not in self.report:
            self.read_status()
        return word in self.report

    def reap(self, block: bool = False) -> bool:
        """True once it has exited."""
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, 0 if block else os.WNOHANG)
            if pid:
                self.exit_code = os.waitstatus_to_exitcode(status)
                self.read_status()
        return self.exit_code is not None

    def obituary(self) -> str:
        """Why it is gone, in a line."""
        if "error" in self.report:
            return f"worker of queue {self.post}: {self.report['error']}"
        code = self.exit_code or 0
        if code < 0:
            name = signal.Signals(-code).name
            return f"worker of queue {self.post} was killed by {name}" + (" (out of memory?)" if -code == 9 else "")
        return f"worker of queue {self.post} exited with status {code}"

    def death(self) -> WorkerDied:
        """The same as an error."""
        return WorkerDied(self.obituary(), hint=self.report.get("hint", ""))

    def ping(self) -> None:
        """Have it make a pass."""
        self.wake(native.WAKE_PING)

    def wake(self, what: int) -> None:
        """native.WAKE_*. Never waits: an eventfd that is full has been told all there is to tell."""
        with suppress(BlockingIOError):
            os.eventfd_write(self.wake_fd, what)

    def blame(self, reason: str) -> None:
        """Kill it, for this reason."""
        self.report.setdefault("error", reason)
        self.kill()

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        if self.exit_code is None:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Give its descriptors back."""
        os.close(self.status_fd)
        os.close(self.wake_fd)
        os.close(self.pidfd)
