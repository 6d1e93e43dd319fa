# SPDX-License-Identifier: Apache-2.0
"""Many devices of ublkd: what starting one takes, and the memory of each, as they become more."""

from __future__ import annotations

import sys
import time
from statistics import median
from typing import Any

from .subjects import DEPTH, TOP, ublkd
from .system import Lab, Progress, clock_kept, run

COUNTS = (1, 10, 50, 200)
SIZE_MIB = 64


def measure(counts: tuple[int, ...], instructions: bool) -> list[dict[str, Any]]:
    """One entry per count: milliseconds to start one, KiB per supervisor and worker, on average."""
    sys.path.insert(0, str(TOP / "tests"))
    from faults import watch

    found: list[dict[str, Any]] = []
    paths: list[str] = []
    progress = Progress("devices", len(counts))
    with Lab(SIZE_MIB << 20, instructions) as lab, clock_kept(instructions):
        # what the first start brings into memory stays there for the others
        run(ublkd(), "--version")
        free = watch.meminfo("MemAvailable")["MemAvailable"]
        lab.later(_remove, paths)
        for count in counts:
            progress.next(f"{count} device{'s' * (count > 1)}")
            times = []
            while len(paths) < count:
                began = time.monotonic()
                paths.append(run(ublkd(), "add", "null", "--size", f"{SIZE_MIB}M", "--depth", str(DEPTH)).strip())
                times.append(1000 * (time.monotonic() - began))
            ids = [int(path.removeprefix("/dev/ublkb")) for path in paths]
            taken = free - watch.meminfo("MemAvailable")["MemAvailable"]
            found.append(
                {"devices": count, "start_ms": round(median(times), 1), "slowest_start_ms": round(max(times), 1)}
                | {"machine_kib": round(taken / count)}
                | watch.footprint(ids)
            )
    return found


def _remove(paths: list[str]) -> None:
    if paths:
        run(ublkd(), "del", "--force", *paths, timeout=3600)
