# SPDX-License-Identifier: Apache-2.0
"""One submitter, one queue: what more workers on it gain. As root on a kernel with a task per tag; see README.md."""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
sys.dont_write_bytecode = True

from benchlib import fio, subjects, system  # noqa: E402

ROUNDS, MILLISECONDS, SPAN = 5, 3000, 8 << 20
CELLS = (
    fio.Cell("read-4k-16", "4k read, depth 16", "randread", "4k", 16),
    fio.Cell("write-4k-16", "4k write, depth 16", "randwrite", "4k", 16),
)
DISKS = {"memory": ("memory",), "python, busy": ("python", f"{HERE}/busy_disk.py:Disk")}


def main() -> None:
    workers = [n for n in (1, 2, 4) if n <= (os.cpu_count() or 1)]
    samples: dict[str, dict[int, dict[str, list[float]]]] = {}
    with system.Lab(SPAN) as lab:
        devices = {}
        for name, words in DISKS.items():
            for n in workers:
                options = ["--size", str(SPAN), "--queues", "1", "--workers-per-queue", str(n)]
                devices[name, n] = subjects.add_device(lab, *words, *options)["path"]
                lab.fill(devices[name, n])
                samples.setdefault(name, {})[n] = {cell.key: [] for cell in CELLS}
        system.run("udevadm", "settle")
        for number in range(ROUNDS):
            for (name, n), device in devices.items():
                system.say(f"round {number + 1} of {ROUNDS}: {name}, {n} workers")
                taken = fio.measure(device, SPAN, MILLISECONDS, [], lab.directory, CELLS)
                for key, sample in taken.items():
                    samples[name][n][key].append(sample["iops"])
    print(json.dumps({"cpus": os.cpu_count(), "kernel": os.uname().release, "iops": samples}, indent=1))
    for name, by_count in samples.items():
        for key in by_count[1]:
            one = statistics.median(by_count[1][key])
            gains = ", ".join(f"{n}: {statistics.median(by_count[n][key]) / one:.2f}" for n in workers)
            print(f"{name}, {key}: IOPS by those of one worker: {gains}", file=sys.stderr)


main()
