# SPDX-License-Identifier: Apache-2.0
"""upgrade: a live device gets a new server."""

from __future__ import annotations

from typing import Any

import click

from ublkd.cli.output import DEVICE, print_json
from ublkd.cli.serve import ServeCommand, settings_options


def _upgrade(devices: tuple[int, ...], everything: bool, as_json: bool) -> int:
    from ublkd import inventory, supervisor
    from ublkd.cli import fail
    from ublkd.errors import UblkdError

    ctx = click.get_current_context()
    if everything == bool(devices):
        raise click.UsageError("give device numbers, or --all", ctx)
    if everything:
        devices = tuple(d["id"] for d in inventory.devices() if d["owner"] == "ublkd" and d["served"])
    settings = {name: value for name, (value, _) in ctx.ensure_object(dict).items()}
    status, results = 0, list[dict[str, Any]]()
    for dev_id in devices:
        try:
            done = supervisor.upgrade(dev_id, settings)
        except UblkdError as error:
            named = f"device {dev_id}" in error.message
            status = fail(
                error.message if named else f"device {dev_id}: {error.message}", error.hint, error.exit_status
            )
            continue
        results.append({"id": dev_id, "path": f"/dev/ublkb{dev_id}", **done})
        if not as_json:
            click.echo(
                f"/dev/ublkb{dev_id}: served by process {done['pid']}, version {done['version']}, "
                f"after a pause of {done['pause_ms']:.0f} ms"
            )
    if as_json:
        print_json(results)
    return status


verb_upgrade = ServeCommand(
    "upgrade",
    callback=_upgrade,
    params=[
        click.Argument(["devices"], metavar="[N]...", nargs=-1, type=DEVICE),
        click.Option(["--all", "everything"], is_flag=True, help="All devices that are served."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print JSON."),
        *settings_options("hot"),
    ],
    help="""The device stays, and whoever uses it notices a pause at most: requests in flight are finished, new ones
    wait. If the new version does not start, or does not serve, the old one goes on. Settings not named here can't
    change while the device is live. SIGHUP to a supervisor does the same, with what its configuration file says then.
    N is a device number or a path such as /dev/ublkb0.
    """,
    epilog="""\b
Examples:
  pip install --upgrade ublkd && ublkd upgrade --all
  ublkd upgrade 0 --cpus 4-7
  ublkd upgrade 0 1 --log-level debug --json
""",
)
