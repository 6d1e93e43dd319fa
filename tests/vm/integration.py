# SPDX-License-Identifier: Apache-2.0
"""Run the integration tests on several kernels, and print each one's whole output when it is done."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from . import driver, kernels
from .outcome import CANNOT_START, VMError

KERNELS = ("6.12", "newest")
TESTS = "tests/integration"

_TOP = Path(__file__).resolve().parents[2]
_HEARTBEAT = 60.0
_TAIL_LINES = 80
_MACHINE = (
    "--require-ublk",
    "--cpus=4",
    "--memory=3G",
    "--disk=2G,discard",
    "--disk=1G,sector=4096,discard",
    "--env=UBLKD_REQUIRE_KERNEL=1",
    "--timeout=5400",
)
_PYTEST = [".venv/bin/python", "-B", "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-v"]


@dataclass
class Batch:
    """The tests on one kernel: a process, and the file that its output goes to."""

    kernel: str
    process: subprocess.Popen[bytes]
    output: Path
    started: float

    def last_line(self) -> str:
        """The last complete line of output so far."""
        lines = self.output.read_text(errors="replace").split("\n")[:-1]
        return lines[-1].strip() if lines else "no output yet"


def command(kernel: str, logs: Path, arguments: list[str], module: Path | None = None) -> list[str]:
    """The scripts/vm call for one kernel. `arguments` are pytest's; node ids replace the directory.

    With `module`, on that driver instead of the kernel's own.
    """
    named = any(argument.startswith("tests/") for argument in arguments)
    tests = arguments if named else [*arguments, TESTS]
    machine = [*_MACHINE, f"--log={logs / kernel}.console"]
    if module is not None:
        machine.append(f"--module={module}")
    return [str(_TOP / "scripts" / "vm"), kernel, *machine, "--", *_PYTEST, *tests]


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns 0 if all kernels passed, else the first failure's status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parse = argparse.ArgumentParser(
        prog="integration",
        usage="integration [KERNEL...] [--jobs N] [--own-driver | --module FILE.ko] [-- PYTEST-ARGUMENT...]",
        description=__doc__,
    )
    parse.add_argument("kernels", nargs="*", help="default: " + ", ".join(KERNELS))
    parse.add_argument("--jobs", type=int, default=2, metavar="N", help="machines at a time (default %(default)s)")
    parse.add_argument("--own-driver", action="store_true", help="on the driver in kernel_module/, built first")
    parse.add_argument("--module", type=Path, metavar="FILE.ko", help="on this driver, for the one kernel it is for")
    options = parse.parse_args(arguments[:split])
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    default = driver.KERNELS if options.own_driver else KERNELS
    names = [kernels.series(name).name for name in options.kernels or default]
    modules: dict[str, Path] = {}
    if options.module:
        modules = {name: options.module for name in names}
    try:
        if options.own_driver:
            modules = {name: driver.build(name) for name in names}
        return run(names, arguments[split + 1 :], options.jobs, modules)
    except VMError as error:
        print(f"integration: {error}", file=sys.stderr)
        return CANNOT_START
    except KeyboardInterrupt:
        return 130


def run(names: list[str], pytest_arguments: list[str], jobs: int, modules: dict[str, Path] | None = None) -> int:
    """Run the tests on each kernel, `jobs` of them at a time; outputs don't mix."""
    modules = modules or {}
    logs = _TOP / "build" / "vm-logs"
    logs.mkdir(parents=True, exist_ok=True)
    if len(names) == 1:
        # nothing to keep apart: let the output through as it comes
        only = command(names[0], logs, pytest_arguments, modules.get(names[0]))
        return subprocess.run(only, cwd=_TOP, stdin=subprocess.DEVNULL).returncode
    waiting, running, statuses = list(names), list[Batch](), dict[str, int]()
    beat = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                running.append(_start(name, logs, pytest_arguments, modules.get(name)))
            time.sleep(0.2)
            for batch in [batch for batch in running if batch.process.poll() is not None]:
                running.remove(batch)
                statuses[batch.kernel] = _finish(batch)
            if time.monotonic() - beat >= _HEARTBEAT:
                beat = time.monotonic()
                _show_progress(running)
    finally:
        _stop(running)
    return _summary(names, statuses, logs)


def _output(logs: Path, kernel: str) -> Path:
    return logs / f"{kernel}.output"


def _start(kernel: str, logs: Path, pytest_arguments: list[str], module: Path | None) -> Batch:
    output = _output(logs, kernel)
    with open(output, "wb") as file:
        process = subprocess.Popen(
            command(kernel, logs, pytest_arguments, module),
            cwd=_TOP,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    print(f"integration tests on kernel {kernel}: started", flush=True)
    return Batch(kernel, process, output, time.monotonic())


def _finish(batch: Batch) -> int:
    seconds = time.monotonic() - batch.started
    print(f"\n===== integration tests on kernel {batch.kernel}, {seconds:.0f} s =====", flush=True)
    sys.stdout.buffer.write(batch.output.read_bytes())
    sys.stdout.flush()
    return batch.process.wait()


def _show_progress(running: list[Batch]) -> None:
    for batch in running:
        minutes = (time.monotonic() - batch.started) / 60
        where = f"integration tests on kernel {batch.kernel}: {minutes:.0f} min"
        print(f"{where}: {batch.last_line()[:120]}", flush=True)


def _stop(running: list[Batch]) -> None:
    for batch in running:
        batch.process.terminate()
    for batch in running:
        batch.process.wait()


def _summary(names: list[str], statuses: dict[str, int], logs: Path) -> int:
    print()
    for name in names:
        if statuses[name]:
            # again, and last: whoever sees only the end of a long log sees why it failed
            lines = _output(logs, name).read_text(errors="replace").splitlines()
            print(f"----- the end of kernel {name}'s output -----", *lines[-_TAIL_LINES:], "", sep="\n")
    for name in names:
        status = statuses[name]
        result = "passed" if status == 0 else f"FAILED (status {status})"
        print(f"integration tests on kernel {name}: {result}")
    sys.stdout.flush()
    return next((statuses[name] for name in names if statuses[name]), 0)
