# SPDX-License-Identifier: Apache-2.0
"""What server processes cost: CPU time and memory, from /proc."""

from __future__ import annotations

import re
from pathlib import Path

_THREAD = re.compile(r"^/proc/\d+/task/(\d+)/schedstat:(\d+) ", re.MULTILINE)
_MEMORY = re.compile(r"^(Rss|Pss|Pss_Anon|Pss_File|Pss_Shmem|Private_Dirty): +(\d+) kB$", re.MULTILINE)


def cpu_command(pids: list[int]) -> str:
    """A shell command whose output cpu_ns() reads, for all threads of the processes."""
    return "grep -H . " + " ".join(f"/proc/{pid}/task/*/schedstat" for pid in pids)


def cpu_ns(before: str, after: str) -> int:
    """CPU time that passed between two outputs, ns; threads born in between count from zero."""
    first = {tid: int(ns) for tid, ns in _THREAD.findall(before)}
    return sum(int(ns) - first.get(tid, 0) for tid, ns in _THREAD.findall(after))


def total_cpu_ns(pid: int) -> int:
    """CPU time of a process since it began, ns, but for threads that ended."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads)


def memory(pid: int) -> dict[str, int]:
    """Its share of memory, KiB, by kind."""
    return parse_memory(Path(f"/proc/{pid}/smaps_rollup").read_text())


def parse_memory(text: str) -> dict[str, int]:
    """The fields of smaps_rollup that tell, KiB."""
    return {name.lower(): int(kib) for name, kib in _MEMORY.findall(text)}
