# SPDX-License-Identifier: Apache-2.0
"""Verbs on devices that exist: list, show, del, recover, resize, cleanup."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import click

from ublkd.cli.output import DEVICE, FromText, json_option, print_fields, print_json, print_table
from ublkd.units import format_size, parse_size


@click.command(
    epilog="""\b
Examples:
  ublkd list
  ublkd list --json | jq -r '.[] | select(.served | not) | .path'
"""
)
@json_option
def verb_list(as_json: bool) -> None:
    """Devices of other ublk servers are listed too, with what the driver says of them."""
    from ublkd import inventory

    devices = inventory.devices()
    if as_json:
        print_json(devices)
        return
    heads = ("DEVICE", "STATE", "TARGET", "SIZE", "MODE", "QUEUES", "DEPTH", "SERVER", "BACKING")
    rows = [
        (
            d["path"],
            _state(d),
            d["target"],
            _size(d),
            _mode(d),
            d["queues"],
            d["depth"],
            d["supervisor"],
            d["backing"] or None,
        )
        for d in devices
    ]
    print_table(heads, rows, right=("SIZE", "QUEUES", "DEPTH", "SERVER"))
    for d in devices:
        if d["note"]:
            click.echo(f"{d['path']}: {d['note']}")


@click.command(
    epilog="""\b
Examples:
  ublkd show 0
  ublkd show /dev/ublkb0 --json
"""
)
@click.argument("device", metavar="N", type=DEVICE)
@json_option
def verb_show(device: int, as_json: bool) -> None:
    """N is a device number or a path such as /dev/ublkb0."""
    found = _device(device)
    found["batch"] = _batch(found)
    if as_json:
        print_json(found)
        return
    from ublkd.control import uapi

    flags = uapi.flag_names(found["flags"] or 0)
    facts = found.pop("details")
    print_fields({**found, **facts, "state": _state(found), "size": _size(found), "flags": flags})


def _batch(d: dict[str, Any]) -> str | None:
    """Whether and why a device of ours has commands for many requests at once."""
    from ublkd import inventory
    from ublkd.control.commands import Control
    from ublkd.supervisor import create

    if d["owner"] != "ublkd" or d["flags"] is None or not d.get("on_crash"):
        return None
    settings = None
    with suppress(inventory.RecordError):
        settings = (inventory.read_record(d["id"]) or {}).get("settings")
    asked = settings.get("batch") if isinstance(settings, dict) else None
    with Control() as ctl:
        offered = ctl.get_features().has("BATCH_IO")
    return create.about_batch(d["flags"], d["transport"], d["on_crash"], str(asked), offered)


@click.command(
    epilog="""\b
Examples:
  ublkd del 0
  ublkd del /dev/ublkb1 /dev/ublkb2
  ublkd del 0 --lazy && rm disk.img
  ublkd del --all
"""
)
@click.argument("devices", metavar="[N]...", nargs=-1, type=DEVICE)
@click.option("--all", "everything", is_flag=True, help="All devices of ublkd.")
@click.option(
    "--force", is_flag=True, help="Also if it is in use, or of another server; do not wait for I/O."
)
@click.option("--lazy", is_flag=True, help="Wait until nobody uses it any more.")
def verb_del(devices: tuple[int, ...], everything: bool, force: bool, lazy: bool) -> int:
    """Requests in flight are finished first. A disk in use is refused, and who uses it is named: mount points,
    swap, devices on top, processes. N is a device number or a path such as /dev/ublkb0. Works as well on a device
    whose server is gone.
    """
    if force and lazy:
        raise click.UsageError("--force or --lazy, not both", click.get_current_context())
    if everything == bool(devices):
        raise click.UsageError("give device numbers, or --all", click.get_current_context())
    from ublkd import inventory, supervisor

    if everything:
        devices = tuple(d["id"] for d in inventory.devices() if d["owner"] == "ublkd")

    def remove(dev_id: int) -> None:
        if _device(dev_id)["owner"] == "ublkd":
            supervisor.stop_device(
                dev_id, force=force, lazy=lazy, say=lambda text: click.echo(f"ublkd: {text}", err=True)
            )
        else:
            inventory.remove_device(dev_id, force=force)

    return _each(devices, remove)


@click.command(
    epilog="""\b
Examples:
  ublkd recover 0
  ublkd recover 0 --foreground
"""
)
@click.argument("device", metavar="N", type=DEVICE)
@click.option("--foreground", is_flag=True, help="Serve it here instead of in the background.")
def verb_recover(device: int, foreground: bool) -> None:
    """The device is served with the settings it had; I/O that waited goes on. Prints the path."""
    from ublkd import supervisor

    path = supervisor.recover(device, background=not foreground)
    # In the foreground it was printed when the device went live, and is gone by now.
    if not foreground:
        click.echo(path)


@click.command(
    epilog="""\b
Examples:
  ublkd resize 0 8G
  truncate -s 8G disk.img && ublkd resize 0
"""
)
@click.argument("device", metavar="N", type=DEVICE)
@click.argument("size", required=False, type=FromText("SIZE", parse_size))
def verb_resize(device: int, size: int | None) -> None:
    """Without SIZE the device takes the size that its backing has now. Prints the new size in bytes."""
    from ublkd import supervisor

    click.echo(supervisor.resize(device, size))


@click.command(
    epilog="""\b
Examples:
  ublkd cleanup --dry-run
  ublkd cleanup
"""
)
@click.option("--dry-run", is_flag=True, help="Print what would be removed.")
def verb_cleanup(dry_run: bool) -> int:
    """Removes devices of ublkd whose server is gone, and stale records and files, and prints each. Whoever
    has such a device open gets I/O errors; a device in state quiesced can be served again with
    `ublkd recover` instead. Devices of other servers stay.
    """
    from ublkd import inventory

    left = [d for d in inventory.devices() if d["owner"] == "ublkd" and not d["served"]]
    # A dead device that somebody holds open is one that is being started.
    left = [d for d in left if d["state"] != "dead" or not inventory.holders_of(d["id"])]
    for d in left:
        click.echo(f"{d['path']} ({d['state']})")
    if dry_run:
        return 0
    status = _each([d["id"] for d in left], inventory.remove_device)
    for line in inventory.cleanup():
        click.echo(line)
    return status


def _device(dev_id: int) -> dict[str, Any]:
    from ublkd import inventory
    from ublkd.errors import UblkdError

    found = inventory.device(dev_id)
    if found is None:
        raise UblkdError(f"there is no device {dev_id}", "`ublkd list` shows which there are")
    return found


def _each(devices: Iterable[int], remove: Callable[[int], None]) -> int:
    """Call remove for every device, going on after errors; the exit status."""
    from ublkd.cli import fail
    from ublkd.errors import UblkdError

    status = 0
    for dev_id in devices:
        try:
            remove(dev_id)
        except UblkdError as error:
            status = fail(error.message, error.hint, error.exit_status)
    return status


def _state(device: dict[str, Any]) -> str:
    return str(device["state"]) if device["served"] else f"{device['state']}, unserved"


def _size(device: dict[str, Any]) -> str | None:
    return None if device["size"] is None else format_size(device["size"])


def _mode(device: dict[str, Any]) -> str | None:
    return None if device["read_only"] is None else "ro" if device["read_only"] else "rw"
