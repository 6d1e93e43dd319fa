# SPDX-License-Identifier: Apache-2.0
"""What `run` runs in the VM: servers of this directory beside ublkd and the kernel, measured in turns."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
sys.dont_write_bytecode = True

from benchlib import fio, subjects, system  # noqa: E402

MIB = 1 << 20
SPAN = 128 * MIB
CELLS = (
    fio.Cell("read-4k-1", "4k read, depth 1", "randread", "4k", 1),
    fio.Cell("read-4k-32", "4k read, depth 32", "randread", "4k", 32),
)
AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")
# name: options of the server, and whether it is a loop device
CORE = {
    "null": ("", False),
    "null, BPF": ("bpf", False),
    "loop": ("", True),
    "loop, BPF": ("bpf", True),
}
# measured in the first rounds only
VARIANTS = {
    "null, plain": ("sqarray,plain-ring,plain-files", False),
    "null, SQ array": ("sqarray", False),
    "null, SQ head and tail": ("no-rewind", False),
    "null, NO_IOWAIT": ("no-iowait", False),
    "null, no DEFER_TASKRUN": ("task-work", False),
    "null, two enters": ("two-enters", False),
    "null, BPF, no descriptor": ("bpf,no-desc", False),
    "loop, no link": ("no-link", True),
}
VARIANT_ROUNDS = 2
# without autogroups
WITHOUT = ("null", "null, BPF", "loop", "loop, BPF", "ublkd null --no-zero")


class Server(subjects.Subject):
    """A server of this directory."""

    def __init__(self, options: str, loop: bool) -> None:
        self.options, self.loop = options, loop

    def setup(self, lab: system.Lab) -> str:
        command = [str(HERE / "build" / "server"), "-o", self.options, *([lab.ram_disk(0)] if self.loop else [])]
        # a session of its own, as ublkd's servers have
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self.process.stdout
        path = self.process.stdout.readline().strip()
        if not path:
            raise system.BenchError(f"server -o {self.options} made no device")
        lab.later(self.process.wait)
        lab.later(self.process.terminate)
        system.wait_for(path, lambda: Path(path).exists())
        return path

    def pids(self) -> list[int]:
        return [self.process.pid]


class UblkdLoop(subjects.Ublkd):
    """ublkd on the same RAM disk, without a file system between."""

    def arguments(self, lab: system.Lab) -> list[str | Path]:
        return ["loop", lab.ram_disk(0), "--direct"]


def check(device: str, directory: Path) -> None:
    """What is written is read back, in sizes that the length must be known for."""
    options = ["--ioengine=io_uring", "--direct=1", "--rw=randwrite", "--bsrange=4k-64k", "--iodepth=16"]
    verify = ["--size=1m", "--verify=crc32c", "--randrepeat=1"]
    system.run("env", "-C", directory, "fio", "--name=v", f"--filename={device}", *options, *verify, timeout=fio.FIO_S)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--milliseconds", type=int, required=True)
    parser.add_argument("--only", default="")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    wanted = [name for name in options.only.split(";") if name]
    things: dict[str, subjects.Subject] = {
        "ublkd null --no-zero": subjects.NullNoZero(),
        "ublkd loop": UblkdLoop(),
        **{name: Server(*arguments) for name, arguments in CORE.items()},
    }
    variants: dict[str, subjects.Subject] = {
        **{name: Server(*arguments) for name, arguments in VARIANTS.items()},
        "null_blk": subjects.NullBlk(),
    }
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {"1": {}, "0": {}}
    with system.Lab(SPAN, True) as lab:
        devices = {}
        with system.clock_kept(True):
            lab.fill(lab.ram_disk(0))
            for name, thing in {**things, **variants}.items():
                if wanted and name not in wanted:
                    continue
                devices[name] = thing.setup(lab)
                system.without_scheduler(devices[name])
                system.say(f"{name}: {devices[name]}")
                if name == "loop, BPF":
                    check(devices[name], lab.directory)
                    system.say(f"{name}: what was written is read back")
        for number in range(options.rounds):
            turns = [("1", things), ("0", {name: things[name] for name in WITHOUT})]
            if number < VARIANT_ROUNDS:
                turns.insert(1, ("1", variants))
            for autogroup, turn in turns:
                AUTOGROUP.write_text(autogroup)
                for name, thing in turn.items():
                    if name not in devices:
                        continue
                    measured = fio.measure(
                        devices[name], SPAN, options.milliseconds, thing.pids(), lab.directory, CELLS
                    )
                    for cell, sample in measured.items():
                        samples[autogroup].setdefault(name, {}).setdefault(cell, []).append(sample)
                write(options.output, options, samples)
            system.say(f"round {number + 1} of {options.rounds}")


def write(path: Path, options: argparse.Namespace, samples: dict[str, Any]) -> None:
    document = {
        "kernel": platform.release(),
        "when": time.strftime("%Y-%m-%d"),
        "milliseconds": options.milliseconds,
        "autogroup": samples,
        "medians": {
            autogroup: {
                name: {
                    cell: {
                        key: round(statistics.median(one[key] for one in many), 2)
                        for key in ("iops", "server_us")
                        if key in many[0]
                    }
                    for cell, many in cells.items()
                }
                for name, cells in by_name.items()
            }
            for autogroup, by_name in samples.items()
        },
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except system.BenchError as error:
        sys.exit(f"bpf-loop: {error}")
    os.sync()
