# SPDX-License-Identifier: Apache-2.0
"""The cells of the benchmark, and fio that fills them: one process per disk and round, a job per cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from . import processes
from .system import BenchError, run

WARM_UP = "warm-up"
# of a clock that may stand for hours in a second, see system.clock_kept()
FIO_S = 1e6


class Cell(NamedTuple):
    """One workload."""

    key: str
    title: str
    rw: str
    size: str
    depth: int
    extra: tuple[str, ...] = ()  # more lines for fio's job

    @property
    def writes(self) -> bool:
        """Whether the disk's contents change."""
        return self.rw not in ("read", "randread")


CELLS = (
    Cell("read-4k-1", "4k read, depth 1", "randread", "4k", 1),
    Cell("read-4k-32", "4k read, depth 32", "randread", "4k", 32),
    Cell("read-4k-128", "4k read, depth 128", "randread", "4k", 128),
    Cell("read-128k-8", "128k read, depth 8", "read", "128k", 8),
    Cell("read-1m-4", "1M read, depth 4", "read", "1m", 4),
    Cell("write-4k-1", "4k write, depth 1", "randwrite", "4k", 1),
    Cell("write-4k-32", "4k write, depth 32", "randwrite", "4k", 32),
    Cell("write-4k-128", "4k write, depth 128", "randwrite", "4k", 128),
    Cell("write-128k-8", "128k write, depth 8", "write", "128k", 8),
    Cell("write-1m-4", "1M write, depth 4", "write", "1m", 4),
    Cell("mixed-4k-32", "4k mixed, depth 32", "randrw", "4k", 32, ("rwmixread=70", "unified_rw_reporting=1")),
)
_KEYS = ("read-4k-1", "read-4k-32", "write-4k-32", "read-128k-8", "write-128k-8")
FEW = tuple(cell for key in _KEYS for cell in CELLS if cell.key == key)


def job_file(
    device: str,
    span: int,
    milliseconds: int,
    pids: list[int],
    cells: tuple[Cell, ...] = CELLS,
    cpus: list[int] | None = None,
    warm_up: bool = True,
) -> str:
    """fio's instructions. Servers' CPU time around each job goes to KEY.prerun.txt and KEY.postrun.txt.

    cpus: a job on each of them.
    """
    lines = [
        "[global]",
        f"filename={device}",
        f"size={span}",
        "ioengine=io_uring",
        "direct=1",
        "thread=1",
        "time_based=1",
        "norandommap=1",
        "randrepeat=1",
        "stonewall",
    ]
    if cpus:
        lines += [f"numjobs={len(cpus)}", f"cpus_allowed={','.join(map(str, cpus))}"]
        lines += ["cpus_allowed_policy=split", "group_reporting=1"]
    # the programs' own pages have to come in before anything is counted
    for cell in (cells[0], cells[-1]) if warm_up else ():
        lines += _job(cell._replace(key=WARM_UP), max(milliseconds // 8, 20))
    for cell in cells:
        lines += _job(cell, milliseconds)
        if pids:
            command = processes.cpu_command(pids)
            lines += [f"exec_prerun={command}", f"exec_postrun={command}"]
    return "\n".join(lines) + "\n"


def _job(cell: Cell, milliseconds: int) -> list[str]:
    return [
        f"[{cell.key}]",
        f"rw={cell.rw}",
        f"bs={cell.size}",
        f"iodepth={cell.depth}",
        f"runtime={milliseconds}ms",
        *cell.extra,
    ]


def measure(
    device: str,
    span: int,
    milliseconds: int,
    pids: list[int],
    directory: Path,
    cells: tuple[Cell, ...] = CELLS,
    cpus: list[int] | None = None,
) -> dict[str, dict[str, Any]]:
    """One sample per cell, by its key. directory is for fio's files."""
    jobs, output = directory / "cells.fio", directory / "fio.json"
    jobs.write_text(job_file(device, span, milliseconds, pids, cells, cpus))
    options = ["--output-format=json", f"--output={output}"]
    if not any(cell.writes for cell in cells):
        options.append("--readonly")
    # fio writes the output of its commands to the current directory
    run("env", "-C", directory, "fio", *options, jobs, timeout=FIO_S)
    samples = parse(output.read_text())
    for key, sample in samples.items():
        if pids:
            before, after = ((directory / f"{key}.{when}.txt").read_text() for when in ("prerun", "postrun"))
            sample["server_us"] = processes.cpu_ns(before, after) / 1000 / sample["ios"]
    return samples


def parse(text: str) -> dict[str, dict[str, Any]]:
    """Samples from fio's JSON: iops, bytes_per_s, ios, seconds, latency us at p50, p99 and p99.9."""
    try:
        # warnings may come before it
        jobs = json.loads(text[text.index("{") :])["jobs"]
    except ValueError:
        last = (text.strip().splitlines() or ["nothing"])[-1]
        raise BenchError(f"fio printed no result but: {last}") from None
    samples = {}
    for job in jobs:
        if job["error"]:
            raise BenchError(f"fio: job {job['jobname']} failed with error {job['error']}")
        if job["jobname"] == WARM_UP:
            continue
        sides = [job[side] for side in ("read", "write", "mixed") if side in job]
        side = max(sides, key=lambda side: side["total_ios"])
        if not side["total_ios"]:
            raise BenchError(f"fio: job {job['jobname']} did no I/O: give it more time with --milliseconds")
        latency = side["clat_ns"].get("percentile", {})
        samples[job["jobname"]] = {
            "iops": side["iops"],
            "bytes_per_s": side["bw_bytes"],
            "ios": side["total_ios"],
            "seconds": side["runtime"] / 1000,
            **{name: latency[key] / 1000 for name, key in _PERCENTILES.items() if key in latency},
        }
    return samples


_PERCENTILES = {"p50_us": "50.000000", "p99_us": "99.000000", "p999_us": "99.900000"}
