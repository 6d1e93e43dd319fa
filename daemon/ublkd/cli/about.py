# SPDX-License-Identifier: Apache-2.0
"""Verbs on no device: features, targets, version."""

from __future__ import annotations

import click

from ublkd.cli.output import json_option, print_fields, print_json, print_table

# io_uring's own set-up flags that matter here, by their bits.
RING_FLAGS = {
    "CQSIZE": 3,
    "COOP_TASKRUN": 8,
    "SQE128": 10,
    "SINGLE_ISSUER": 12,
    "DEFER_TASKRUN": 13,
    "NO_SQARRAY": 16,
}


@click.command(
    epilog="""\b
Examples:
  ublkd features
  ublkd features --json
"""
)
@json_option
def verb_features(as_json: bool) -> None:
    """Asks the loaded driver itself; needs no device and, on most systems, root. SINCE is the first Linux
    release with the feature; a backport may have it earlier.
    """
    from ublkd import native
    from ublkd.control import features, uapi
    from ublkd.control.commands import Control
    from ublkd.errors import UblkdError

    with Control() as control:
        found = features.probe(control)
    try:
        bits = native.ring_flags()
    except OSError as error:
        message = f"io_uring can't be used: {error.strerror}"
        raise UblkdError(message, "see /proc/sys/kernel/io_uring_disabled") from None
    ring = [name for name, bit in RING_FLAGS.items() if bits >> bit & 1]
    unknown = [name for name in found.names() if name not in uapi.FLAGS]
    if as_json:
        flags = {name: found.has(name) for name in uapi.FLAGS} | dict.fromkeys(unknown, True)
        print_json({"features": int(found), "assumed": found.assumed, "flags": flags, "io_uring": ring})
        return
    if found.assumed:
        click.echo("This driver can't be asked; these are what all drivers of its age have.")
    rows = [("yes" if found.has(name) else "no", name, f.since, f.doc) for name, f in uapi.FLAGS.items()]
    rows += [("yes", name, "-", "not known to this version of ublkd") for name in unknown]
    print_table(("", "FEATURE", "SINCE", "MEANING"), rows)
    click.echo()
    print_fields({"features": f"{int(found):#x}", "io_uring": ring})


@click.command(
    epilog="""\b
Examples:
  ublkd targets
  ublkd targets --json
"""
)
@json_option
def verb_targets(as_json: bool) -> None:
    """`ublkd run --help` shows the options of each."""
    from ublkd.targets import TARGETS

    if as_json:
        print_json([{"name": name, "about": about} for name, (_, _, about) in TARGETS.items()])
        return
    print_table(("TARGET", "ABOUT"), [(name, about) for name, (_, _, about) in TARGETS.items()])


@click.command(
    epilog="""\b
Examples:
  ublkd version
"""
)
@json_option
def verb_version(as_json: bool) -> None:
    """The same as `ublkd --version`."""
    from ublkd._version import __version__

    if as_json:
        print_json({"version": __version__})
        return
    click.echo(__version__)
