# SPDX-License-Identifier: Apache-2.0
"""The machine under the benchmark: commands, modules, disks, and how all of it is undone."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

COMMAND_S = 120.0
GONE_S = 10.0
MIB = 1 << 20


class BenchError(Exception):
    """Shown to the user as one line; it says what to do."""


def say(text: str) -> None:
    """One line of progress."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


_TURN = re.compile(r"bench: \w+ (\d+) of (\d+): ")


class Clock:
    """Adds the real time that is left to lines of progress: a measurement's own clock may count something else."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began = 0.0

    def stamp(self, line: str) -> str:
        """The line as it is to be shown."""
        turn = _TURN.match(line)
        if not turn:
            return line
        done, total = int(turn[1]) - 1, int(turn[2])
        if not done:
            self._began = self._now()
            return line
        minutes = (self._now() - self._began) / done * (total - done) / 60
        return f"{line} ({minutes:.0f} min left)" if minutes >= 1 else line


class Progress:
    """Says how far a part of the measurement is."""

    clock: Clock | None = None  # adds the time that is left, where no host does

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0

    def next(self, text: str) -> None:
        """One more begins."""
        self._done += 1
        line = f"bench: {self._what} {self._done} of {self._total}: {text}"
        print(self.clock.stamp(line) if self.clock else line, file=sys.stderr, flush=True)


def run(*command: str | Path, timeout: float = COMMAND_S) -> str:
    """What the command printed. BenchError with its last line of stderr if it failed."""
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except FileNotFoundError:
        raise BenchError(f"{name} is missing: run scripts/setup bench") from None
    except subprocess.TimeoutExpired:
        raise BenchError(f"{name} {command[1]} did not end within {timeout:.0f} seconds") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise BenchError(f"{name} failed: {lines[-1] if lines else f'status {done.returncode}'}")
    return done.stdout


def wait_for(what: str, happened: Callable[[], bool], timeout: float = GONE_S) -> None:
    """Until happened() is true; BenchError after timeout seconds."""
    deadline = time.monotonic() + timeout
    while not happened():
        if time.monotonic() > deadline:
            raise BenchError(f"{what} took more than {timeout:.0f} seconds")
        time.sleep(0.02)


def module_loaded(name: str) -> bool:
    """Also true for one that is built into the kernel."""
    return Path(f"/sys/module/{name}").exists()


def module_exists(name: str) -> bool:
    """Whether it is loaded or can be."""
    if module_loaded(name):
        return True
    modprobe = shutil.which("modprobe")
    return modprobe is not None and not subprocess.run([modprobe, "-n", "-q", name]).returncode


def block(device: str) -> Path:
    """The disk's directory in sysfs."""
    return Path("/sys/block") / Path(device).name


def write(path: Path, text: str) -> None:
    """Into a file of sysfs or configfs."""
    try:
        path.write_text(text)
    except OSError as error:
        raise BenchError(f"{path} does not take {text!r}: {error.strerror}") from None


def without_scheduler(device: str) -> None:
    """All disks get the same scheduler, none: an elevator would hide what the servers cost."""
    scheduler = block(device) / "queue" / "scheduler"
    # a disk without queues, as brd is, has none to choose
    if scheduler.exists() and scheduler.read_text().split() != ["none"]:
        write(scheduler, "none")
        if "[none]" not in scheduler.read_text():
            raise BenchError(f"{device} keeps its scheduler: {scheduler.read_text().strip()}")


def one_group() -> None:
    """No autogroups: what is a session of its own, as daemons are, would be a group to the scheduler, and every
    change to it and back dearer than to servers in fio's session and to the kernel's threads, which have none.
    """
    write(Path("/proc/sys/kernel/sched_autogroup_enabled"), "0")


def drop_caches() -> None:
    """Clean pages, dentries and inodes of the whole machine."""
    os.sync()
    write(Path("/proc/sys/vm/drop_caches"), "3")


@contextlib.contextmanager
def clock_kept(instructions: bool) -> Iterator[None]:
    """Where the clock counts instructions, an idle CPU lets hours pass at once (while the host reads a file,
    say), and with them everybody's time limits: keep it busy with what yields to all else. Not for measuring.
    """
    if not instructions:
        yield
        return
    with subprocess.Popen(["sh", "-c", "while :; do :; done"]) as idler:
        try:
            os.sched_setscheduler(idler.pid, os.SCHED_IDLE, os.sched_param(0))
            yield
        finally:
            idler.kill()


class Lab:
    """Where subjects are set up: a directory, modules, disks. Leaving it undoes everything, last first."""

    def __init__(self, span: int, instructions: bool = False, images: int = 1) -> None:
        self.span = span  # bytes of each disk that are used
        self._images = images  # backing files at most
        self._instructions = instructions
        self._undo = contextlib.ExitStack()
        self._left: list[str] = []
        self._has_brd = False

    def __enter__(self) -> Lab:
        self.directory = Path(tempfile.mkdtemp(prefix="ublkd-bench-", dir="/run"))
        self.later(shutil.rmtree, self.directory)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with clock_kept(self._instructions):
            self._undo.close()
        if not self._left:
            return
        if kind is None:
            raise BenchError(f"something is left behind: {'; '.join(self._left)}")
        for line in self._left:
            say(f"something is left behind: {line}")

    def later(self, undo: Callable[..., object], *arguments: object) -> None:
        """Call undo at the end. If it fails, the rest is undone all the same."""
        self._undo.callback(self._try, undo, *arguments)

    def _try(self, undo: Callable[..., object], *arguments: object) -> None:
        try:
            undo(*arguments)
        except (BenchError, OSError) as error:
            self._left.append(str(error))

    def module(self, name: str, *parameters: str) -> None:
        """Load it for as long as the lab is open, unless it is there already."""
        if not module_loaded(name):
            run("modprobe", name, *parameters)
            self.later(_unload, name)

    def ram_disk(self, number: int) -> str:
        """Device 0 or 1 of brd, as large as the lab needs."""
        if not self._has_brd:
            if module_loaded("brd"):
                raise BenchError("brd is in use: rmmod brd, or choose --targets that need none")
            size = self._images * (self.span + self.span // 32) + 64 * MIB  # with what ext4 needs
            self.module("brd", "rd_nr=2", f"rd_size={size // 1024}", "max_part=0")
            self._has_brd = True
        return f"/dev/ram{number}"

    def backing_file(self, name: str) -> Path:
        """A file on ext4 on brd, written with direct I/O: on tmpfs a loop device would be another thing."""
        mounted = self.directory / "ext4"
        if not mounted.exists():
            disk = self.ram_disk(1)
            run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", disk)
            mounted.mkdir()
            run("mount", "-t", "ext4", disk, mounted)
            self.later(run, "umount", mounted)
        path = mounted / name
        self.fill(path)
        return path

    def fill(self, path: str | Path) -> None:
        """Write all of a disk or file once, so that no cell measures a first touch."""
        count = f"count={self.span // MIB}"
        run("dd", "if=/dev/zero", f"of={path}", "bs=1M", count, "oflag=direct", "status=none")


def _unload(name: str) -> None:
    deadline = time.monotonic() + GONE_S
    while True:
        try:
            run("rmmod", name)
            return
        except BenchError:
            # udev may still look at a disk of it
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
