# SPDX-License-Identifier: Apache-2.0
"""run, add and check-config: from settings to a served device."""

from __future__ import annotations

import os
from typing import Any

import click

from ublkd.cli.output import FromText, json_option, print_fields, print_json
from ublkd.config import schema
from ublkd.config.schema import SETTINGS, DeviceSpec, Setting
from ublkd.units import format_size


class ServeCommand(click.Command):
    """A command whose --help shows the options by the targets they are for."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record and isinstance(param, click.Option):
                groups.setdefault(getattr(param, "group", "This command"), []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)


class SettingOption(click.Option):
    """A setting's option. What was given is kept in the context's dict: name -> (value, flag)."""

    def __init__(self, setting: Setting, flags: tuple[str, ...], value: Any, tell_default: bool) -> None:
        self.setting, self.value = setting, value
        self.group = _group(setting)
        if value is not None:
            kind: dict[str, Any] = {"is_flag": True, "default": False}
        else:
            kind = {
                "type": FromText(setting.metavar, setting.parse),
                "metavar": setting.metavar,
                "multiple": isinstance(setting, schema.Table),
            }
        name = flags[-1].strip("-").replace("-", "_")
        super().__init__(
            [*flags, name], expose_value=False, callback=self.keep, help=_help(setting, value, tell_default), **kind
        )

    def keep(self, ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value is None or value is False or value == ():
            return
        if isinstance(self.setting, schema.Table):
            value = dict(value)
        elif self.value is not None:
            value = self.value
        given: dict[str, tuple[Any, str]] = ctx.ensure_object(dict)
        given[self.setting.name] = (value, self.opts[-1])


def _group(setting: Setting) -> str:
    if setting.section != "device":
        return setting.section.capitalize()
    return f"Only for {', '.join(setting.targets)}" if setting.targets else "Device"


def _help(setting: Setting, value: Any, tell_default: bool) -> str:
    text = _help_and_default(setting, value)
    return text if tell_default else text.rpartition(" [default")[0] or text


def _help_and_default(setting: Setting, value: Any) -> str:
    if isinstance(setting, schema.Switch):
        if value is setting.default:
            return f"{setting.help} [default]"
        return setting.help if value else setting.off_help
    if isinstance(setting, schema.Choice):
        if value is not None:
            return f"{setting.help.rstrip('.')}: {setting.choices[value].split(' (')[0]}."
        words = ", ".join(f"{word} ({what})" if what else word for word, what in setting.choices.items())
        return f"{setting.help} {words}. [default: {setting.default}]"
    default = setting.default_text()
    return setting.help if default in ("", "{}") else f"{setting.help} [default: {default}]"


def settings_options(scope: str = "") -> list[click.Option]:
    """The options of all settings, or of those of a scope, where what isn't given stays as it is."""
    ordered = sorted(SETTINGS.values(), key=lambda s: (s.section != "device", bool(s.targets), s.targets))
    ordered = [s for s in ordered if scope in ("", s.scope)]
    return [SettingOption(s, flags, value, not scope) for s in ordered for flags, value in s.spellings()]


def _complete_target(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in schema.target_names() if name.startswith(incomplete)]


def _serve_params() -> list[click.Parameter]:
    return [
        click.Argument(["target"], required=False, shell_complete=_complete_target),
        click.Argument(["words"], nargs=-1, metavar="[FILE]", type=click.Path(readable=False)),
        *settings_options(),
        click.Option(
            ["--config"], metavar="FILE", type=click.Path(), help="Read settings from this TOML file."
        ),
        click.Option(["--dry-run"], is_flag=True, help="Print what would be done; create nothing."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print JSON."),
    ]


def _spec(
    given: dict[str, tuple[Any, str]], target: str | None, words: tuple[str, ...], config: str | None
) -> tuple[DeviceSpec, dict[str, Any]]:
    """The device that a command line asks for, and where that is written: config file and given settings."""
    from ublkd.config import loader
    from ublkd.errors import UsageError

    values = {name: value for name, (value, _) in given.items()}
    if target is not None:
        values["target"] = _known_target(target)
        if words and target not in (SETTINGS["file"].targets):
            raise UsageError(f"the {target} target takes no file: {words[0]!r}")
        if len(words) > 1:
            raise UsageError(f"one file too many: {words[1]!r}", "a device has one backing")
        if words:
            values["file"] = os.path.abspath(words[0])
    elif config is None and os.path.exists(loader.DEFAULT_FILE):
        config = loader.DEFAULT_FILE
    elif config is None:
        values["target"] = "memory"
        size = values.get("size", schema.DEFAULT_SIZES["memory"])
        click.echo(
            f"ublkd: no target is named and there is no {loader.DEFAULT_FILE}: serving a memory device of "
            f"{format_size(size)}",
            err=True,
        )
    file_target = loader.load(config).get("target") if config and "target" not in values else None
    for name, (_, flag) in given.items():
        fault = loader.misplaced(name, values.get("target") or file_target or "")
        if fault:
            raise UsageError(f"{flag} {fault}")
    return loader.resolve(values, config), {"config": config and os.path.abspath(config), "given": values}


def _known_target(target: str) -> str:
    from ublkd.errors import UsageError

    names = schema.target_names()
    if target in names:
        return target
    if os.path.exists(target):
        raise UsageError(f"{target!r} is no target", f"to serve a file: ublkd run loop {target}")
    hint = schema.nearest(target, names) or f"the targets are {', '.join(names)}"
    raise UsageError(f"{target!r} is no target", hint)


def _serve(
    verb: str, target: str | None, words: tuple[str, ...], config: str | None, dry_run: bool, json: bool
) -> int:
    from ublkd.errors import UsageError

    if verb == "run" and json and not dry_run:
        raise UsageError("run --json needs --dry-run", "add --json prints the device")
    spec, origin = _spec(click.get_current_context().ensure_object(dict), target, words, config)
    from ublkd import log, supervisor

    if dry_run:
        plan = supervisor.plan(spec)
        (print_json if json else print_fields)(plan)
        return 0
    log.setup(spec.log_level, spec.log_format)
    if verb == "run":
        return supervisor.run_foreground(spec, origin=origin)
    path = supervisor.run_background(spec, origin=origin)
    if not json:
        click.echo(path)
        return 0
    from ublkd import inventory

    print_json(next(device for device in inventory.devices() if device["path"] == path))
    return 0


def _run(target: str | None, words: tuple[str, ...], config: str | None, dry_run: bool, as_json: bool) -> int:
    return _serve("run", target, words, config, dry_run, as_json)


def _add(target: str | None, words: tuple[str, ...], config: str | None, dry_run: bool, as_json: bool) -> int:
    return _serve("add", target, words, config, dry_run, as_json)


TARGET_HELP = """\b
TARGET is one of
  loop FILE           a regular file or a block device
  memory              a RAM disk
  null                nothing: writes are dropped
  python FILE:CLASS   a class in a Python file

Without a TARGET, the file named by --config or /etc/ublkd/ublkd.toml says what to serve; without
either it is a memory device of 1 GiB. With a TARGET, only a file named by --config is read, and
options here win over it.
"""

verb_run = ServeCommand(
    "run",
    callback=_run,
    params=_serve_params(),
    help=f"""SIGINT or SIGTERM stops and removes the device; a second signal is faster.

{TARGET_HELP}""",
    epilog="""\b
Examples:
  ublkd run loop disk.img -q 4 --cpus 0-3
  ublkd run loop /dev/vdb --read-only
  ublkd run memory --size 4G
  ublkd run null -q 8 -d 256 --dry-run
  ublkd run --config /etc/ublkd/data.toml
""",
)

verb_add = ServeCommand(
    "add",
    callback=_add,
    params=_serve_params(),
    help=f"""Nothing but the path is printed on standard output; `ublkd del` ends it.

{TARGET_HELP}""",
    epilog="""\b
Examples:
  disk=$(ublkd add loop disk.img -q 2) && mkfs.ext4 $disk
  ublkd add python my_disk.py:RamDisk --size 1G -q 2
  ublkd add loop disk.img -n 7 --json
""",
)


@click.command(
    epilog="""\b
Examples:
  ublkd check-config
  ublkd check-config data.toml && systemctl start ublkd@data
"""
)
@click.argument("file", required=False, type=click.Path())
@json_option
def verb_check_config(file: str | None, as_json: bool) -> None:
    """FILE is /etc/ublkd/ublkd.toml unless given. Prints every setting as it would be used. Needs no driver
    and no privilege, and does not touch the backing; `ublkd run --config FILE --dry-run` does.
    """
    from ublkd import targets
    from ublkd.config import loader

    path = file or loader.DEFAULT_FILE
    spec = loader.resolve({}, path)
    targets.get(spec.target).check(spec)
    if as_json:
        print_json(spec.to_dict())
        return
    click.echo(f"{path}: ok")
    fitting = {name: s for name, s in SETTINGS.items() if not loader.misplaced(name, spec.target)}
    print_fields({name: s.shown(getattr(spec, name)) for name, s in fitting.items()}, "  ")
