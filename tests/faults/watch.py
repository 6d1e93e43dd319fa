# SPDX-License-Identifier: Apache-2.0
"""A device's processes and counters, read while they die and come back."""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

from ublkd import inventory
from ublkd.shm import layout

_WORD = {name: 8 * place for place, name in enumerate(layout.QUEUE_WORDS)}


class Counters:
    """The counters' segment, also after another supervisor made a new one."""

    def __init__(self, dev_id: int) -> None:
        self._path = f"/dev/shm/{layout.name_of(dev_id)}"
        self._inode = 0
        self._map: mmap.mmap | None = None

    def _mapped(self) -> mmap.mmap | None:
        try:
            inode = os.stat(self._path).st_ino
        except FileNotFoundError:
            return self._map
        if inode != self._inode:
            with open(self._path, "rb") as file:
                if os.fstat(file.fileno()).st_size < layout.segment_bytes(1):
                    return self._map  # its maker is not done
                self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
                self._inode = os.fstat(file.fileno()).st_ino
        return self._map

    def supervisor(self) -> int:
        """Pid of the supervisor that made it, 0 while there is none."""
        seen = self._mapped()
        if seen is None:
            return 0
        pid: int = struct.unpack_from("<Q", seen, layout.SUPERVISOR_PID_OFFSET)[0]
        return pid

    def queues(self) -> list[tuple[int, int]]:
        """(pid, requests completed) of each queue."""
        seen = self._mapped()
        if seen is None:
            return []
        slots = range(layout.HEADER_BYTES, len(seen) - layout.SLOT_BYTES + 1, layout.SLOT_BYTES)
        found = []
        for at in slots:
            pid, done = (struct.unpack_from("<Q", seen, at + _WORD[word])[0] for word in ("pid", "completed"))
            found.append((pid, done))
        return found


class FirstRequest:
    """When the first request was answered by a worker that was not there before."""

    def __init__(self, counters: Counters, old: set[int]) -> None:
        self._counters = counters
        self._old = old
        self._base: dict[tuple[int, int], int] = {}

    def seen(self) -> bool:
        """Whether it was by now."""
        for queue, (pid, done) in enumerate(self._counters.queues()):
            if pid and pid not in self._old and done > self._base.setdefault((queue, pid), done):
                return True
        return False


def tree(dev_id: int, supervisor: int = 0) -> dict[int, str]:
    """Living processes of a device by their titles: pid -> "supervisor" or "q3". Faster if its pid is known."""
    title = f"ublkd-{dev_id}"
    candidates = _family(supervisor) if supervisor else []
    if not candidates:
        candidates = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]
    found = {}
    for pid in candidates:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        name = stat[stat.index("(") + 1 : stat.rindex(")")]
        if name.startswith(title) and stat[stat.rindex(")") + 2] not in "ZX":
            if name == title:
                found[pid] = "supervisor"
            elif name[len(title)] == "/":
                found[pid] = name.partition("/")[2]
    return found


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *map(int, children)] if inventory.alive(pid, None) else []


def pss_kib(pid: int, huge: bool = True) -> int:
    """A process's proportional share of memory, 0 if it is gone.

    huge=False leaves huge pages out: only buffers of tags have any, and how many of those a worker has touched when
    it is looked at is chance, at 2 MiB each.
    """
    sizes = {}
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in ("Pss", "AnonHugePages"):
                sizes[name] = int(rest.split()[0])
    except OSError:
        return 0
    return sizes.get("Pss", 0) - (0 if huge else sizes.get("AnonHugePages", 0))


def open_files(pid: int) -> int:
    """How many descriptors a process has."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def meminfo(*names: str) -> dict[str, int]:
    """Fields of /proc/meminfo in KiB."""
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in names:
            found[name] = int(rest.split()[0])
    return found


def family(dev_id: int) -> dict[int, str]:
    """The pids of a device's processes, and which of the two each is: supervisor or worker."""
    record = inventory.read_record(dev_id)
    assert record is not None
    return {record["supervisor"]["pid"]: "supervisor"} | {w["pid"]: "worker" for w in record["workers"]}


def footprint(ids: list[int]) -> dict[str, float]:
    """What a device costs, on average."""
    pss = {"supervisor": 0, "worker": 0}
    files = {"supervisor": 0, "worker": 0}
    processes = 0
    for dev_id in ids:
        for pid, what in family(dev_id).items():
            processes += 1
            pss[what] += pss_kib(pid)
            files[what] += open_files(pid)
    shm = sum(path.stat().st_blocks * 512 for path in Path("/dev/shm").glob("ublkd-*") if "." not in path.name)
    count = len(ids)
    return {
        "processes": round(processes / count, 2),
        "supervisor_pss_kib": round(pss["supervisor"] / count, 1),
        "workers_pss_kib": round(pss["worker"] / count, 1),
        "supervisor_files": round(files["supervisor"] / count, 2),
        "worker_files": round(files["worker"] / count, 2),
        "counters_kib": round(shm / count / 1024, 1),
    }


def now() -> float:
    """Seconds on the clock that all times here are of."""
    return time.monotonic()
