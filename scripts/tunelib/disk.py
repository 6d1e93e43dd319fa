# SPDX-License-Identifier: Apache-2.0
"""A disk's settings in sysfs: found, read, written. Nothing there is trusted to be what it should be."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ublkd import inventory
from ublkd.errors import UblkdError, UsageError
from ublkd.supervisor.placement import Cpu, topology
from ublkd.units import parse_cpus

# Of <disk>/queue, in the order they are written: a new scheduler brings its own wbt_lat_usec and nr_requests, and
# Linux 7.2 sets read_ahead_kb anew with every change of a queue limit, which iostats is one of.
ATTRIBUTES = (
    "scheduler",
    "wbt_lat_usec",
    "nr_requests",
    "max_sectors_kb",
    "nomerges",
    "rq_affinity",
    "iostats",
    "read_ahead_kb",
)
_MOST_BYTES = 4096
_VALUE = re.compile(r"[a-z0-9_-]{1,32}")
_NUMBER = re.compile(r"[0-9]{1,19}")


def valid(attribute: str, value: object) -> bool:
    """Whether it looks like a value of the attribute. Whether the kernel takes it is another matter."""
    form = _VALUE if attribute == "scheduler" else _NUMBER
    return isinstance(value, str) and form.fullmatch(value) is not None


class Disk:
    """One whole disk, and for one of ublkd what the server's record says. root is where sys/ and proc/ are."""

    def __init__(self, name: str, root: Path = Path("/")) -> None:
        self.name = name
        self.path = f"/dev/{name.replace('!', '/')}"
        self._root = root
        self._sys = root / "sys" / "class" / "block" / name
        if not self._sys.is_dir():
            raise UblkdError(f"there is no block device {self.path}", "`ublkd list` and `lsblk` show which there are")
        if (self._sys / "partition").exists():
            whole = self._sys.resolve().parent.name
            raise UsageError(f"{self.path} is a partition", f"settings are those of its disk, /dev/{whole}")
        match = re.fullmatch(r"ublkb([0-9]{1,7})", name)
        self.ublk_id = int(match[1]) if match else None
        self.settings: dict[str, Any] = {}
        self.shown: dict[str, Any] = {}

    def ask_ublkd(self) -> None:
        """Fill in what `ublkd show` shows, and the settings that the server was given."""
        if self.ublk_id is None:
            return
        self.shown = inventory.device(self.ublk_id) or {}
        if self.shown.get("owner") == "ublkd":
            record = inventory.read_record(self.ublk_id) or {}
            settings = record.get("settings")
            self.settings = settings if isinstance(settings, dict) else {}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other scripts/tune off this disk to the end of the block."""
        fd = os.open(self._sys, os.O_RDONLY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                reason = f"another scripts/tune is at work on {self.path}"
                if not isinstance(error, BlockingIOError):
                    reason = f"{self.path} can't be locked: {error.strerror}"
                raise UblkdError(reason) from None
            yield
        finally:
            os.close(fd)

    @property
    def by_ublkd(self) -> bool:
        """A live server of ublkd is behind it."""
        return self.shown.get("owner") == "ublkd" and bool(self.shown.get("served"))

    def check_served(self) -> None:
        """UblkdError for a ublk disk whose server is gone: the kernel takes no setting while requests wait."""
        if self.ublk_id is not None and not self.shown.get("served"):
            raise UblkdError(f"{self.path} is not served", f"`ublkd recover {self.ublk_id}` serves it again")

    def identity(self) -> dict[str, str]:
        """Tells this disk from any other that has had its name: the kernel numbers all disks of a boot."""
        found = {"boot_id": _line(self._root / "proc" / "sys" / "kernel" / "random" / "boot_id")}
        found |= {name: _line(self._sys / name) for name in ("diskseq", "dev")}
        missing = [name for name, value in found.items() if not value]
        if missing:
            raise UblkdError(f"{self.path} can't be told from other disks: the kernel gives no {missing[0]}")
        return {name: str(value) for name, value in found.items()}

    def read(self, attribute: str) -> str | None:
        """Its value; None if the disk has none, or one that makes no sense. Of a choice, what is chosen."""
        text = _line(self._sys / "queue" / attribute)
        if text is not None and "[" in text:
            chosen = re.findall(r"\[([^][\s]*)\]", text)
            text = chosen[0] if len(chosen) == 1 else None
        return text if valid(attribute, text) else None

    def number(self, attribute: str) -> int | None:
        """The same, where it is a number. Any attribute of queue/ will do."""
        text = _line(self._sys / "queue" / attribute)
        return int(text) if text is not None and _NUMBER.fullmatch(text) else None

    def choices(self) -> list[str]:
        """The schedulers that can be had without loading a module."""
        return re.findall(r"[a-z0-9_-]+", _line(self._sys / "queue" / "scheduler") or "")

    def snapshot(self) -> dict[str, str]:
        """All attributes that have a value."""
        values = {attribute: self.read(attribute) for attribute in ATTRIBUTES}
        return {attribute: value for attribute, value in values.items() if value is not None}

    def write(self, attribute: str, value: str) -> None:
        """Set it, and see that it stays. UblkdError with the kernel's reason."""
        try:
            # no O_CREAT: what is not there is not made
            fd = os.open(self._sys / "queue" / attribute, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
        except OSError as error:
            hint = "run as root" if isinstance(error, PermissionError) else ""
            raise UblkdError(f"{self.path}: {attribute} does not take {value}: {error.strerror}", hint) from None
        now = self.read(attribute)
        if now != value:
            raise UblkdError(f"{self.path}: {attribute} does not keep {value}: it is {now or 'unreadable'}")

    def size(self) -> int:
        """In bytes; 0 if that can't be read."""
        text = _line(self._sys / "size")
        return int(text) * 512 if text is not None and _NUMBER.fullmatch(text) else 0

    def masks(self) -> list[set[int]]:
        """The CPUs that submit to each hardware queue, by queue; empty if that can't be read in full."""
        queues = self._sys / "mq"
        try:
            numbers = sorted(int(entry.name) for entry in queues.iterdir() if _NUMBER.fullmatch(entry.name))
            return [set(parse_cpus(_line(queues / str(number) / "cpu_list") or "")) for number in numbers]
        except (OSError, ValueError):
            return []

    def placed(self) -> list[int] | None:
        """The CPU of each queue's worker, by queue; None if that is not known."""
        workers = [(w.get("queue"), w.get("cpu")) for w in self.shown.get("workers", [])]
        if not workers or any(type(number) is not int for worker in workers for number in worker):
            return None
        workers.sort()
        return [cpu for _, cpu in workers] if [q for q, _ in workers] == list(range(len(workers))) else None

    def governor(self, cpu: int) -> str | None:
        """The CPU's frequency governor, where it has one."""
        return _line(self._root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor")

    def autogroups(self) -> bool:
        """Does the scheduler take each session for a group?"""
        return _line(self._root / "proc/sys/kernel/sched_autogroup_enabled") == "1"

    def topology(self) -> dict[int, Cpu]:
        """The CPUs that a server may run on: those of its supervisor, else ours."""
        try:
            return topology(os.sched_getaffinity(self.shown.get("supervisor") or 0))
        except OSError:
            return topology()

    def users(self) -> list[str]:
        """Why it may not be written to: mounts, swap, other disks on it, and processes where ublkd can tell."""
        if self.ublk_id is not None:
            from ublkd.supervisor.lifecycle import users_of

            return users_of(self.ublk_id)
        try:
            return [f"used by /dev/{entry.name}" for entry in (self._sys / "holders").iterdir()]
        except OSError:
            return []


def find(text: str, root: Path = Path("/")) -> Disk:
    """The disk that a number (of ublkd's) or a path means. UsageError, UblkdError."""
    if text.isascii() and text.isdigit():
        if len(text) > 7:
            raise UblkdError(f"there is no ublk device {text[:20]}", "`ublkd list` shows which there are")
        return Disk(f"ublkb{int(text)}", root)
    try:
        path = os.path.realpath(text) if "/" in text else ""
    except (OSError, ValueError):
        path = ""
    name = path.removeprefix("/dev/").replace("/", "!")
    if not path.startswith("/dev/") or not name.isprintable() or name in ("", ".", "..") or len(name) > 64:
        raise UsageError(
            f"{text[:80]!a} is no block device", "give a number N of ublkd's or a path such as /dev/ublkb0"
        )
    return Disk(name, root)


def _line(path: Path) -> str | None:
    """The one line that a file of sysfs or procfs holds; None if it can't be read or is something else."""
    try:
        with open(path, "rb") as file:
            text = file.read(_MOST_BYTES + 1).decode("ascii").strip()
    except (OSError, ValueError):
        return None
    return text if text and len(text) <= _MOST_BYTES and text.isprintable() else None
