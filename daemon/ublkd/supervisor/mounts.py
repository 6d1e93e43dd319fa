# SPDX-License-Identifier: Apache-2.0
"""Who uses a disk: mounts of this process's namespace, and processes."""

from __future__ import annotations

import os
import re
import stat


def disk_and_partitions(dev_id: int) -> list[str]:
    """Kernel names, the disk's first; empty if there is no such disk."""
    disk = f"ublkb{dev_id}"
    try:
        return [disk] + [entry for entry in os.listdir(f"/sys/block/{disk}") if entry.startswith(disk)]
    except FileNotFoundError:
        return []


def _numbers(names: list[str]) -> set[str]:
    """ "major:minor" of these disks and partitions."""
    numbers = set()
    for name in names:
        try:
            with open(f"/sys/class/block/{name}/dev") as f:
                numbers.add(f.read().strip())
        except OSError:
            continue
    return numbers


def openers(dev_id: int) -> list[tuple[int, str]]:
    """Other processes, (pid, name), that have the disk or a partition open, as far as this one may look."""
    numbers = _numbers(disk_and_partitions(dev_id))
    pids = [name for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()] if numbers else []
    return [(int(pid), _name_of(pid)) for pid in pids if _has_open(pid, numbers)]


def _has_open(pid: str, numbers: set[str]) -> bool:
    try:
        fds = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    for fd in fds:
        path = f"/proc/{pid}/fd/{fd}"
        try:
            # Only what looks like a device is asked: a stat can hang on a network file system.
            if os.readlink(path).startswith("/dev/"):
                st = os.stat(path)
                if stat.S_ISBLK(st.st_mode) and f"{os.major(st.st_rdev)}:{os.minor(st.st_rdev)}" in numbers:
                    return True
        except OSError:
            continue
    return False


def _name_of(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm") as f:
            return f.read().strip()
    except OSError:
        return "gone"


def mount_points(dev_id: int) -> list[str]:
    """Where the disk or a partition of it is mounted, the newest first."""
    names = disk_and_partitions(dev_id)
    numbers = _numbers(names)
    found = []
    with open("/proc/self/mountinfo", errors="surrogateescape") as f:
        for line in f:
            fields = line.split()
            source = fields[fields.index("-") + 2]  # some file systems have numbers of their own: btrfs
            if fields[2] in numbers or source in {f"/dev/{name}" for name in names}:
                found.append(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4]))
    return found[::-1]
