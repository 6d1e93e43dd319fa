# SPDX-License-Identifier: Apache-2.0
"""What should change on a disk and why, what is left alone and why, and what only its owner can change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import workers
from .disk import Disk

WORKERS = "workers"
# Where reasons come from.
MEASURED = "measured: docs/tuning.md"
ASKED = "asked for by --set"
DRIVER = "drivers/block/ublk_drv.c"

# What each is for. They differ where the measurements were a matter of taste: see _read_ahead() and _iostats().
PROFILES = ("balanced", "latency", "throughput")
_FAULT_KIB = 32
_FEW_TAGS = 32


@dataclass(frozen=True)
class Change:
    """One setting: to a reader, so all text."""

    key: str
    old: str
    new: str
    why: str
    source: str


@dataclass(frozen=True)
class Remark:
    """A setting that is not changed: left alone, or for the owner to change."""

    key: str
    value: str
    why: str
    source: str


@dataclass
class Plan:
    """What there is to do, and what there is not."""

    changes: list[Change] = field(default_factory=list)
    advice: list[Remark] = field(default_factory=list)
    left: list[Remark] = field(default_factory=list)
    cpus: list[int] | None = None  # where the workers go, if that is one of the changes

    def attributes(self) -> dict[str, str]:
        """What to write, by attribute."""
        return {change.key: change.new for change in self.changes if change.key != WORKERS}


def plan(disk: Disk, profile: str, asked: Mapping[str, str], move_workers: bool) -> Plan:
    """The plan for a disk. asked: attributes that are to have these values whatever the rules say."""
    found = Plan()
    wanted = _ublk_rules(disk, profile) if disk.ublk_id is not None else _other_rules()
    for rule in wanted:
        if rule.key in asked:
            continue
        if isinstance(rule, Remark):
            found.left.append(rule)
        elif rule.old != rule.new:
            found.changes.append(rule)
    now = disk.snapshot()
    for key, value in asked.items():
        if now.get(key) != value:
            found.changes.append(Change(key, now.get(key, "unreadable"), value, "your choice", ASKED))
    if disk.by_ublkd:
        _place_workers(disk, found, move_workers)
        found.advice += _advice(disk)
    elif move_workers:
        workers.check_movable(disk)
    return found


def _other_rules() -> Iterator[Change | Remark]:
    """A disk that no ublk server serves: nothing of what was measured is about it."""
    yield Remark("all of it", "-", "not a ublk disk: what was measured says nothing about it", MEASURED)


def _ublk_rules(disk: Disk, profile: str) -> Iterator[Change | Remark]:
    now = disk.snapshot()
    if "scheduler" in now:
        yield _scheduler(disk, now["scheduler"])
    if "wbt_lat_usec" in now:
        why = "off gains nothing clear: neither writes through the page cache nor reads beside them"
        yield Remark("wbt_lat_usec", now["wbt_lat_usec"], why, MEASURED)
    if "nr_requests" in now:
        yield _requests(disk, now["nr_requests"], now.get("scheduler"))
    most = disk.number("max_hw_sectors_kb")
    if "max_sectors_kb" in now and most is not None:
        why = "the server takes requests of this size, and split into smaller ones they cost more"
        if int(now["max_sectors_kb"]) < most:
            yield Change("max_sectors_kb", now["max_sectors_kb"], str(most), why, _said(disk, "max_io_size"))
        else:
            yield Remark(
                "max_sectors_kb", now["max_sectors_kb"], "already all that the server takes", "max_hw_sectors_kb"
            )
    if "read_ahead_kb" in now:
        yield _read_ahead(now["read_ahead_kb"], profile)
    if "nomerges" in now:
        why = "without merges buffered writes are half as fast, and nothing else is faster"
        off = now["nomerges"] == "0"
        yield Remark("nomerges", "0", why, MEASURED) if off else Change("nomerges", now["nomerges"], "0", why, MEASURED)
    if "rq_affinity" in now:
        why = "the driver ends requests on the worker's CPU and never asks for it"
        yield Remark("rq_affinity", now["rq_affinity"], why, DRIVER)
    if "iostats" in now:
        yield _iostats(now["iostats"], profile)
    yield Remark("huge pages", "-", "an emulated CPU has no TLB that could show a gain, so nothing is known", MEASURED)


def _said(disk: Disk, setting: str) -> str:
    return f"its setting {setting}" if setting in disk.settings else f"{setting} of its server"


def _scheduler(disk: Disk, now: str) -> Change | Remark:
    if disk.settings.get("scheduler") == "keep":
        return Remark("scheduler", now, "the device's settings say scheduler = keep", "its setting scheduler")
    if "none" not in disk.choices():
        return Remark("scheduler", now, "the disk offers no `none`", "queue/scheduler")
    why = "an elevator sends single requests through kblockd: 4k reads take 1.2 to 1.8 times as long"
    if now == "none":
        return Remark("scheduler", now, f"{why} with mq-deadline", MEASURED)
    if disk.settings.get("scheduler") == "none":
        why += "; ublkd set none at the start, so look for who changed it (a udev rule?)"
    return Change("scheduler", now, "none", why, MEASURED)


def _requests(disk: Disk, now: str, scheduler: str | None) -> Change | Remark:
    depth = disk.shown.get("depth")
    if not isinstance(depth, int) or scheduler != "none":
        return Remark("nr_requests", now, "with an elevator the kernel sets it by the depth", "queue/scheduler")
    if int(now) >= depth:
        return Remark("nr_requests", now, "already the depth of the queues", _said(disk, "depth"))
    why = "the server has room for this many per queue; with 8 of them depth 32 had 0.75 to 0.86 of the rate"
    return Change("nr_requests", now, str(depth), why, _said(disk, "depth"))


def _read_ahead(now: str, profile: str) -> Change | Remark:
    if profile == "latency" and int(now) > _FAULT_KIB:
        why = (
            "page faults at random on mapped files, which read this much around: 1.3 to 1.7 times as many; streams lose"
        )
        return Change("read_ahead_kb", now, str(_FAULT_KIB), why, MEASURED)
    why = "512 gives streams through the page cache -4 to +7 %, and page faults at random a tenth of the rate"
    return Remark("read_ahead_kb", now, why, MEASURED)


def _iostats(now: str, profile: str) -> Change | Remark:
    if profile == "throughput" and now != "0":
        why = "1 to 2 % at depth 32; iostat sees nothing then, `ublkd stat` all the same"
        return Change("iostats", now, "0", why, MEASURED)
    return Remark("iostats", now, "off gains 1 to 2 % at depth 32, and iostat sees nothing: see --profile", MEASURED)


def _place_workers(disk: Disk, found: Plan, move_workers: bool) -> None:
    now = disk.placed()
    if now is None:
        return
    setting = workers.setting(disk)
    said = f"--cpus {workers.shown(setting)}" if setting else "chosen by ublkd"
    better = workers.better(now, disk.masks(), disk.topology())
    if better is None:
        found.left.append(Remark(WORKERS, workers.shown(now), f"no better placement ({said})", "blk-mq and topology"))
        return
    proposed, why = better
    if move_workers:
        workers.check_movable(disk)
        found.cpus = proposed
        change = Change(WORKERS, workers.shown(now), workers.shown(proposed), why, "blk-mq and topology")
        found.changes.append(change)
        return
    how = f"{why}; better {workers.shown(proposed)}: --workers does it, by an upgrade, which is a pause for its users"
    found.advice.append(Remark(WORKERS, f"{workers.shown(now)} ({said})", how, "blk-mq and topology"))


def _advice(disk: Disk) -> Iterator[Remark]:
    shown: dict[str, Any] = disk.shown
    queues, depth, cpus = shown.get("queues"), shown.get("depth"), len(disk.topology())
    if isinstance(queues, int) and queues < cpus:
        why = f"one process serves a queue, on one CPU, and there are {cpus}: --queues at its creation"
        if shown.get("target") == "python":
            why += ", for a class that says `multiprocess`"
        yield Remark("queues", str(queues), why, "docs/architecture.md")
    shares = disk.settings.get("workers_per_queue")
    if isinstance(shares, int) and shares > 1 and shown.get("target") != "python":
        why = "pays where the worker takes most of the time; with a worker more, a memory disk had 0.40 of its 4k reads"
        yield Remark("workers_per_queue", str(shares), why, "docs/benchmarks/workers-per-queue.md")
    if isinstance(depth, int) and depth < _FEW_TAGS:
        why = "more requests than this wait outside: --depth at its creation, 128 unless said otherwise"
        yield Remark("depth", str(depth), why, _said(disk, "depth"))
    governors = {cpu: disk.governor(cpu) for cpu in disk.placed() or []}
    for cpu, governor in governors.items():
        if governor not in (None, "performance"):
            why = f"CPU {cpu} serves a queue and slows down between requests; a setting of the whole machine: cpupower"
            yield Remark("governor", str(governor), why, "cpufreq")
            break
    if disk.by_ublkd and disk.autogroups():
        why = (
            "on one CPU applications and workers change places as groups: 4k reads at depth 1 are 1.10 to 1.13 "
            "without; a setting of the whole machine: sysctl kernel.sched_autogroup_enabled=0"
        )
        yield Remark("autogroups", "on", why, "docs/benchmarks/batch-7.2.12.md")
