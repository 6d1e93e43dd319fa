# SPDX-License-Identifier: Apache-2.0
"""The command line. Verbs live in this package's modules and are imported when they are asked for.

Modules here import only click and light parts of ublkd at their top; everything else inside the verbs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from inspect import cleandoc

import click

from ublkd._version import __version__

# verb: (module of this package, what it does)
VERBS = {
    "run": ("serve", "Serve a device in the foreground until interrupted."),
    "add": ("serve", "Serve a device in the background; print its path once it is live."),
    "del": ("devices", "Stop and remove devices."),
    "list": ("devices", "List all ublk devices."),
    "show": ("devices", "Show one device in full."),
    "stat": ("stat", "Show I/O counters and latencies."),
    "recover": ("devices", "Serve a device again whose server is gone."),
    "upgrade": ("upgrade", "Replace the server of live devices by this version, or change settings."),
    "resize": ("devices", "Change the size of a live device."),
    "cleanup": ("devices", "Remove what nobody serves any more."),
    "features": ("about", "Show what the running ublk driver can do."),
    "targets": ("about", "List what a device can be served by."),
    "check-config": ("serve", "Check a configuration file."),
    "version": ("about", "Show the version."),
}

EPILOG = """\b
Short forms:
  ublkd -q 4 --cpus 0-3 disk.img   = ublkd run loop disk.img -q 4 --cpus 0-3
  ublkd -q 4 --cpus 0-3            serves what /etc/ublkd/ublkd.toml or --config FILE
                                   says; without one, a memory device of 1 GiB

\b
Examples:
  ublkd add loop disk.img -q 2     serve an image file, print /dev/ublkbN
  ublkd list                       see it
  ublkd stat --watch               see what it does
  ublkd del 0                      remove /dev/ublkb0

\b
Exit status: 0 done; 1 failed; 2 wrong usage; 130 interrupted.
Shell completion: eval "$(_UBLKD_COMPLETE=bash_source ublkd)"   (or zsh_source, fish_source)
More: man ublkd, man ublkd.toml
"""


class Verbs(click.Group):
    """The verbs of VERBS, each imported when it is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, summary = VERBS[cmd_name]
        verb = getattr(import_module(f"ublkd.cli.{module}"), "verb_" + cmd_name.replace("-", "_"))
        assert isinstance(verb, click.Command)
        if not verb.short_help:
            verb.short_help = summary
            verb.help = f"{summary}\n\n{cleandoc(verb.help or '')}"
        return verb

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own would import every verb for its one line.
        with formatter.section("Verbs"):
            formatter.write_dl([(name, summary) for name, (_, summary) in VERBS.items()])


@click.command(
    cls=Verbs,
    epilog=EPILOG,
    subcommand_metavar="VERB [ARGS]...",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="%(version)s")
def ublkd() -> None:
    """Serve files, disks, memory and Python code as Linux block devices.

    One supervisor per device, one worker process per hardware queue. `ublkd VERB --help` tells more.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; the exit status."""
    try:
        args = expand(list(sys.argv[1:] if argv is None else argv))
        status = ublkd.main(args, prog_name="ublkd", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.BadParameter as error:
        # click's own text lists every spelling; ours ends in what is accepted.
        named = f"{error.param.opts[-1]}: " if isinstance(error.param, click.Option) else ""
        text = error.format_message() if isinstance(error, click.MissingParameter) else error.message
        return fail(f"{named}{text}".rstrip("."), "", 2)
    except click.UsageError as error:
        verb = error.ctx.command_path if error.ctx else "ublkd"
        return fail(error.format_message().rstrip("."), f"see {verb} --help", 2)
    except click.ClickException as error:
        return fail(error.format_message(), "", error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # The interpreter flushes once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        from ublkd.errors import UblkdError

        if not isinstance(error, UblkdError):
            raise
        return fail(error.message, error.hint, error.exit_status)


def fail(message: str, hint: str, status: int) -> int:
    """Print the one line that an error gets; return the exit status."""
    line = f"ublkd: error: {message}" + (f" ({hint})" if hint else "")
    print(" ".join(line.split("\n")), file=sys.stderr)
    return status


def expand(args: list[str]) -> list[str]:
    """The long form of a short command line: a first word that is no verb is a file to serve."""
    if not args:
        return ["--help"]
    if args[0] in VERBS or args[0] in ("-h", "--help", "--version"):
        return args
    at = _first_word(args)
    if at is None:
        return ["run", *args]
    word = args[at]
    if word in VERBS:
        return [word, *args[:at], *args[at + 1 :]]
    if "/" not in word and not os.path.exists(word):
        _refuse_word(word)
    return ["run", "loop", *args]


def _first_word(args: list[str]) -> int | None:
    """Index of the first argument that is neither an option of `run` nor an option's value."""
    from ublkd.cli.serve import verb_run

    takes_value = {
        flag: not option.is_flag
        for option in verb_run.params
        if isinstance(option, click.Option)
        for flag in option.opts
    }
    at = 0
    while at < len(args):
        arg = args[at]
        if arg == "--":
            return at + 1 if at + 1 < len(args) else None
        if not arg.startswith("-") or arg == "-":
            return at
        if arg.startswith("--"):
            at += takes_value.get(arg, False)
        else:
            # A cluster as in -rq4: the first letter that takes a value takes the rest, or the next argument.
            for place, letter in enumerate(arg[1:], 2):
                if takes_value.get(f"-{letter}"):
                    at += place == len(arg)
                    break
        at += 1
    return None


def _refuse_word(word: str) -> None:
    from ublkd.config.schema import nearest, target_names
    from ublkd.errors import UsageError

    hint = f"did you mean 'ublkd run {word}'?" if word in target_names() else nearest(word, VERBS)
    # Something like disk.img is a file that is missing: the loop target says so.
    if hint or "." not in word:
        raise UsageError(f"{word!r} is neither a verb nor a file", hint or "see ublkd --help")
