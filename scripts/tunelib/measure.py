# SPDX-License-Identifier: Apache-2.0
"""fio before and after a plan's changes, in turns; the disk is as it was when it is done."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchlib import fio, report

from ublkd.errors import UblkdError, UsageError

from . import workers
from .apply import apply, reverting, switch
from .disk import Disk
from .rules import Plan

BEFORE, AFTER = "before", "after"
_MIB = 1 << 20
_LEAST = 4 * _MIB
# What is in the page cache is not read again, so once through it at most; and none of fio's own advice.
_CACHED = ("direct=0", "time_based=0", "fadvise_hint=0")
_READ_AHEAD = (
    fio.Cell("stream-128k", "stream through the page cache", "read", "128k", 1, _CACHED),
    fio.Cell("faults-4k", "page faults at random", "randread", "4k", 1, (*_CACHED, "ioengine=mmap")),
)


def cells(plan: Plan, write: bool) -> tuple[fio.Cell, ...]:
    """What to measure: benchlib's, those that write only if asked for, and what read-ahead acts on if it changes."""
    chosen = [cell for cell in fio.FEW if write or not cell.writes]
    if any(change.key == "read_ahead_kb" for change in plan.changes):
        chosen += _READ_AHEAD
    return tuple(chosen)


@contextlib.contextmanager
def exclusive(disk: Disk) -> Iterator[None]:
    """Nobody else mounts the disk or builds on it to the end of the block. UsageError if it is in use already."""
    if users := disk.users():
        raise UsageError(f"{disk.path} is in use: {', '.join(users)}", "--write overwrites what is on it")
    try:
        fd = os.open(disk.path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{disk.path} can't be had for writing: {error.strerror}", "is it mounted or held?") from None
    try:
        yield
    finally:
        os.close(fd)


def measure(
    disk: Disk, plan: Plan, repeats: int, milliseconds: int, write: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Samples by state and cell, with what is to know about them, as report.spread() takes them."""
    span = disk.size() // _MIB * _MIB
    if span < _LEAST:
        raise UblkdError(f"{disk.path} is too small to be measured: {disk.size()} bytes")
    chosen = cells(plan, write)
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {
        state: {cell.key: [] for cell in chosen} for state in (BEFORE, AFTER)
    }
    with contextlib.ExitStack() as stack:
        if write:
            stack.enter_context(exclusive(disk))
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ublkd-tune-")))
        stack.enter_context(reverting(disk))
        before, cpus = disk.snapshot(), workers.setting(disk)
        apply(disk, plan)
        move = plan.cpus is not None
        for number in range(repeats):
            # each is first as often as the other
            for state in (BEFORE, AFTER) if number % 2 == 0 else (AFTER, BEFORE):
                say(f"round {number + 1} of {repeats}: {state}")
                if state == BEFORE:
                    switch(disk, before, move, cpus)
                else:
                    switch(disk, plan.attributes(), move, plan.cpus)
                taken = fio.measure(disk.path, span, milliseconds, [], directory, chosen)
                for key, sample in taken.items():
                    samples[state][key].append(sample)
    return {
        "repeats": repeats,
        "milliseconds": milliseconds,
        "span": span,
        "cells": [{"key": cell.key, "title": cell.title} for cell in chosen],
        "samples": samples,
        "ratios": {cell.key: ratio(samples, cell.key) for cell in chosen},
    }


def ratio(samples: dict[str, dict[str, list[dict[str, Any]]]], cell: str) -> dict[str, float]:
    """I/O per second after by before: of the medians, and the extremes of the rounds."""
    rounds = [
        after["iops"] / before["iops"]
        for before, after in zip(samples[BEFORE][cell], samples[AFTER][cell], strict=True)
    ]
    medians = report.ratio({"samples": samples}, AFTER, BEFORE, cell)
    return {"medians": medians, "low": min(rounds), "high": max(rounds)}


def table(result: dict[str, Any]) -> str:
    """For people."""
    rows = []
    for cell in result["cells"]:
        row = [cell["title"]]
        for state in (BEFORE, AFTER):
            iops = report.spread(result, state, cell["key"], "iops")
            assert iops
            row.append(f"{iops.median:.0f} [{iops.low:.0f}-{iops.high:.0f}]")
        each = result["ratios"][cell["key"]]
        rows.append([*row, f"{each['medians']:.2f} [{each['low']:.2f}-{each['high']:.2f}]"])
    return report.table(["IOPS: median [spread]", BEFORE, AFTER, "ratio [of rounds]"], rows)
