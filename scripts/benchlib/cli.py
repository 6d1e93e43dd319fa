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
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import fio, kublk, many, plot, report, scaling
from .measure import facts, fresh_memory, measure, need_root
from .subjects import SUBJECTS, TOP
from .system import MIB, BenchError, Clock, Progress, clock_kept, one_group, say

_RESULT = "result.json"
_LATE = "late"
_CLOCK = ["--icount", "--timeout", "14400", "--require-ublk"]
_VMS = {
    "speed": [*_CLOCK, "--memory", "4G"],
    "queues": [*_CLOCK, "--memory", "4G", "--cpus", str(max(scaling.COUNTS))],
    "devices": [*_CLOCK, "--memory", "6G"],
}
PARTS = {
    "speed": "all disks in turns",
    "queues": "1, 2 and 4 queues on as many CPUs, and the memory of so many workers",
    "devices": "start and memory of 1 to 200 devices",
}

_DESCRIPTION = """\
Measure ublkd's targets beside the kernel's own disks and other servers, in one boot of a VM whose clock
counts instructions (so the machine's noise doesn't matter), and what more queues and more devices cost; write
tables of ratios and figures, raw numbers and plots."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench: {message} (see scripts/bench --help)\n")


def parser() -> argparse.ArgumentParser:
    """The options."""
    parse = _Parser(prog="bench", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--list", action="store_true", help="list parts, disks and cells; measure nothing")
    parse.add_argument("--fetch", action="store_true", help="fetch and build what is measured, and no more")
    parse.add_argument("--render", action="store_true", help="tables and pictures again, of --out's raw numbers")
    parse.add_argument("--quick", action="store_true", help="one short round; files go to build/bench")
    parse.add_argument(
        "--parts",
        type=_names("part", PARTS),
        default=list(PARTS),
        metavar="NAME,...",
        help=f"measure these (default {','.join(PARTS)})",
    )
    parse.add_argument(
        "--targets",
        type=_names("target", SUBJECTS),
        default=[],
        metavar="NAME,...",
        help="measure these, and what they are compared with (default: all that are to be had)",
    )
    parse.add_argument(
        "--cells",
        type=_names("cell", [cell.key for cell in fio.CELLS]),
        default=[cell.key for cell in fio.CELLS],
        metavar="NAME,...",
        help="with these workloads (default: all)",
    )
    parse.add_argument("--repeats", type=_positive, metavar="N", help="rounds (default 5; 1 with --quick)")
    parse.add_argument("--minutes", type=_positive, metavar="N", help="begin no more rounds of disks after that")
    parse.add_argument("--milliseconds", type=_positive, default=100, metavar="N", help="per cell (%(default)s)")
    parse.add_argument("--span", type=_positive, default=64, metavar="MIB", help="disk size (%(default)s)")
    parse.add_argument("--out", type=Path, metavar="NAME", help="write NAME.md, NAME.json and NAME*.png")
    where = parse.add_mutually_exclusive_group()
    where.add_argument("--kernel", default="newest", help="of the VM: see scripts/vm (default %(default)s)")
    where.add_argument("--native", action="store_true", help="measure the running kernel, with its own clock")
    where.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parse


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    options.repeats = options.repeats or (1 if options.quick else 5)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        if options.list:
            return _list()
        if options.inside:
            return _inside(options)
        if options.out:
            _check_out(options.out)
        if not options.fetch:
            plot.check()
        if options.render:
            return _render(options.out)
        if options.fetch or any("kublk" in name for name in options.targets or ["kublk"]):
            kublk.prepare(None if options.native else options.kernel)
        if options.fetch:
            return 0
        if options.native:
            Progress.clock = Clock()
        for parts, result in _measured(options):
            # each by itself, so that it stays if a later one fails
            result |= _circumstances(options, arguments, parts, result)
            out = options.out or _default_out(options, result["kernel"])
            written = _write(report.join(result, _earlier(out)), out)
        _print(written)
        return 0
    except BenchError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _list() -> int:
    cells = {cell.key: cell.title for cell in fio.CELLS}
    disks = {name: kind.title for name, kind in SUBJECTS.items()}
    for what, names in (("parts", PARTS), ("targets", disks), ("cells", cells)):
        print(f"{what}:", *(f"  {name:22}{title}" for name, title in names.items()), sep="\n")
    return 0


def _names(what: str, known: Iterable[str]) -> Callable[[str], list[str]]:
    """A list with commas between, of names that there are."""
    there = list(known)

    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in there:
                raise argparse.ArgumentTypeError(f"there is no {what} {name!r}; there are {', '.join(there)}")
        return text.split(",")

    return parse


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


def _measure(options: argparse.Namespace, parts: Sequence[str], instructions: bool) -> dict[str, Any]:
    """Those parts, here."""
    span, milliseconds, repeats = options.span * MIB, options.milliseconds, options.repeats
    need_root()
    with clock_kept(instructions):
        result = facts()
    memory = []
    # first while nothing else of ublkd runs
    if "devices" in parts:
        result["devices"] = many.measure(many.COUNTS[:2] if options.quick else many.COUNTS, instructions)
    if "queues" in parts:
        with clock_kept(instructions):
            memory = fresh_memory(span)
        result["queues"] = scaling.measure(options.targets, repeats, milliseconds, span, instructions)
    if "speed" in parts:
        cells = tuple(cell for cell in fio.CELLS if cell.key in options.cells)
        late = _late(options)
        result |= measure(options.targets, cells, repeats, milliseconds, span, instructions, late)
        memory += result["memory"]
    return result | {"memory": memory}


def _late(options: argparse.Namespace) -> Callable[[], bool]:
    """Whether --minutes are over; in a VM, whose clock is another, the host says so."""
    if options.inside:
        return Path(os.environ["UBLKD_VM_SHARE"], _LATE).exists
    began = time.monotonic()
    return lambda: options.minutes is not None and time.monotonic() > began + 60 * options.minutes


def _inside(options: argparse.Namespace) -> int:
    """Some parts, in the VM that is for them."""
    one_group()
    result = _measure(options, options.parts, instructions=True)
    Path(os.environ["UBLKD_VM_SHARE"], _RESULT).write_text(json.dumps(result))
    return 0


def _measured(options: argparse.Namespace) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Parts, and what was found: here all at once, or each in the VM that is for it."""
    if options.native:
        yield options.parts, _measure(options, options.parts, instructions=False)
        return
    for part, machine in _VMS.items():
        if part in options.parts:
            yield [part], _in_vm(options, part, machine)


def _in_vm(options: argparse.Namespace, part: str, machine: list[str]) -> Any:
    with tempfile.TemporaryDirectory(prefix="ublkd-bench-") as share:
        inside = [str(TOP / "scripts" / "bench"), "--inside", "--parts", part]
        inside += ["--cells", ",".join(options.cells), "--span", str(options.span)]
        inside += ["--repeats", str(options.repeats), "--milliseconds", str(options.milliseconds)]
        inside += ["--targets", ",".join(options.targets)] if options.targets else []
        inside += ["--quick"] if options.quick else []
        machine = [*machine, "--env", "XDG_CACHE_HOME", "--share", share]
        command = [str(TOP / "scripts" / "vm"), options.kernel, *machine, "--", *inside]
        late = threading.Timer(60 * (options.minutes or 0), Path(share, _LATE).touch)
        late.daemon = True
        if options.minutes:
            late.start()
        vm = subprocess.Popen(command, cwd=TOP, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            assert vm.stderr
            clock = Clock()
            for line in vm.stderr:
                print(clock.stamp(line.rstrip("\n")), file=sys.stderr, flush=True)
            status = vm.wait()
        finally:
            late.cancel()
            # where we are told to end, it is to end by its own handler, so that no machine is left
            vm.terminate()
            vm.wait()
        if status:
            raise BenchError(f"the run in the VM failed with status {status}: see above")
        return json.loads(Path(share, _RESULT).read_text())


def _circumstances(
    options: argparse.Namespace, arguments: list[str], parts: list[str], result: dict[str, Any]
) -> dict[str, Any]:
    run = {
        "command": shlex.join(["scripts/bench", *arguments]),
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "milliseconds": options.milliseconds,
        "repeats": options.repeats,
        "span": options.span * MIB,
    }
    runs = {part: run for part in PARTS if part in parts}
    if "speed" in runs:
        runs["speed"] = run | {"repeats": result["rounds"]}
    return {"clock": "wall" if options.native else "instructions", "runs": runs}


def _earlier(out: Path) -> dict[str, Any]:
    """What is there already, for the parts that this run leaves as they are."""
    try:
        earlier: dict[str, Any] = json.loads(out.with_name(out.name + ".json").read_text())
    except (OSError, ValueError):
        return {}
    return earlier


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", TOP, *words], capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    if not commit:
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "daemon")
    return commit + (" with changes" if changed else "")


def _render(out: Path | None) -> int:
    if not out or not (result := _earlier(out)):
        raise BenchError("--render needs --out NAME of what was measured: there must be a NAME.json")
    _print(_write(result, out))
    return 0


def _write(result: dict[str, Any], out: Path) -> dict[str, Any]:
    """The files, out with their suffixes. The result as they hold it: its keys are text."""

    def path(suffix: str) -> Path:
        return out.with_name(out.name + suffix)

    text = json.dumps(result, indent=1)
    result = json.loads(text)
    path(".json").write_text(text + "\n")
    pictures = plot.plot(result, out)
    path(".md").write_text(report.markdown(result, out.name, [picture.name for picture in pictures]))
    say(f"wrote {os.path.relpath(path('.md'))}, .json and {len(pictures)} pictures")
    return result


def _print(result: dict[str, Any]) -> None:
    for table in report.tables(result).values():
        print(table, end="\n\n", flush=True)
