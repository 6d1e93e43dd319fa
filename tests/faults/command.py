# SPDX-License-Identifier: Apache-2.0
"""The ublkd command as the proofs start it."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

from faults import TOP

LIMITLESS = ("--crash-limit", "0")


def argv(*words: object) -> list[str]:
    """A command line that starts ublkd in an interpreter of its own."""
    return [sys.executable, "-B", str(Path(__file__)), *map(str, words)]


def ublkd(*words: object) -> str:
    """Run it to its end: what it printed. AssertionError if it failed."""
    done = subprocess.run(argv(*words), capture_output=True, text=True, cwd=TOP / "tests")
    assert done.returncode == 0, f"ublkd {' '.join(map(str, words))}: {done.stderr.strip()}"
    return done.stdout.strip()


class Warm:
    """Forks commands from a process that has loaded them: a proof of a thousand need not load Python each time."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            argv("--warm"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TOP / "tests"
        )

    def start(self, *words: object) -> None:
        """Start one; done() says when it has ended. One at a time."""
        assert self._server.stdin
        self._server.stdin.write(" ".join(map(str, words)) + "\n")
        self._server.stdin.flush()

    def wait(self) -> str:
        """Wait for its end: "" or why it failed."""
        assert self._server.stdout
        return self._server.stdout.readline().strip()

    def done(self) -> str | None:
        """The same, but None while it runs."""
        assert self._server.stdout
        import select

        return self.wait() if select.select([self._server.stdout], [], [], 0)[0] else None

    def close(self) -> None:
        """No more."""
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait()


def _serve_warm() -> int:
    from lib.device import warm

    warm()
    from ublkd.cli import main

    for line in sys.stdin:
        read, write = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            os.dup2(write, 2)
            with contextlib.suppress(BaseException):
                os.dup2(os.open(os.devnull, os.O_RDWR), 0)
                os.dup2(0, 1)
                os._exit(main(line.split()))
            os._exit(99)
        os.close(write)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        # not to its end: a supervisor may hold the other side
        said = os.read(read, 65536).decode(errors="replace") if status else ""
        os.close(read)
        print(f"status {status}: {' '.join(said.split())[-300:]}" if status else "", flush=True)
    return 0


def main() -> int:
    """Be the command."""
    crashes = importlib.import_module("ublkd.supervisor.crashes")
    # Times are to be those of a recovery, not of the pauses that are made when one follows the other.
    crashes.FIRST_PAUSE_S = crashes.LONGEST_PAUSE_S = 0.0
    if sys.argv[1:] == ["--warm"]:
        sys.path[:0] = [str(TOP / "tests"), str(TOP / "tests" / "integration")]
        return _serve_warm()
    return importlib.import_module("ublkd.cli").main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
