# SPDX-License-Identifier: Apache-2.0
"""Which mounts of this process's namespace are on a device."""

from __future__ import annotations

import os
import re


def disk_and_partitions(dev_id: int) -> list[str]:
    """Kernel names, the disk's first; empty if there is no such disk."""
    disk = f"ublkb{dev_id}"
    try:
        return [disk] + [entry for entry in os.listdir(f"/sys/block/{disk}") if entry.startswith(disk)]
    except FileNotFoundError:
        return []


def mount_points(dev_id: int) -> list[str]:
    """Where the disk or a partition of it is mounted, the newest first."""
    names = disk_and_partitions(dev_id)
    numbers = set()
    for name in names:
        try:
            with open(f"/sys/class/block/{name}/dev") as f:
                numbers.add(f.read().strip())
        except OSError:
            continue
    found = []
    with open("/proc/self/mountinfo", errors="surrogateescape") as f:
        for line in f:
            fields = line.split()
            source = fields[fields.index("-") + 2]  # some file systems have numbers of their own: btrfs
            if fields[2] in numbers or source in {f"/dev/{name}" for name in names}:
                found.append(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4]))
    return found[::-1]
