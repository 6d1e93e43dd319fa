# SPDX-License-Identifier: Apache-2.0
"""The command line of ``scripts/tune``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import click
from benchlib.system import BenchError

from ublkd.cli.output import print_json
from ublkd.errors import UblkdError

from . import measure, record, show
from .apply import apply, undo
from .disk import ATTRIBUTES, find, valid
from .rules import PROFILES, WORKERS, plan

_EPILOG = """\b
Examples:
  scripts/tune 0                       show what would change, and why
  scripts/tune 0 --apply               change it; --undo puts back what was there
  scripts/tune 0 --measure             does it pay? the disk is only read, and then as it was
  scripts/tune /dev/ublkb0 --profile throughput --measure --apply
  scripts/tune 0 --set read_ahead_kb=512 --measure --repeats 9

\b
Exit status: 0 done; 1 failed, and nothing is changed; 2 wrong usage; 130 interrupted.
docs/tuning.md has the figures that the reasons refer to."""


def _asked(ctx: click.Context, param: click.Parameter, texts: Sequence[str]) -> dict[str, str]:
    asked = {}
    for text in texts:
        key, _, value = text.partition("=")
        if key not in ATTRIBUTES:
            raise click.BadParameter(f"there is no {key!a}; there are {', '.join(ATTRIBUTES)}")
        if not valid(key, value):
            raise click.BadParameter(f"{value!a} is no value for {key}")
        asked[key] = value
    return asked


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("device")
@click.option("--apply", "do_apply", is_flag=True, help="Make the changes, all or none of them.")
@click.option("--undo", "do_undo", is_flag=True, help="Put back what was there before the first --apply.")
@click.option("--measure", "do_measure", is_flag=True, help="Measure before and after with fio, in turns.")
@click.option("--write", is_flag=True, help="Measure writes too. THIS DESTROYS WHAT IS ON THE DISK.")
@click.option("--repeats", type=click.IntRange(1, 1000), default=5, show_default=True, help="Rounds of --measure.")
@click.option(
    "--milliseconds",
    type=click.IntRange(10, 3600_000),
    default=2000,
    show_default=True,
    help="For each workload and round of --measure.",
)
@click.option(
    "--profile",
    type=click.Choice(PROFILES),
    default="balanced",
    show_default=True,
    help="latency: less read-ahead, for mapped files read at random. throughput: no I/O accounting.",
)
@click.option(
    "--set", "asked", multiple=True, metavar="KEY=VALUE", callback=_asked, help="Change this too; may be repeated."
)
@click.option("--workers", "move_workers", is_flag=True, help="Move badly placed workers, by `ublkd upgrade`.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def tune(
    device: str,
    do_apply: bool,
    do_undo: bool,
    do_measure: bool,
    write: bool,
    repeats: int,
    milliseconds: int,
    profile: str,
    asked: dict[str, str],
    move_workers: bool,
    as_json: bool,
) -> None:
    """What a performance engineer would set for a disk that ublkd serves: shown as a diff with reasons. Nothing is
    changed unless --apply or --measure is given.

    DEVICE is a number N of ublkd's or a path such as /dev/ublkb0. Other disks are left as they are, but for --set.
    """
    if do_undo and (do_apply or do_measure or asked or move_workers):
        raise click.UsageError("--undo goes alone")
    if write and not do_measure:
        raise click.UsageError("--write is for --measure")
    disk = find(device)
    changing = do_apply or do_undo or do_measure
    with disk.locked() if changing else nullcontext():
        disk.ask_ublkd()
        if changing:
            disk.check_served()
        if do_undo:
            _undo(disk, as_json)
            return
        found = plan(disk, profile, asked, move_workers)
        more: dict[str, Any] = {}
        if not as_json:
            click.echo(show.diff(disk, found, profile))
        if do_measure and found.changes:
            more["measured"] = measure.measure(disk, found, repeats, milliseconds, write, _say)
            if not as_json:
                click.echo(f"\n{measure.table(more['measured'])}")
        elif do_measure:
            _say("nothing to change, so nothing to compare: --set KEY=VALUE tries one")
        if do_apply and found.changes:
            apply(disk, found)
            _say(f"applied; `scripts/tune {device} --undo` puts back what {record.path_of(disk)} has")
        if as_json:
            print_json(show.document(disk, found, profile, applied=do_apply and bool(found.changes), **more))


def _undo(disk: Any, as_json: bool) -> None:
    originals, before = undo(disk)
    back = {key: (before.get(key), value) for key, value in originals.attributes.items() if before.get(key) != value}
    if as_json:
        restored = {key: value for key, (_, value) in back.items()}
        print_json({"device": disk.path, "restored": restored, "workers_moved_back": originals.moved})
        return
    for key, (old, new) in back.items():
        click.echo(f"-{key}  {old}\n+{key}  {new}")
    if originals.moved:
        click.echo(f"+{WORKERS}  as their setting says again")


def _say(text: str) -> None:
    click.echo(f"tune: {text}", err=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        tune.main(
            sys.argv[1:] if arguments is None else list(arguments), prog_name="scripts/tune", standalone_mode=False
        )
        return 0
    except click.UsageError as error:
        return _fail(error.format_message().rstrip("."), "see scripts/tune --help", 2)
    except UblkdError as error:
        return _fail(error.message, error.hint, error.exit_status)
    except BenchError as error:
        return _fail(str(error), "", 1)
    except (click.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT


def _fail(message: str, hint: str, status: int) -> int:
    _say(" ".join(f"error: {message}{f' ({hint})' if hint else ''}".split("\n")))
    return status
