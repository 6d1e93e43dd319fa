# SPDX-License-Identifier: Apache-2.0
"""Instructions per I/O: our driver against the kernel's, in one boot under --icount.

    scripts/vm 6.12 --no-ublk --icount -- .venv/bin/python -B tests/driver/cost.py

With the instruction clock guest time is the instruction count (4 ns each), and on the one CPU client, server and
driver all run: the time per I/O is what all of it costs. ublkd's null target, 4 KiB reads.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
OURS = TOP / "build" / "driver" / os.uname().release / "ublkd_drv.ko"
UBLKD = TOP / ".venv" / "bin" / "ublkd"
DEPTHS = (1, 32, 128)
ROUNDS = int(os.environ.get("UBLKD_COST_ROUNDS", "3"))
IOS = {1: 4000, 32: 16000, 128: 16000}
NS_PER_INSTRUCTION = 4


def run(*command: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def measure(path: str, depth: int) -> float:
    """Instructions per I/O."""
    out = run(
        "fio", "--name=cost", f"--filename={path}", "--ioengine=io_uring", "--direct=1", "--rw=randread", "--bs=4k",
        f"--iodepth={depth}", f"--number_ios={IOS[depth]}", "--size=1G", "--output-format=json",
    )  # fmt: skip
    return 1e9 / json.loads(out[out.index("{") :])["jobs"][0]["read"]["iops"] / NS_PER_INSTRUCTION


def main() -> None:
    results: dict[tuple[str, int], list[float]] = {}
    for _ in range(ROUNDS):
        for driver in ("ublk_drv", "ublkd_drv"):
            run("insmod", OURS) if driver == "ublkd_drv" else run("modprobe", driver)
            path = run(UBLKD, "add", "null", "--queues", 1, "--depth", 128, "--size", "1G").split()[-1]
            measure(path, 1)
            for depth in DEPTHS:
                results.setdefault((driver, depth), []).append(measure(path, depth))
            run(UBLKD, "del", path)
            run("rmmod", driver)
    print("| depth | kernel's | ours | ratio |\n|-|-|-|-|")
    for depth in DEPTHS:
        theirs, ours = (statistics.median(results[driver, depth]) for driver in ("ublk_drv", "ublkd_drv"))
        print(f"| {depth} | {theirs:.0f} | {ours:.0f} | {ours / theirs:.3f} |")
    for key, values in sorted(results.items()):
        print(*key, *(round(value) for value in values))


if __name__ == "__main__":
    main()
