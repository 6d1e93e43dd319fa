# SPDX-License-Identifier: Apache-2.0
"""The command line of ``scripts/vm``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from pathlib import Path

from . import accel, debug, kernels, qemu
from .boot import Run, Sink
from .disks import Disk, parse_size
from .job import Job, guest_environment
from .outcome import CANNOT_START, EXIT_STATUS_HELP, Outcome, VMError

_DESCRIPTION = """\
Run COMMAND as root in a real Debian kernel under QEMU, in the current directory, with this machine's files
as its root: what the guest writes to them is gone afterwards, except in --share. No command: a shell."""

_EPILOG = f"""\
kernels:
  bookworm or 6.1 (no ublk driver), 6.12, newest (7.2 or later): the latest of its kind, looked up once a day

in the guest:
  ublk_drv is loaded if there is one; modprobe finds all of the kernel's modules; udevd runs, nothing else.
  UBLKD_VM_DISKS lists the --disk devices in order, UBLKD_VM_SHARE is the --share directory.
  Files that change on the host during a run may appear stale or give EIO.

{EXIT_STATUS_HELP}"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    parse = argparse.ArgumentParser(
        prog="vm",
        usage="vm [KERNEL] [options] [-- COMMAND...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parse.add_argument("kernel", nargs="?", default=kernels.DEFAULT, help="kernel (default %(default)s)")
    parse.add_argument("--list", action="store_true", help="list the kernels and whether they are cached")
    parse.add_argument("--json", action="store_true", help="with --list: print JSON")
    parse.add_argument("--fetch", action="store_true", help="fetch the kernel if need be; run nothing")
    parse.add_argument("--debug", action="store_true", help="that kernel's source built to find bugs (scripts/driver)")
    parse.add_argument("--cpus", type=_positive, metavar="N", help="virtual CPUs (default 2; 1 with --icount)")
    parse.add_argument("--memory", type=_size, default=3 << 30, metavar="SIZE", help="memory (default 3G)")
    parse.add_argument(
        "--disk",
        type=_disk,
        action="append",
        default=[],
        metavar="SIZE[,sector=4096][,discard]",
        help="add a scratch disk",
    )
    parse.add_argument("--share", type=Path, metavar="DIR", help="a directory that the guest can write to")
    parse.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="pass a variable (PATH, HOME, LANG, TERM, CI and UBLKD_* are passed anyway)",
    )
    parse.add_argument(
        "--timeout", type=float, default=1800.0, metavar="SECONDS", help="the command's time (default 1800)"
    )
    parse.add_argument(
        "--module",
        type=Path,
        action="append",
        default=[],
        metavar="FILE.ko",
        help="load a module before the command, instead of the kernel's own ublk_drv",
    )
    parse.add_argument("--no-ublk", action="store_true", help="don't load ublk_drv")
    parse.add_argument("--require-ublk", action="store_true", help="fail without /dev/ublk-control")
    parse.add_argument("--icount", action="store_true", help="instruction clock, for measuring: slow")
    parse.add_argument(
        "--plugin", metavar="FILE.so[,NAME=VALUE...]", help="a plugin of QEMU's (scripts/experiments/instructions)"
    )
    parse.add_argument("--append", default="", metavar="ARGS", help="add to the kernel command line")
    parse.add_argument("--log", type=Path, metavar="FILE", help="keep console in FILE, dmesg in FILE.dmesg")
    parse.add_argument("--kvm", choices=("auto", "on", "off"), default="auto", help="use /dev/kvm (auto: if it works)")
    return parse


TRIES = 3
"""Boots of one command. More than one only where the emulator, and not the guest, is to blame."""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser().parse_args(arguments[:split])
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGHUP, _terminate)
    try:
        if options.list:
            return _list(options.json)
        return _run(options, arguments[split + 1 :])
    except VMError as error:
        say(str(error))
        return CANNOT_START
    except BrokenPipeError:
        # whoever read our output is gone: leave as a program would that SIGPIPE ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def say(text: str) -> None:
    """One line to the user, apart from the command's own output."""
    print(f"vm: {text}", file=sys.stderr, flush=True)


def _terminate(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _list(as_json: bool) -> int:
    store = kernels.Store()
    rows = []
    for name in kernels.SERIES:
        kernel = store.cached(name)
        aliases = [alias for alias, meant in kernels.ALIASES.items() if meant == name]
        release = kernel.release if kernel else None
        rows.append({"name": name, "aliases": aliases, "release": release, "cached": bool(kernel)})
        if not as_json:
            print(f"{', '.join([name, *aliases]):16}  {release or 'not fetched yet'}")
    if as_json:
        print(json.dumps(rows, indent=2))
    return 0


def _run(options: argparse.Namespace, command: list[str]) -> int:
    store = (debug.Store if options.debug else kernels.Store)(say=say)
    kernel = store.get(options.kernel, refresh=options.fetch)
    if options.fetch:
        say(f"kernel {options.kernel} is {kernel.release}" + (f" ({kernel.note})" if kernel.note else ""))
        return 0
    job, machine = _job(options, command), _machine(options, command)
    machine.kvm = not options.icount and accel.use_kvm(options.kvm, kernel)
    how = "KVM" if machine.kvm else "instruction clock" if options.icount else "emulated"
    say(f"kernel {kernel.release} ({how})" + (f"; {kernel.note}" if kernel.note else ""))
    with _terminal(job.interactive) as sink:
        for left in reversed(range(TRIES)):
            run = Run(kernel, machine, job, sink, options.timeout)
            try:
                outcome = run.execute()
            finally:
                _keep_logs(run, options.log, job.share)
            if not run.emulator_slipped or not left:
                break
            say("the emulator ran into code that the kernel was patching (Oops: int3): starting over")
    _explain(outcome)
    return outcome.status


def _explain(outcome: Outcome) -> None:
    if outcome.from_command:
        return
    say(outcome.message)
    for line in outcome.details:
        print(f"  {line}", file=sys.stderr)


def _job(options: argparse.Namespace, command: list[str]) -> Job:
    for module in options.module:
        if not module.is_file():
            raise VMError(f"there is no module file {module}")
    if not command and not os.isatty(0):
        raise VMError("an interactive shell needs a terminal: give a command after --")
    size = shutil.get_terminal_size()
    return Job(
        command=command,
        directory=Path.cwd(),
        environment=guest_environment(options.env),
        share=_share(options.share),
        disks=options.disk,
        modules=options.module,
        load_ublk=not options.no_ublk and not options.module,
        require_ublk=options.require_ublk,
        window=(size.columns, size.lines),
    )


def _machine(options: argparse.Namespace, command: list[str]) -> qemu.Machine:
    return qemu.Machine(
        cpus=options.cpus or (1 if options.icount else 2),
        memory=options.memory,
        icount=options.icount,
        append=options.append,
        plugin=options.plugin,
        disks=options.disk,
        share=_share(options.share),
        terminal=not command,
    )


def _share(path: Path | None) -> Path | None:
    if path is None:
        return None
    if not path.is_dir():
        raise VMError(f"--share: there is no directory {path}")
    return path.resolve()


def _keep_logs(run: Run, log: Path | None, share: Path | None) -> None:
    kernel_log = "".join(f"{line}\n" for line in run.kernel_log)
    if log:
        log.write_text(run.console)
        log.with_name(log.name + ".dmesg").write_text(kernel_log)
    if share:
        (share / "dmesg.txt").write_text(kernel_log)


@contextlib.contextmanager
def _terminal(interactive: bool) -> Iterator[Sink]:
    if not interactive:
        yield Sink()
        return
    before = termios.tcgetattr(0)
    try:
        # now: the default would drop what was typed while QEMU started
        tty.setraw(0, termios.TCSANOW)
        yield Sink(terminal=0)
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _disk(text: str) -> Disk:
    try:
        return Disk.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
