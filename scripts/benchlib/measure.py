# SPDX-License-Identifier: Apache-2.0
"""The measurement itself, as root on the running kernel: rounds over all subjects; servers' memory."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from typing import Any

from . import fio, processes
from .subjects import SUBJECTS, Subject, Ublkd, add_device, ublkd
from .system import BenchError, Lab, clock_kept, drop_caches, run, say, without_scheduler

FORMAT = 1
WORKERS = (1, 4)


def choose(names: list[str]) -> tuple[dict[str, Subject], dict[str, str]]:
    """The subjects to measure (the named ones and what they are compared with), and why not others."""
    wanted = {other for name in names for other in (name, *SUBJECTS[name].against)} or set(SUBJECTS)
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
    names: list[str], repeats: int, milliseconds: int, span: int, instructions: bool
) -> dict[str, Any]:
    """All samples and what is to know about them, as it goes to the JSON file. names empty: all subjects.

    instructions: the clock counts those.
    """
    _need_root()
    with clock_kept(instructions):
        subjects, skipped = choose(names)
        versions = _versions()
    result: dict[str, Any] = {
        "format": FORMAT,
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "versions": versions,
        "span": span,
        "milliseconds": milliseconds,
        "repeats": repeats,
        "cells": [cell._asdict() for cell in fio.CELLS],
        "subjects": {name: {"title": s.title, "against": s.against} for name, s in subjects.items()},
        "skipped": skipped,
        "memory": [],
    }
    with Lab(span, instructions) as lab:
        with clock_kept(instructions):
            devices = {name: _set_up(subject, lab) for name, subject in subjects.items()}
            run("udevadm", "settle")
        for device in devices.values():
            without_scheduler(device)
        result["samples"] = _rounds(subjects, devices, lab, repeats, milliseconds)
        for name, subject in subjects.items():
            if isinstance(subject, Ublkd):
                result["subjects"][name]["transport"] = subject.shown["transport"]
                result["memory"].append(_memory(name, subject.shown, "after the run"))
    return result


def fresh_memory(span: int) -> list[dict[str, Any]]:
    """What a device's processes take before any I/O. Another one of ublkd would share with them."""
    _need_root()
    found = []
    for workers in WORKERS:
        with Lab(span) as lab:
            shown = add_device(lab, "null", "--size", str(span), "--queues", str(workers))
            if shown["queues"] == workers:
                found.append(_memory("null", shown, "fresh"))
            else:
                say(f"not enough CPUs for the memory of {workers} workers")
    return found


def _need_root() -> None:
    if os.geteuid() != 0:
        raise BenchError("devices are made by root: run it as root")


def _versions() -> dict[str, str]:
    versions = {
        "ublkd": run(ublkd(), "--version").split()[-1],
        "python": platform.python_version(),
        "fio": run("fio", "--version").strip().removeprefix("fio-"),
    }
    with suppress(BenchError):
        versions["nbdkit"] = run("nbdkit", "--version").split()[-1]
    return versions


def _set_up(subject: Subject, lab: Lab) -> str:
    say(f"setting up {subject.name}")
    try:
        device = subject.setup(lab)
        if subject.stores:
            lab.fill(device)
    except BenchError as error:
        raise BenchError(f"{subject.name}: {error}") from None
    return device


def _rounds(
    subjects: dict[str, Subject], devices: dict[str, str], lab: Lab, repeats: int, milliseconds: int
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """samples[subject][cell]: one per repeat. Subjects take turns, and each round begins with another one."""
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {
        name: {cell.key: [] for cell in fio.CELLS} for name in subjects
    }
    names = list(subjects)
    for number in range(repeats):
        first = number * len(names) // repeats
        for name in names[first:] + names[:first]:
            say(f"round {number + 1} of {repeats}: {name}")
            drop_caches()
            taken = fio.measure(devices[name], lab.span, milliseconds, subjects[name].pids(), lab.directory)
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
