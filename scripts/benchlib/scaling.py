# SPDX-License-Identifier: Apache-2.0
"""More queues on as many CPUs, a job of fio on each: does an I/O cost the same?

On the instruction clock CPUs take turns, and time passes with the instructions of all of them: what stays the
same there is done in proportion on CPUs that run at once, but for what they wait for each other.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path
from typing import Any

from . import fio
from .subjects import SUBJECTS, Subject, Ublkd
from .system import BenchError, Lab, Progress, block, clock_kept, run, say, without_scheduler

COUNTS = (1, 2, 4)
NAMES = ("null-no-zero", "null_blk", "kublk-null-zc", "memory", "loop", "kernel-loop")
CELLS = tuple(cell for cell in fio.CELLS if cell.key in ("read-4k-32", "write-4k-32"))
SETTLE_S = 0.3  # until all jobs run: each waits for its CPU's turn
FOREVER_S = 10**6


def choose(names: list[str]) -> list[str]:
    """Which of them to measure, when these are asked for (none: all)."""
    return [name for name in NAMES if (not names or name in names) and not SUBJECTS[name]().missing()]


def measure(names: list[str], repeats: int, milliseconds: int, span: int, instructions: bool) -> dict[str, Any]:
    """samples[subject][queues][cell]: I/Os per second, one per repeat."""
    counts = [count for count in COUNTS if count <= (os.cpu_count() or 1)]
    chosen = choose(names)
    samples: dict[str, dict[int, dict[str, list[float]]]] = {
        name: {count: {cell.key: [] for cell in CELLS} for count in counts} for name in chosen
    }
    progress = Progress("queues", len(chosen) * len(counts) * repeats)
    with Lab(span, instructions, images=len(chosen) * len(counts)) as lab:
        disks = []
        with clock_kept(instructions):
            for name in chosen:
                for count in counts:
                    subject = SUBJECTS[name]()
                    subject.queues = count
                    say(f"setting up {name}, {count} queue{'s' * (count > 1)}")
                    device = subject.setup(lab)
                    if subject.stores:
                        lab.fill(device)
                    without_scheduler(device)
                    disks.append((name, count, device, job_cpus(subject, device)))
            run("udevadm", "settle")
        for number in range(repeats):
            first = number * len(disks) // repeats
            for name, count, device, cpus in disks[first:] + disks[:first]:
                progress.next(f"{name}, {count} queue{'s' * (count > 1)}")
                for cell in CELLS:
                    rate = _rate(lab, device, cell, cpus, milliseconds / 1000)
                    samples[name][count][cell.key].append(rate)
    return {"counts": counts, "cells": [cell._asdict() for cell in CELLS], "samples": samples}


def job_cpus(subject: Subject, device: str) -> list[int]:
    """Where the jobs run: on the CPU of each queue's worker, else on the first CPU that submits to each queue."""
    if isinstance(subject, Ublkd):
        cpus = [worker["cpu"] for worker in subject.shown["workers"]]
    else:
        queues = sorted((block(device) / "mq").glob("[0-9]*"), key=lambda path: int(path.name))
        lists = [(queue / "cpu_list").read_text().split(",") for queue in queues[: subject.queues]]
        cpus = [int(words[0]) for words in lists if words[0].strip()]
    if len(set(cpus)) != subject.queues:
        # a disk with one queue however many CPUs there are
        cpus = list(range(subject.queues))
    return cpus


def _rate(lab: Lab, device: str, cell: fio.Cell, cpus: list[int], seconds: float) -> float:
    """I/Os per second while all jobs run, from the disk's own counters."""
    jobs = lab.directory / "queues.fio"
    jobs.write_text(fio.job_file(device, lab.span, FOREVER_S * 1000, [], (cell,), cpus, warm_up=False))
    statistics = block(device) / "stat"
    command = ["fio", "--output=/dev/null", str(jobs)]
    with subprocess.Popen(command, cwd=lab.directory, stdin=subprocess.DEVNULL) as load:
        try:
            start, _ = _done(statistics)
            while _done(statistics)[0] < start + 100 * len(cpus):
                if load.poll() is not None:
                    raise BenchError(f"fio on {device} ended with status {load.returncode}")
                time.sleep(0.01)
            time.sleep(SETTLE_S)
            before, began = _done(statistics)
            time.sleep(seconds)
            after, ended = _done(statistics)
        finally:
            load.terminate()
    return (after - before) / (ended - began)


def _done(statistics: Path) -> tuple[int, float]:
    """I/Os so far, and when that was."""
    while True:
        began = time.monotonic()
        fields = [int(field) for field in statistics.read_text().split()]
        ended = time.monotonic()
        if ended - began < 0.002:  # else another CPU had its turn in between
            return fields[0] + fields[4], (began + ended) / 2
