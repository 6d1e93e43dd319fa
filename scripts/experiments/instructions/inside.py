# SPDX-License-Identifier: Apache-2.0
"""What `run` runs in the VM: each disk in turn under a steady load, and two marks in the middle of it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
sys.dont_write_bytecode = True

from benchlib import fio, processes, subjects, system  # noqa: E402

SPAN = 64 << 20
# of a clock that counts instructions
COUNTED_S, RUN_S = 1, 4
SETTLED_NS = 800_000_000  # CPU time of fio, which began its I/O long before


def code(pid: str) -> list[str]:
    """The process's name, and the lines of its maps that can be executed."""
    try:
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return []
    return [name, *(line for line in lines if "x" in line.split()[1])]


def count(name: str, rw: str, depth: int, share: Path) -> dict[str, object]:
    subject = subjects.SUBJECTS[name]()
    with system.Lab(SPAN, True) as lab:
        with system.clock_kept(True):
            device = subject.setup(lab)
            if subject.stores:
                lab.fill(device)
            system.without_scheduler(device)
            subject.reset_page_cache()
            system.run("udevadm", "settle")
            servers = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in subject.pids()]
        # udev's helpers end when they had nothing to do for 3 s, which would be counted
        time.sleep(5)
        cell = fio.Cell("load", "", rw, "4k", depth)
        jobs, output = lab.directory / "load.fio", lab.directory / "fio.json"
        jobs.write_text(fio.job_file(device, SPAN, RUN_S * 1000, [], (cell,), warm_up=False))
        load = subprocess.Popen(["fio", "--output-format=json", f"--output={output}", jobs])
        # not by the clock, which jumps while fio waits for its own pages
        system.wait_for("fio", lambda: processes.total_cpu_ns(load.pid) > SETTLED_NS, timeout=1e6)
        running = [found for pid in os.listdir("/proc") if pid.isdigit() and (found := code(pid))]
        subprocess.run([HERE / "build" / "mark"], check=True)
        time.sleep(COUNTED_S)
        subprocess.run([HERE / "build" / "mark"], check=True)
        if load.wait():
            raise system.BenchError(f"fio on {name} failed")
        sample = fio.parse(output.read_text())[cell.key]
        symbols = Path("/proc/kallsyms").read_text()
    (share / f"symbols.{name}").write_text(symbols)
    return {"disk": name, "servers": servers, "processes": running, "iops": sample["iops"]}


def main() -> None:
    parse = argparse.ArgumentParser()
    parse.add_argument("--rw", default="randread")
    parse.add_argument("--depth", type=int, default=32)
    parse.add_argument("disks", nargs="+")
    options = parse.parse_args()
    share = Path(os.environ["UBLKD_VM_SHARE"])
    system.one_group()
    runs = [count(name, options.rw, options.depth, share) for name in options.disks]
    (share / "runs.json").write_text(json.dumps({"rw": options.rw, "depth": options.depth, "runs": runs}))


main()
