# SPDX-License-Identifier: Apache-2.0
"""One control command under way."""

from __future__ import annotations

import errno
import select
import time
from collections.abc import Callable

from ublkd import native
from ublkd.control import uapi
from ublkd.control.advice import driver_error
from ublkd.control.uapi import Command
from ublkd.errors import DriverError

CANCEL_GRACE = 1.0  # seconds that a cancelled command gets to end


class Operation:
    """A command under way. Its ring is its own until it has ended."""

    def __init__(
        self,
        ring: native.ControlRing,
        command: Command,
        dev_id: int,
        buf: bytearray | None,
        prefix: bytes,
        give_back: Callable[[native.ControlRing], None],
    ) -> None:
        """prefix goes to the driver before buf; give_back gets the ring when the command has ended."""
        self._give_back = give_back
        self._ring: native.ControlRing | None = ring
        self._buf = buf
        self._prefix = prefix
        self._sent = bytearray(prefix) + (b"" if buf is None else buf) or None
        self._result: int | None = None
        self.command = command
        self.dev_id = dev_id

    def submit(self, opcode: int, queue_id: int, data0: int) -> None:
        """Start it; called once, by Control."""
        assert self._ring is not None
        try:
            self._ring.submit(
                opcode, self.dev_id & uapi.DEV_ID_AUTO, queue_id, self._sent, data0, len(self._prefix)
            )
        except OSError as exc:
            self._take_ring().close()
            raise self.error(exc.errno or errno.EIO, exc.strerror or "") from exc

    @property
    def name(self) -> str:
        """Of the command, as the interface has it."""
        return self.command.name

    def fileno(self) -> int:
        """Readable when poll() has a result; -1 after the end."""
        return self._ring.fileno() if self._ring is not None else -1

    def poll(self) -> int | None:
        """None while it runs, then its result; DriverError if it failed. Never blocks."""
        result = self._result_within(0)
        return None if result is None else self._checked(result)

    def wait(self, timeout: float) -> int:
        """Its result. After timeout seconds it is cancelled and DriverError says ETIMEDOUT."""
        return self._checked(self.wait_raw(timeout))

    def wait_raw(self, timeout: float) -> int:
        """As wait(), but a refusal by the driver is a result too: -errno."""
        try:
            result = self._result_within(timeout)
        except BaseException:  # Ctrl-C: leave nothing running behind the caller's back
            self.cancel()
            raise
        if result is not None:
            return result
        self.cancel()
        if self._result is not None and self._result >= 0:
            return self._result  # it ended well while it was being cancelled
        raise self.error(errno.ETIMEDOUT, f"no answer within {timeout:g} s")

    def cancel(self, grace: float = CANCEL_GRACE) -> bool:
        """Give it up: whether it has ended within grace seconds. Otherwise its ring is abandoned."""
        if self._ring is None:
            return True
        try:
            self._ring.cancel()
        except OSError:
            grace = 0
        if self._result_within(grace) is not None:
            return True
        self.abandon()
        return False

    def abandon(self) -> None:
        """Close its ring, whatever state it is in; also for a forked child that has no part in it."""
        if self._ring is not None:
            self._result = -errno.ETIMEDOUT
            self._take_ring().close()

    def error(self, number: int, reason: str = "") -> DriverError:
        """The error that errno `number` means for this command."""
        return driver_error(self.command, self.dev_id, number, reason)

    def _result_within(self, timeout: float) -> int | None:
        if self._result is not None or self._ring is None:
            return self._result
        # Wait in Python, not in the engine, so that signal handlers run.
        poller = select.poll()
        poller.register(self._ring.fileno(), select.POLLIN)
        deadline = time.monotonic() + timeout
        while True:
            result = self._ring.wait(0)
            if result is not None:
                break
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            poller.poll(left * 1000)
        self._result = result
        if self._buf is not None and self._sent is not None:
            self._buf[:] = self._sent[len(self._prefix) :]
        self._give_back(self._take_ring())
        return result

    def _checked(self, result: int) -> int:
        if result < 0:
            raise self.error(-result)
        return result

    def _take_ring(self) -> native.ControlRing:
        assert self._ring is not None
        ring, self._ring = self._ring, None
        return ring
