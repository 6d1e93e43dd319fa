# SPDX-License-Identifier: Apache-2.0
"""Run the proofs that nothing acknowledged is ever lost. Reports go to build/faults."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
PYTHON = str(TOP / ".venv" / "bin" / "python")


def in_vm(kernel: str, module: str, words: list[str], out: Path, machine: list[str]) -> int:
    """Run a module of this package in a VM; what it writes to {share} is kept in out. The exit status."""
    out.mkdir(parents=True, exist_ok=True)
    argv = [
        str(TOP / "scripts" / "vm"),
        kernel,
        "--require-ublk",
        f"--share={out}",
        f"--env=PYTHONPATH={TOP / 'tests'}",
        "--env=PYTHONUNBUFFERED=1",
        *machine,
        "--",
        PYTHON,
        "-B",
        "-m",
        f"faults.{module}",
        *[word.format(share=out) for word in words],
    ]
    return subprocess.run(argv, cwd=TOP, stdin=subprocess.DEVNULL).returncode


def storm(options: argparse.Namespace, kernel: str) -> int:
    """The kill storm."""
    kills = options.kills if options.kills is not None else 1000 if options.full else 15
    more = ["--steady=100", "--restarts=10", "--job-mib=3"] if options.full else []
    if kernel != "6.12":
        more.append("--self-check")
    if not options.full and options.kills is None:
        # each kernel a part of it
        subjects = "loop-buffered,memory" if kernel == "6.12" else "loop-direct,python"
        more += [f"--subjects={subjects}", "--restarts=1"]
    if options.minutes:
        more.append(f"--minutes={options.minutes}")
    words = [f"--kills={kills}", f"--seed={options.seed}", *more, f"--out={{share}}/storm-{kernel}.json"]
    machine = ["--cpus=4", "--disk=1G,discard", f"--timeout={14400 if options.full else 1200}"]
    return in_vm(kernel, "storm", words, options.out, machine)


def orderings(options: argparse.Namespace, kernel: str) -> int:
    """dm-log-writes."""
    amount = ["--records=60"] if options.full else ["--records=12", "--sample=6"]
    if not options.full:
        amount.append(f"--subjects={'ext4-direct' if kernel == '6.12' else 'xfs-buffered,ext4-hasty'}")
    words = [*amount, f"--seed={options.seed}", f"--out={{share}}/orderings-{kernel}.json"]
    machine = ["--cpus=2", "--disk=512M,discard", "--disk=4G,discard", "--timeout=7200"]
    return in_vm(kernel, "orderings", words, options.out, machine)


def many(options: argparse.Namespace, kernel: str) -> int:
    """200 devices."""
    if kernel == "6.12" and not options.full and options.devices is None and not options.kernel:
        print("only on the newest kernel, in its short form")
        return 0
    count = options.devices if options.devices is not None else 200 if options.full else 12
    words = [f"--devices={count}", f"--seed={options.seed}", f"--out={{share}}/many-{kernel}.json"]
    machine = ["--cpus=4", f"--memory={'6G' if count > 50 else '3G'}", "--disk=2G,discard", "--timeout=7200"]
    return in_vm(kernel, "many", words, options.out, machine)


def upgrades(options: argparse.Namespace, kernel: str) -> int:
    """Upgrades under load."""
    count = options.upgrades if options.upgrades is not None else 200 if options.full else 6
    words = [f"--upgrades={count}", f"--seed={options.seed}", f"--out={{share}}/upgrades-{kernel}.json"]
    return in_vm(kernel, "upgrades", words, options.out, ["--cpus=4", "--disk=1G,discard", "--timeout=7200"])


def powercut(options: argparse.Namespace, names: list[str]) -> int:
    """Power cuts, the kernels by turns."""
    from . import powercut

    options.out.mkdir(parents=True, exist_ok=True)
    cuts = options.cuts if options.cuts is not None else 100 if options.full else 2
    report = powercut.prove(names, cuts, options.seed, options.out / "powercut.json")
    print(powercut.table(report), flush=True)
    return 1 if report["failures"] else 0


PER_KERNEL = {"storm": storm, "orderings": orderings, "many": many, "upgrades": upgrades}
ALL_KERNELS = {"powercut": powercut}
PROOFS = [*PER_KERNEL, *ALL_KERNELS]


def main() -> int:
    """Entry point; 0 if all that was asked for held."""
    parse = argparse.ArgumentParser(prog="faults", description=__doc__)
    parse.add_argument("proofs", nargs="+", choices=PROOFS, metavar="PROOF", help=", ".join(PROOFS))
    parse.add_argument("--kernel", action="append", metavar="KERNEL", help="6.12 and newest unless given; repeatable")
    parse.add_argument("--full", action="store_true", help="as long as it takes; else minutes")
    parse.add_argument("--seed", type=int, default=None, help="for the same moments again")
    parse.add_argument("--kills", type=int, help="how many, for storm")
    parse.add_argument("--minutes", type=float, help="at most, for storm")
    parse.add_argument("--cuts", type=int, help="how many, for powercut")
    parse.add_argument("--upgrades", type=int, help="how many, for upgrades")
    parse.add_argument("--devices", type=int, help="how many, for many")
    parse.add_argument("--out", type=Path, default=TOP / "build" / "faults", metavar="DIR", help="default build/faults")
    options = parse.parse_args()
    options.out = options.out.resolve()
    if options.seed is None:
        options.seed = int.from_bytes(os.urandom(3), "big")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    statuses = {}
    kernels = options.kernel or ["6.12", "newest"]
    for proof in options.proofs:
        if proof in ALL_KERNELS:
            print(f"===== {proof}, seed {options.seed} =====", flush=True)
            statuses[proof, " and ".join(kernels)] = ALL_KERNELS[proof](options, kernels)
            continue
        for kernel in kernels:
            print(f"===== {proof} on kernel {kernel}, seed {options.seed} =====", flush=True)
            statuses[proof, kernel] = PER_KERNEL[proof](options, kernel)
    for (proof, kernel), status in statuses.items():
        print(f"{proof} on kernel {kernel}: " + ("passed" if status == 0 else f"FAILED (status {status})"))
    return next((status for status in statuses.values() if status), 0)
