# SPDX-License-Identifier: Apache-2.0
"""Turn /dev/kmsg records into text, and find in it what no test may leave behind."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SPLAT = re.compile(
    r"""^(?:WARNING:|(?:\[\ )?BUG[: ]|ODEBUG:(?!\ selftest)|Oops\b)
    |^(?:INFO:\ task\ |INFO:\ lockdep|INFO:\ trying\ to\ register)
    |\bkernel\ BUG\ at\b
    |\bKernel\ panic\b
    |\bblocked\ for\ more\ than\b
    |\b(?:KASAN|UBSAN|KCSAN|KFENCE|KMSAN):
    |\b(?:general\ protection\ fault|unable\ to\ handle)\b
    |\bpossible\ (?:circular|recursive)\ locking\b|\binconsistent\ lock\ state\b|\bsuspicious\ RCU\ usage\b
    |\b(?:soft\ lockup|hard\ LOCKUP)\b|\bself-detected\ stall\b|\bdetected\ (?:expedited\ )?stalls\b
    |\blist_(?:add|del)\ corruption\b|^refcount_t:|\bDEBUG_LOCKS_WARN_ON\b
    |\bWARNING:\ CPU:""",
    re.VERBOSE,
)

# A warning of the kernel's own, and what its trace must have.
_ALLOWED_IN = (
    # 6.12 asserts that the task which made a ring ends the commands in it. Once the ring is closed it gives this work
    # away itself, if the task lives on, and later kernels don't assert it then.
    (re.compile(r" at io_uring/io_uring\.h:\d+ io_get_cqe_overflow"), "Workqueue: iou_exit io_ring_exit_work"),
    # The debug kernel has no buffer heads. It warns of what a disk's cache still has to write when the disk gets
    # smaller, and others drop it: a driver tells of the new size, and the block layer leaves the cache as it is.
    (re.compile(r" at (?:block/fops\.c:\d+ blkdev_map_blocks|fs/iomap/\S+ iomap_writepages)"), " blkdev_writepages"),
)
_TRACE = 35

# 7.2.12 prints this once at the first registered-buffer I/O of a boot: a bound annotation, nothing of ours.
_ALLOWED = re.compile(r"UBSAN: .* in \S*io_uring/rsrc\.c")

# not the RIP of the kernel itself: where it happened is what one wants to know
_REGISTERS = re.compile(r"\] (?:R(?!IP)[A-Z0-9]{2}|RIP: 0033|RSP|CR\d|[CFGD]S|PKRU|DR\d|Code): ?")

_ESCAPE = re.compile(r"\\x([0-9a-f]{2})")

_TIMESTAMP = re.compile(r"^(?:<\d+>)?\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? ?")


def format_record(record: str) -> list[str]:
    """The lines of one /dev/kmsg record as ``dmesg`` prints them; none for its ``KEY=value`` lines."""
    head, found, text = record.partition(";")
    fields = head.split(",")
    if not found or record.startswith(" ") or len(fields) < 3 or not fields[2].isdigit():
        return []
    seconds, micros = divmod(int(fields[2]), 1_000_000)
    text = _ESCAPE.sub(lambda match: chr(int(match[1], 16)), text)
    return [f"[{seconds:5d}.{micros:06d}] {line}" for line in text.split("\n")]


def format_records(raw: str) -> list[str]:
    """All complete records of a /dev/kmsg stream as dmesg lines."""
    complete = raw[: raw.rfind("\n") + 1]
    # not splitlines(): a record may hold characters that it takes for line ends
    return [line for record in complete.split("\n") for line in format_record(record)]


def find_splats(lines: Iterable[str]) -> list[str]:
    """The lines that make a kernel log dirty, without those known to be harmless."""
    lines = list(lines)
    return [lines[number].rstrip() for number in _find(lines)]


def _find(lines: list[str]) -> list[int]:
    hits = (number for number, line in enumerate(lines) if is_splat(line))
    return [number for number in hits if not _allowed(lines[number : number + _TRACE])]


def _allowed(trace: list[str]) -> bool:
    return any(what.search(trace[0]) and any(where in line for line in trace) for what, where in _ALLOWED_IN)


def is_splat(line: str) -> bool:
    """Whether a dmesg line, with or without its time, begins a report of a kernel bug."""
    text = _TIMESTAMP.sub("", line)
    return bool(_SPLAT.search(text)) and not _ALLOWED.search(text)


def excerpt(lines: list[str], after: int = 25) -> list[str]:
    """The first splat with the trace that follows it, then the other splats."""
    hits = _find(lines)
    if not hits:
        return []
    end = hits[0] + after
    return without_registers(lines[hits[0] : end]) + [lines[number] for number in hits if number >= end]


def without_idle_cpus(lines: list[str]) -> list[str]:
    """The answer to SysRq-l without the backtraces of CPUs that had nothing to do."""
    kept: list[str] = []
    section: list[str] = []
    for line in [*lines, "NMI backtrace for cpu"]:
        if "NMI backtrace for cpu" in line:
            kept += [] if any("Comm: swapper/" in text for text in section) else section
            section = []
        section.append(line)
    return kept


def without_registers(lines: list[str]) -> list[str]:
    """A trace without its register dumps, which tell little and fill the screen."""
    return [line for line in lines if not _REGISTERS.search(line)]
