# SPDX-License-Identifier: Apache-2.0
"""Which CPU serves which queue."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ublkd.units import parse_cpus

SYS_CPU = "/sys/devices/system/cpu"


class Cpu(NamedTuple):
    """Where a CPU sits. core is the set of its SMT siblings, itself included."""

    number: int
    core: frozenset[int]
    node: int


def _cpu_list(path: str, default: Iterable[int]) -> frozenset[int]:
    try:
        with open(path) as f:
            return frozenset(parse_cpus(f.read().strip()))
    except (OSError, ValueError):
        return frozenset(default)


def topology(allowed: Iterable[int] | None = None) -> dict[int, Cpu]:
    """The CPUs this process may run on; where sysfs has nothing, each is a core of its own on node 0."""
    found = {}
    for number in sorted(os.sched_getaffinity(0) if allowed is None else allowed):
        base = f"{SYS_CPU}/cpu{number}"
        core = _cpu_list(f"{base}/topology/core_cpus_list", [number])
        node = 0
        try:
            node = min(int(e[4:]) for e in os.listdir(base) if e.startswith("node") and e[4:].isdigit())
        except (OSError, ValueError):
            pass
        found[number] = Cpu(number, core, node)
    return found


def _pinned(masks: Sequence[set[int]], cpus: Sequence[int]) -> list[int]:
    """A CPU of the user's list for each worker: its own place in the list if the queue's mask allows, else another
    of the list that the mask has, else its own place all the same. A list shorter than the workers is gone through
    again."""
    chosen: list[int] = []
    free: list[int] = []
    for q, mask in enumerate(masks):
        if not free:
            free = list(cpus)
        own = cpus[q % len(cpus)]
        inside = [c for c in free if c in mask]
        pick = own if own in inside else inside[0] if inside else own if own in free else free[0]
        free.remove(pick)
        chosen.append(pick)
    return chosen


def place(masks: Sequence[set[int]], cpus: Sequence[int] | None, topo: dict[int, Cpu]) -> list[int]:
    """The CPU of each worker.

    masks: per worker, the CPUs that submit to it (blk-mq's map); cpus: the user's list, or None to choose by
    the masks and the topology: the least loaded core first, SMT siblings only when the cores are used up,
    staying on the NUMA nodes already in use, lowest number first. The same input gives the same answer.
    """
    if cpus:
        return _pinned(masks, cpus)
    load: dict[int, int] = dict.fromkeys(topo, 0)
    nodes: set[int] = set()
    chosen = []
    for mask in masks:
        candidates = [topo[c] for c in sorted(mask) if c in topo] or list(topo.values())

        def cost(cpu: Cpu) -> tuple[int, int, bool, int]:
            on_core = sum(load.get(sibling, 0) for sibling in cpu.core)
            return load[cpu.number], on_core, bool(nodes) and cpu.node not in nodes, cpu.number

        best = min(candidates, key=cost)
        load[best.number] += 1
        nodes.add(best.node)
        chosen.append(best.number)
    return chosen


def remark(asked: int, got: int, chosen: Sequence[int]) -> str:
    """What a user should know of the outcome, in a line; empty if all is as asked."""
    parts = []
    if got != asked:
        parts.append(f"{asked} queues were asked for, the driver made {got}")
    used = len(set(chosen))
    if used < len(chosen):
        what = "queues" if len(chosen) == got else "workers"
        parts.append(f"{len(chosen)} {what} share {used} CPU{'s' if used > 1 else ''}: some workers have to take turns")
    return "; ".join(parts)
