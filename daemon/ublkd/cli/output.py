# SPDX-License-Identifier: Apache-2.0
"""Tables, field lists and JSON on standard output, and the parameter types that verbs share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


class FromText(click.ParamType):  # type: ignore[type-arg]  # generic only in newer click
    """What a function makes of the text; its ValueError is the message."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def parse_device(text: str) -> int:
    """Device number from a number or the path of its node, links included."""
    name = os.path.realpath(text) if "/" in text else text
    digits = name.removeprefix("/dev/").removeprefix("ublkb").removeprefix("ublkc")
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError(f"{text!r} is no ublk device; give a number N or /dev/ublkbN")
    return int(digits)


DEVICE = FromText("N", parse_device)


def print_json(value: Any) -> None:
    import json

    click.echo(json.dumps(value, indent=2))


def print_table(heads: Sequence[str], rows: Iterable[Sequence[Any]], right: Iterable[str] = ()) -> None:
    """Columns two spaces apart, those named in right flush right; None shows as a dash."""
    table = [list(heads)] + [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    to_right = [head in set(right) for head in heads]
    for row in table:
        cells = zip(row, widths, to_right, strict=True)
        click.echo("  ".join(c.rjust(width) if r else c.ljust(width) for c, width, r in cells).rstrip())


def print_fields(fields: Mapping[str, Any], indent: str = "") -> None:
    """One `name  value` line per field; values that are mappings or lists of them go below, indented."""
    width = max((len(_label(name)) for name in fields), default=0)
    for name, value in fields.items():
        nested = value if isinstance(value, list) else [value]
        if nested and all(isinstance(item, Mapping) for item in nested):
            click.echo(f"{indent}{_label(name)}")
            for item in nested:
                if isinstance(value, list):
                    click.echo(f"{indent}  " + "  ".join(f"{_label(k)} {_text(v)}" for k, v in item.items()))
                else:
                    print_fields(item, indent + "  ")
        else:
            click.echo(f"{indent}{_label(name).ljust(width)}  {_text(value)}".rstrip())


def _label(name: object) -> str:
    return str(name).replace("_", " ")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value) or "-"
    return str(value)
