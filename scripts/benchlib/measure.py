# SPDX-License-Identifier: Apache-2.0
"""The measurement itself, as root on the running kernel: rounds over all subjects; servers' memory."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from . import fio, processes
from .subjects import SUBJECTS, Subject, Ublkd, add_device, expand, ublkd
from .system import BenchError, Lab, Progress, clock_kept, run, say, without_scheduler

FORMAT = 2
WORKERS = (1, 4)


def choose(names: list[str]) -> tuple[dict[str, Subject], dict[str, str]]:
    """The subjects to measure (the named ones and what they are compared with), and why not others."""
    wanted = {other for name in names for word in (name, *SUBJECTS[name].against) for other in expand(word)}
    wanted = wanted or set(SUBJECTS)
    chosen, skipped = {}, {}
    for name, kind in SUBJECTS.items():
        if name not in wanted:
            continue
        subject = kind()
        reason = subject.missing()
        if not reason:
            chosen[name] = subject
        elif name in names or isinstance(subject, Ublkd):
            raise BenchError(f"{name} can't be measured: {reason}")
        else:
            say(f"without {name}: {reason}")
            skipped[name] = reason
    return chosen, skipped


def measure(
    names: list[str],
    cells: tuple[fio.Cell, ...],
    repeats: int,
    milliseconds: int,
    span: int,
    instructions: bool,
    late: Callable[[], bool],
) -> dict[str, Any]:
    """All samples and what is to know about them, as it goes to the JSON file. names empty: all subjects.

    instructions: the clock counts those. late: whether to begin no more rounds.
    """
    need_root()
    with clock_kept(instructions):
        subjects, skipped = choose(names)
    result: dict[str, Any] = {
        "cpus": os.cpu_count(),
        "cells": [cell._asdict() for cell in cells],
        "skipped": skipped,
        "memory": [],
    }
    with Lab(span, instructions, images=len(subjects)) as lab:
        with clock_kept(instructions):
            devices = {}
            for name, subject in list(subjects.items()):
                try:
                    devices[name] = _set_up(subject, lab)
                except BenchError as error:
                    _drop(subject, error, name in names)
                    skipped[name] = f"its set-up failed: {_why(subject, error)}"
                    del subjects[name]
            run("udevadm", "settle")
        for device in devices.values():
            without_scheduler(device)
        samples = _rounds(subjects, devices, lab, cells, repeats, milliseconds, names, skipped, late)
        result["samples"] = samples
        result["rounds"] = min(len(taken) for by_cell in samples.values() for taken in by_cell.values())
        result["subjects"] = {name: {"title": s.title, "against": s.against} for name, s in subjects.items()}
        for name, subject in subjects.items():
            if isinstance(subject, Ublkd):
                result["subjects"][name]["transport"] = subject.shown["transport"]
                result["memory"].append(_memory(name, subject.shown, "after the run"))
    return result


def fresh_memory(span: int) -> list[dict[str, Any]]:
    """What a device's processes take before any I/O. Another one of ublkd would share with them."""
    need_root()
    found = []
    for workers in WORKERS:
        with Lab(span) as lab:
            shown = add_device(lab, "null", "--size", str(span), "--queues", str(workers))
            if shown["queues"] == workers:
                found.append(_memory("null", shown, "fresh"))
            else:
                say(f"not enough CPUs for the memory of {workers} workers")
    return found


def need_root() -> None:
    if os.geteuid() != 0:
        raise BenchError("devices are made by root: run it as root")


def facts() -> dict[str, Any]:
    """What is the same for all parts of a measurement."""
    return {"format": FORMAT, "kernel": platform.release(), "versions": _versions()}


def _versions() -> dict[str, str]:
    versions = {
        "ublkd": run(ublkd(), "--version").split()[-1],
        "python": platform.python_version(),
        "fio": run("fio", "--version").strip().removeprefix("fio-"),
    }
    with suppress(BenchError):
        versions["nbdkit"] = run("nbdkit", "--version").split()[-1]
    with suppress(BenchError):
        versions["qemu-nbd"] = run("qemu-nbd", "--version").split()[1]
    return versions


def _set_up(subject: Subject, lab: Lab) -> str:
    say(f"setting up {subject.name}")
    device = subject.setup(lab)
    if subject.stores:
        lab.fill(device)
    return device


def _why(subject: Subject, error: BenchError) -> str:
    words = subject.last_words()
    return f"{error}; {words}" if words else str(error)


def _drop(subject: Subject, error: BenchError, named: bool) -> None:
    """A peer that fails is left out; BenchError if it was asked for, or is ours."""
    if named or isinstance(subject, Ublkd):
        raise BenchError(f"{subject.name}: {_why(subject, error)}") from None
    say(f"without {subject.name}: {_why(subject, error)}")


def _rounds(
    subjects: dict[str, Subject],
    devices: dict[str, str],
    lab: Lab,
    cells: tuple[fio.Cell, ...],
    repeats: int,
    milliseconds: int,
    named: list[str],
    skipped: dict[str, str],
    late: Callable[[], bool],
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """samples[subject][cell]: one per repeat. Subjects take turns, and each round begins with another one.

    A peer that fails leaves subjects for skipped, with the reason.
    """
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {name: {cell.key: [] for cell in cells} for name in subjects}
    names = list(subjects)
    progress = Progress("turn", repeats * len(names))
    for number in range(repeats):
        if number and late():
            say(f"no time for more than {number} of {repeats} rounds")
            break
        first = number * len(names) // repeats
        for name in names[first:] + names[:first]:
            progress.next(f"{name}, round {number + 1}")
            subject = subjects.get(name)
            if not subject:
                continue
            subject.reset_page_cache()
            try:
                taken = fio.measure(devices[name], lab.span, milliseconds, subject.pids(), lab.directory, cells)
            except BenchError as error:
                _drop(subject, error, name in named)
                skipped[name] = f"it failed in round {number + 1}: {_why(subject, error)}"
                del subjects[name], samples[name]
                continue
            for key, sample in taken.items():
                samples[name][key].append(sample)
    return samples


def _memory(name: str, shown: dict[str, Any], when: str) -> dict[str, Any]:
    return {
        "when": when,
        "subject": name,
        "supervisor": processes.memory(shown["supervisor"]),
        "workers": [processes.memory(worker["pid"]) for worker in shown["workers"]],
    }
