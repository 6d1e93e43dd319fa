# SPDX-License-Identifier: Apache-2.0
"""The command line of ``scripts/bench``."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from . import plot, report
from .measure import fresh_memory, measure
from .subjects import SUBJECTS, TOP
from .system import MIB, BenchError, say

_RESULT = "result.json"
_SPEED_VM = ["--icount", "--memory", "3G", "--timeout", "7200", "--require-ublk"]
# The driver gives a device no more queues than there are CPUs, and the instruction clock has one.
_MEMORY_VM = ["--cpus", "4", "--memory", "1G", "--require-ublk"]

_DESCRIPTION = """\
Measure ublkd's targets beside the kernel's own disks and other servers, in one boot of a VM whose clock
counts instructions (so the machine's noise doesn't matter), and write a table of ratios, raw numbers and a
plot."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench: {message} (see scripts/bench --help)\n")


def parser() -> argparse.ArgumentParser:
    """The options."""
    subjects = "\n".join(f"  {name:15}{kind.title}" for name, kind in SUBJECTS.items())
    parse = _Parser(
        prog="bench",
        description=_DESCRIPTION,
        epilog=f"what can be measured:\n{subjects}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument("--quick", action="store_true", help="one short round; files go to build/bench")
    parse.add_argument(
        "--targets",
        type=_targets,
        default=[],
        metavar="NAME,...",
        help="measure these, and what they are compared with (default: all that are to be had)",
    )
    parse.add_argument("--repeats", type=_positive, metavar="N", help="rounds (default 3; 1 with --quick)")
    parse.add_argument("--milliseconds", type=_positive, metavar="N", help="per cell (default 400 or 100)")
    parse.add_argument("--span", type=_positive, default=128, metavar="MIB", help="disk size (%(default)s)")
    parse.add_argument("--out", type=Path, metavar="NAME", help="write NAME.md, NAME.json and NAME.png")
    where = parse.add_mutually_exclusive_group()
    where.add_argument("--kernel", default="newest", help="of the VM: see scripts/vm (default %(default)s)")
    where.add_argument("--native", action="store_true", help="measure the running kernel, with its own clock")
    where.add_argument("--inside", choices=("speed", "memory"), help=argparse.SUPPRESS)
    return parse


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    options.repeats = options.repeats or (1 if options.quick else 3)
    options.milliseconds = options.milliseconds or (100 if options.quick else 400)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        if options.inside:
            return _inside(options)
        if options.out:
            _check_out(options.out)
        plot.check()
        result = _measure(options) if options.native else _measure_in_vms(options)
        result |= _circumstances(options, arguments)
        _publish(result, options.out or _default_out(options, result["kernel"]))
        return 0
    except BenchError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _targets(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SUBJECTS:
            raise argparse.ArgumentTypeError(f"there is no {name!r}; there are {', '.join(SUBJECTS)}")
    return names


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _check_out(out: Path) -> None:
    if out.name in ("", "..") or out.is_dir():
        raise BenchError(f"--out {out} is a directory: give the name of the files in it, without suffix")
    if not out.parent.is_dir():
        raise BenchError(f"--out {out}: there is no directory {out.parent}")


def _default_out(options: argparse.Namespace, kernel: str) -> Path:
    directory = TOP / ("build/bench" if options.quick else "docs/benchmarks")
    directory.mkdir(parents=True, exist_ok=True)
    return directory / f"{'native' if options.native else 'vm'}-{re.split('[+-]', kernel)[0]}"


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    memory = fresh_memory(options.span * MIB)
    result = _speed(options, instructions=False)
    result["memory"] = memory + result["memory"]
    return result


def _speed(options: argparse.Namespace, instructions: bool) -> dict[str, Any]:
    return measure(options.targets, options.repeats, options.milliseconds, options.span * MIB, instructions)


def _inside(options: argparse.Namespace) -> int:
    """One of the two halves, in the VM that is for it."""
    part: Any
    if options.inside == "speed":
        part = _speed(options, instructions=True)
    else:
        part = fresh_memory(options.span * MIB)
    Path(os.environ["UBLKD_VM_SHARE"], _RESULT).write_text(json.dumps(part))
    return 0


def _measure_in_vms(options: argparse.Namespace) -> dict[str, Any]:
    memory: list[dict[str, Any]] = _in_vm(options, "memory", _MEMORY_VM)
    result: dict[str, Any] = _in_vm(options, "speed", _SPEED_VM)
    result["memory"] = memory + result["memory"]
    return result


def _in_vm(options: argparse.Namespace, part: str, machine: list[str]) -> Any:
    with tempfile.TemporaryDirectory(prefix="ublkd-bench-") as share:
        inside = [str(TOP / "scripts" / "bench"), "--inside", part, "--span", str(options.span)]
        inside += ["--repeats", str(options.repeats), "--milliseconds", str(options.milliseconds)]
        if options.targets:
            inside += ["--targets", ",".join(options.targets)]
        command = [str(TOP / "scripts" / "vm"), options.kernel, *machine, "--share", share, "--", *inside]
        vm = subprocess.Popen(command, cwd=TOP, stdin=subprocess.DEVNULL)
        try:
            status = vm.wait()
        finally:
            # where we are told to end, it is to end by its own handler, so that no machine is left
            vm.terminate()
            vm.wait()
        if status:
            raise BenchError(f"the run in the VM failed with status {status}: see above")
        return json.loads(Path(share, _RESULT).read_text())


def _circumstances(options: argparse.Namespace, arguments: list[str]) -> dict[str, str]:
    return {
        "command": shlex.join(["scripts/bench", *arguments]),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "clock": "wall" if options.native else "instructions",
    }


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", TOP, *words], capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    if not commit:
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "daemon")
    return commit + (" with changes" if changed else "")


def _publish(result: dict[str, Any], out: Path) -> None:
    """Tables to stdout, files to out with their suffixes."""
    for table in (report.ratio_table, report.figures_table, report.memory_table):
        print(table(result), end="\n\n", flush=True)

    def path(suffix: str) -> Path:
        return out.with_name(out.name + suffix)

    path(".json").write_text(json.dumps(result, indent=1) + "\n")
    path(".md").write_text(report.markdown(result, out.name))
    plot.plot(result, path(".png"))
    say(f"wrote {os.path.relpath(path('.md'))}, .json and .png")
