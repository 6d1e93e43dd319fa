# SPDX-License-Identifier: Apache-2.0
"""Power cuts: a VM loses its power at random moments, its disks lose what was not flushed, and then it is looked at.

ublkd and the kernel's loop driver, each with ext4, xfs and the bare device, side by side in one VM; append.py is what
runs in it. And a server that lies about flushes, which must be caught.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vm import accel, kernels, qemu
from vm.boot import Run, Sink
from vm.disks import Disk
from vm.job import Job, guest_environment
from vm.outcome import LOST

from . import volatile
from .subjects import SUBJECTS, disk_bytes

TOP = Path(__file__).resolve().parents[2]
LIAR = "hasty-raw"
LONGEST_LOAD_S = 3.0
EARLY = 0.1  # of the cuts come before the file systems have been checked


@dataclass
class Boot:
    """What one boot said."""

    appending: threading.Event = field(default_factory=threading.Event)
    up: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    found: dict[str, tuple[int, int]] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)
    acked: dict[str, int] = field(default_factory=dict)
    acks: int = 0

    def take(self, line: str) -> None:
        """One line of the guest's."""
        word, _, rest = line.partition(" ")
        if word != "A" and os.environ.get("UBLKD_FAULTS_VERBOSE"):
            print(line, flush=True)
        if word == "A":
            subject, _, number = rest.partition(" ")
            self.acked[subject] = int(number)
            self.acks += 1
            self.appending.set()
        elif word == "UP":
            self.up.set()
        elif word == "FOUND":
            subject, first, last = rest.split()
            self.found[subject] = int(first), int(last)
        elif word == "BAD":
            subject, _, what = rest.partition(" ")
            self.bad.append((subject, what))


class Cuts:
    """A machine and its disks, over many cuts."""

    def __init__(self, names: list[str], seed: int) -> None:
        self.rng = random.Random(seed)
        self.subjects = list(SUBJECTS)
        self.power = volatile.Power()
        self._directory = tempfile.TemporaryDirectory(prefix="ublkd-cut-", dir="/var/tmp")
        place = Path(self._directory.name)
        self.disks, self._servers = {}, []
        for subject in self.subjects:
            disk = volatile.Disk(disk_bytes(subject), self.power, random.Random(self.rng.random()))
            self.disks[subject] = disk
            self._servers.append(volatile.Server(disk, place / subject))
        store = kernels.Store(say=lambda text: print(f"vm: {text}", flush=True))
        self.kernels = [store.get(name) for name in names]
        self._machine = qemu.Machine(
            cpus=2,
            kvm=accel.use_kvm("auto", self.kernels[0]),
            disks=[Disk(self.disks[s].size, nbd=place / s) for s in self.subjects],
        )
        self.acked: dict[str, int] = {}
        self.rounds: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.caught_liar = 0

    def close(self) -> None:
        """Nothing of it is left."""
        for server in self._servers:
            server.close()
        for disk in self.disks.values():
            disk.close()
        self._directory.cleanup()

    def round(self, number: int, may_be_early: bool) -> None:
        """Boot, look at what there is, append, and cut the power."""
        began = time.monotonic()
        boot, direct, early = Boot(), number % 2 == 0, may_be_early and self.rng.random() < EARLY
        # each kernel with and without direct I/O
        kernel = self.kernels[number // 2 % len(self.kernels)]
        words = [*(["--first-time"] if number == 0 else []), *(["--direct"] if direct else [])]
        out_r, out_w = os.pipe()
        job = Job(
            [str(TOP / ".venv/bin/python"), "-B", "-m", "faults.append", *words],
            directory=TOP,
            environment=guest_environment([f"PYTHONPATH={TOP / 'tests'}"]),
            disks=self._machine.disks,
            require_ublk=True,
        )
        run = Run(kernel, self._machine, job, Sink(out_w), 300)
        wait = self.rng.uniform(0.2, LONGEST_LOAD_S)
        reader = threading.Thread(target=_read, args=(out_r, boot), daemon=True)
        cutter = threading.Thread(target=self._cut, args=(run, boot, wait, early), daemon=True)
        self.power.on = True
        reader.start()
        cutter.start()
        outcome = run.execute()
        boot.ended.set()
        boot.up.set()
        boot.appending.set()
        os.close(out_w)
        reader.join()
        cutter.join()
        if run.emulator_slipped and number == 0:
            self.round(number, may_be_early)
            return
        if run.emulator_slipped:
            early = True  # as good as a cut: it may have come before anything was looked at
        elif outcome.status != LOST or "cut" not in outcome.message:
            self.failures.append(f"cut {number}: the guest ended by itself: {outcome.message} {outcome.details[-5:]}")
        self._judge(number, boot, early)
        for disk in self.disks.values():
            disk.lose_power()
        self.rounds.append(
            {
                "number": number,
                "kernel": kernel.release,
                "direct": direct,
                "early": early,
                "acks": boot.acks,
                "found": boot.found,
                "bad": boot.bad,
                "acked": dict(self.acked),
                "seconds": round(time.monotonic() - began, 1),
            }
        )

    def _cut(self, run: Run, boot: Boot, wait: float, early: bool) -> None:
        (boot.up if early else boot.appending).wait()
        if not boot.ended.wait(wait):
            with self.power.lock:
                self.power.on = False
            run.cut()

    def _judge(self, number: int, boot: Boot, early: bool) -> None:
        for subject, what in boot.bad:
            if subject != LIAR:
                self.failures.append(f"cut {number}: {subject}: {what}")
        for subject, acked in self.acked.items():
            found = boot.found.get(subject)
            if subject == LIAR:
                lost = any(bad == LIAR for bad, _ in boot.bad) or (found is not None and found[1] < acked)
                self.caught_liar += lost
            elif found is None:
                if not early:
                    self.failures.append(f"cut {number}: {subject} was not found at all")
            elif found[1] < acked:
                self.failures.append(f"cut {number}: {subject}: {acked} was acknowledged, {found[1]} is the last")
        if not early and number and not boot.acks:
            self.failures.append(f"cut {number}: nothing was acknowledged")
        for subject, last in boot.acked.items():
            self.acked[subject] = last
        if LIAR in boot.found and LIAR not in boot.acked:
            self.acked.pop(LIAR, None)


def _read(descriptor: int, boot: Boot) -> None:
    with os.fdopen(descriptor, "rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):  # the last one may have been cut, too
                boot.take(line.decode(errors="replace").rstrip())


def prove(names: list[str], cuts: int, seed: int, out: Path) -> dict[str, Any]:
    """So many cuts, and a last look: the report, which is written to out after each."""
    began = time.monotonic()
    machine = Cuts(names, seed)
    releases = [each.release for each in machine.kernels]
    report: dict[str, Any] = {"what": "power cut", "kernels": releases, "seed": seed, "wanted": cuts}
    try:
        for number in range(cuts + 1):
            # of a few, none is to be wasted; the last one is a look at what is there
            machine.round(number, cuts >= 10 and 0 < number < cuts)
            last = machine.rounds[-1]
            report |= {
                # the first look at what a cut left comes with the next boot
                "cuts": number,
                "acknowledged": sum(each["acks"] for each in machine.rounds),
                "acknowledged_by_subject": {s: n + 1 for s, n in machine.acked.items()},
                "lost_by_the_disks": {s: disk.lost_writes for s, disk in machine.disks.items()},
                "kept_by_the_disks": {s: disk.kept_writes for s, disk in machine.disks.items()},
                "flushes": {s: disk.flushes for s, disk in machine.disks.items()},
                "fua_writes": {s: disk.fuas for s, disk in machine.disks.items()},
                "liar_caught": machine.caught_liar,
                "failures": machine.failures,
                "seconds": round(time.monotonic() - began, 1),
                "rounds": machine.rounds,
            }
            out.write_text(json.dumps(report) + "\n")
            print(
                f"cut {number} of {cuts}: kernel {last['kernel']}, {last['acks']} records acknowledged, "
                f"{'direct' if last['direct'] else 'buffered'}{', early' if last['early'] else ''}, "
                f"{last['seconds']} s; {len(machine.failures)} failures, liar caught {machine.caught_liar} times",
                flush=True,
            )
            if machine.failures:
                break
    finally:
        machine.close()
    if not machine.failures and not machine.caught_liar:
        machine.failures.append("the lying server was never caught: this run proves nothing")
        out.write_text(json.dumps(report) + "\n")
    out.with_suffix(".txt").write_text(table(report) + "\n")
    return report


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"power cut, kernels {', '.join(report['kernels'])}, seed {report['seed']}: {report['cuts']} cuts looked at in "
        f"{report['seconds']:.0f} s, {report['acknowledged']} records acknowledged, "
        f"lying server caught {report['liar_caught']} times: "
        + ("; ".join(report["failures"]) if report["failures"] else "nothing acknowledged was lost, all clean"),
        f"{'subject':12} {'records':>8} {'flushes':>8} {'fua':>8} {'writes lost':>12} {'and kept':>9}",
    ]
    for subject, flushes in report["flushes"].items():
        numbers = (
            report["acknowledged_by_subject"].get(subject, 0),
            flushes,
            report["fua_writes"][subject],
            report["lost_by_the_disks"][subject],
            report["kept_by_the_disks"][subject],
        )
        lines.append("{:12} {:8} {:8} {:8} {:12} {:9}".format(subject, *numbers))
    return "\n".join(lines)
