# SPDX-License-Identifier: Apache-2.0
"""Many devices of ublkd: what starting one takes, and the memory of each, as they become more."""

from __future__ import annotations

import resource
import sys
import time
from statistics import median
from typing import Any

from . import processes
from .subjects import DEPTH, TOP, ublkd
from .system import Lab, Progress, clock_kept, run

COUNTS = (1, 10, 50, 200)
SIZE_MIB = 64
_REMOVE_S = 1e6  # see fio.FIO_S


def measure(counts: tuple[int, ...], instructions: bool) -> list[dict[str, Any]]:
    """One entry per count: milliseconds to start one, KiB per supervisor and worker, on average."""
    sys.path.insert(0, str(TOP / "tests"))
    from faults import watch

    found: list[dict[str, Any]] = []
    paths: list[str] = []
    progress = Progress("devices", len(counts))
    # The starts themselves, too: one of many reads a file that none did before, and all time limits would be over.
    with Lab(SIZE_MIB << 20, instructions) as lab, clock_kept(instructions):
        # what the first start reads from disk, and what the last one leaves, is there for all
        run(ublkd(), "del", "--force", _add())
        free = watch.meminfo("MemAvailable")["MemAvailable"]
        lab.later(_remove, paths)
        for count in counts:
            progress.next(f"{count} device{'s' * (count > 1)}")
            before, elapsed, commands = len(paths), [], []
            while len(paths) < count:
                began, used = time.monotonic(), _children_s()
                paths.append(_add())
                elapsed.append(1000 * (time.monotonic() - began))
                commands.append(1000 * (_children_s() - used))
            ids = [int(path.removeprefix("/dev/ublkb")) for path in paths]
            taken = free - watch.meminfo("MemAvailable")["MemAvailable"]
            servers = [sum(map(processes.total_cpu_ns, watch.family(dev_id))) / 1e6 for dev_id in ids[before:]]
            found.append(
                {"devices": count, "start_ms": median(elapsed), "slowest_start_ms": max(elapsed)}
                | {"start_cpu_ms": median(commands) + median(servers), "machine_kib": taken / count}
                | watch.footprint(ids)
            )
    return found


def _add() -> str:
    """The path of one more device."""
    return run(ublkd(), "add", "null", "--size", f"{SIZE_MIB}M", "--depth", str(DEPTH), "--no-partscan").strip()


def _children_s() -> float:
    """CPU time of the commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _remove(paths: list[str]) -> None:
    if paths:
        run(ublkd(), "del", "--force", *paths, timeout=_REMOVE_S)
