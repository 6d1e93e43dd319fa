# SPDX-License-Identifier: Apache-2.0
"""A live device goes from one supervisor to the next, without its users' noticing more than a pause.

The states, as the old supervisor sees them; docs/architecture.md has the picture, tests/integration/test_upgrade.py
a test for each edge:

  SERVING      -> PREPARING     an upgrade is asked for; the new version is started
  PREPARING    -> SERVING       it can't be started, or refuses: nothing was touched
  PREPARING    -> QUIESCING     it is ready: the workers finish what they hold, and end
  QUIESCING    -> SERVING       they can't without failing requests: they are told to go on
  QUIESCING    -> HANDED_OVER   the device waits for a server, the backing is let go
  HANDED_OVER  -> CONFIRMED     the new one serves; the old one ends and touches nothing more
  HANDED_OVER  -> ROLLED_BACK   it died, failed or took too long: it is ended, and the old one serves again

Should the old supervisor be killed in between, the new one ends if it was not handed the device yet, else goes on.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ublkd.errors import UblkdError
from ublkd.supervisor.endpoint import MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

MODULE = "ublkd.supervisor.successor"
_END_S = 5.0


def send(channel: socket.socket, **message: object) -> None:
    """One message to the other side."""
    channel.send(json.dumps(message).encode())


def receive(channel: socket.socket) -> dict[str, Any] | None:
    """The next message; None if the other side is gone."""
    try:
        data = channel.recv(MAX_BYTES)
    except ConnectionResetError:
        return None
    try:
        message = json.loads(data) if data else None
    except ValueError:
        raise UblkdError("the other side of the handover speaks another language") from None
    return message if isinstance(message, dict) else None


class Successor:
    """The new supervisor as the old one sees it: a child process, and a channel to it."""

    def __init__(self, python: str, hello: dict[str, object]) -> None:
        """Start the version that the interpreter `python` finds; hello says what it is to take over."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = subprocess.Popen(
                [python or sys.executable, "-m", MODULE, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                cwd="/",
            )
        except (OSError, ValueError) as e:  # the latter for a name with a NUL in it
            ours.close()
            raise UblkdError(f"{python} can't be run: {getattr(e, 'strerror', e)}") from None
        finally:
            theirs.close()
        self.pid = self._process.pid
        self._channel = ours
        with suppress(OSError):  # what it died of shows when its answer is awaited
            send(ours, **hello)

    def go(self) -> None:
        """It may take the device."""
        with suppress(OSError):
            send(self._channel, go=True)

    def await_word(self, word: str, timeout: float, sleep: Callable[[int, float], None]) -> dict[str, Any]:
        """Its message that has this word, within timeout seconds; UblkdError says why there is none.

        sleep(fd, seconds) waits for input, and may raise to give up.
        """
        deadline = time.monotonic() + timeout
        while True:
            if _readable(self._channel):
                message = receive(self._channel)
                if message is None:
                    status = self._process.wait()
                    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
                    raise UblkdError(f"the new version {how} before it was {word}", "see the log")
                if "error" in message:
                    raise UblkdError(f"the new version can't serve: {message['error']}", str(message.get("hint", "")))
                if word in message:
                    return message
            left = deadline - time.monotonic()
            if left <= 0:
                raise UblkdError(f"the new version was not {word} within {timeout:.0f} seconds", "see the log")
            sleep(self._channel.fileno(), left)

    def end(self) -> None:
        """It, and what it forked, is gone when this returns: its workers die with it."""
        self._channel.close()
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)

    def release(self) -> None:
        """It goes on without us."""
        self._channel.close()
        # Popen would otherwise complain about a child that it was not asked to wait for.
        self._process.returncode = 0


def _readable(channel: socket.socket) -> bool:
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    return bool(poller.poll(0))


def outlive(first: int, current: Callable[[], int | None]) -> int:
    """The process that a user or script started stays until the last of its successors ends: that one's exit status.

    Signals to end go on to whoever serves (`current()`); a Ctrl-C reaches that one by itself.
    """
    wanted = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
    status, ours = 0, {first}
    while True:
        with suppress(ChildProcessError):
            while True:
                pid, how = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    break
                if pid in ours:
                    status = os.waitstatus_to_exitcode(how)
        now = current()
        if now is not None:
            ours.add(now)
        if not _has_children():
            return status if status >= 0 else 128 - status
        info = signal.sigwaitinfo(wanted)
        now = current()
        if info.si_signo != signal.SIGCHLD and now is not None and info.si_code <= 0:  # above 0: from the kernel
            with suppress(ProcessLookupError):
                os.kill(now, info.si_signo)


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    except ChildProcessError:
        return False
    return True
