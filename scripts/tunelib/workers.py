# SPDX-License-Identifier: Apache-2.0
"""Where workers run and where they should: on CPUs of their queues' masks, a core each, on few NUMA nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ublkd._version import __version__
from ublkd.errors import UblkdError
from ublkd.supervisor.placement import Cpu, place
from ublkd.units import MAX_CPU, format_cpus

from .disk import Disk


class Defects(NamedTuple):
    """What is wrong with a placement, the worst first. Fewer is better, and tuples compare so."""

    same_cpu: int  # workers that share a CPU with another
    outside: int  # workers on CPUs that don't submit to their queue
    same_core: int  # workers on a core whose SMT sibling has one too
    nodes: int  # NUMA nodes beyond those of the queues' masks


_WHY = {
    "same_cpu": "workers share a CPU and take turns",
    "outside": "a worker's CPU is not one that submits to its queue: each request crosses CPUs",
    "same_core": "workers share a core's hyperthreads while other cores have none",
    "nodes": "a worker is on a NUMA node that does not submit to its queue",
}


def defects(cpus: Sequence[int], masks: Sequence[set[int]], topo: Mapping[int, Cpu]) -> Defects:
    """Of workers on these CPUs, by queue."""
    cores = {cpu: topo[cpu].core if cpu in topo else frozenset([cpu]) for cpu in cpus}
    nodes = {cpu: topo[cpu].node if cpu in topo else -1 for cpu in cpus}
    near = [{topo[cpu].node for cpu in mask if cpu in topo} for mask in masks]
    distinct = set(cpus)
    return Defects(
        same_cpu=len(cpus) - len(distinct),
        outside=sum(cpu not in mask for cpu, mask in zip(cpus, masks, strict=True)),
        same_core=len(distinct) - len({cores[cpu] for cpu in distinct}),
        nodes=sum(nodes[cpu] not in some for cpu, some in zip(cpus, near, strict=True)),
    )


def better(cpus: Sequence[int], masks: Sequence[set[int]], topo: dict[int, Cpu]) -> tuple[list[int], str] | None:
    """A placement with fewer defects, and what is wrong with this one; None if there is none."""
    if not masks or len(cpus) != len(masks) or not topo:
        return None
    proposed = place(masks, None, topo)
    now, then = defects(cpus, masks, topo), defects(proposed, masks, topo)
    if then >= now:
        return None
    worse = next(name for name in Defects._fields if getattr(then, name) < getattr(now, name))
    return proposed, _WHY[worse]


def valid_cpus(value: object) -> bool:
    """A list that can be a `cpus` setting."""
    return isinstance(value, list) and bool(value) and all(type(cpu) is int and 0 <= cpu <= MAX_CPU for cpu in value)


def shown(cpus: Sequence[int] | None) -> str:
    """For people: in the order of the queues."""
    return "automatic" if cpus is None else format_cpus(cpus)


def check_movable(disk: Disk) -> None:
    """UblkdError if an upgrade would do more than move the workers."""
    if disk.ublk_id is None or not disk.by_ublkd:
        raise UblkdError(f"{disk.path} has no workers of ublkd's to move")
    version = disk.shown.get("version")
    if version != __version__:
        raise UblkdError(
            f"{disk.path} is served by ublkd {version}, this is {__version__}: to move its workers would replace it",
            f"use the `ublkd upgrade {disk.ublk_id} --cpus` of that installation",
        )


def move(disk: Disk, cpus: list[int] | None) -> None:
    """Give the device's server this `cpus` setting; its users notice a pause. UblkdError if it goes on as it was."""
    from ublkd import supervisor

    check_movable(disk)
    assert disk.ublk_id is not None
    supervisor.upgrade(disk.ublk_id, {"cpus": cpus})
    disk.ask_ublkd()


def setting(disk: Disk) -> list[int] | None:
    """The `cpus` that its server was given."""
    value: Any = disk.settings.get("cpus")
    return value if valid_cpus(value) else None
