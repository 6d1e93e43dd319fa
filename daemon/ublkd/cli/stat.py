# SPDX-License-Identifier: Apache-2.0
"""stat: counters and latencies, read from shared memory while I/O runs."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import click

from ublkd.cli.output import DEVICE, json_option, print_json, print_table

HEADS = ("IOPS", "MB/s", "I/Os", "MB", "ERRORS", "MEAN us", "P50 us", "P99 us", "P99.9 us")


@click.command(
    epilog="""\b
Examples:
  ublkd stat
  ublkd stat 0 --watch
  ublkd stat /dev/ublkb0 --watch 0.5 --json
"""
)
@click.argument("device", metavar="[N]", required=False, type=DEVICE)
@click.option(
    "--watch",
    metavar="[SECONDS]",
    is_flag=False,
    flag_value="1",
    type=click.FloatRange(min=0.05),
    help="Print what happened in each interval until interrupted. [1 second]",
)
@click.option(
    "--count", metavar="N", type=click.IntRange(min=1), help="With --watch: stop after N intervals."
)
@json_option
def verb_stat(device: int | None, watch: float | None, count: int | None, as_json: bool) -> None:
    """All devices of ublkd, or device N (a number, or a path such as /dev/ublkb0). Counts and rates are those
    since the start of the device, with --watch those of the interval. MB are 10^6 bytes; latency is the time
    from a request's arrival in the worker to its answer. With --json an array, an object per device; with
    --watch one such line per interval.
    """
    if watch is None:
        if count is not None:
            raise click.UsageError("--count is for --watch", click.get_current_context())
        _show([_summary(snap, None) for snap in _snapshots(device)], as_json, False)
        return
    old = {snap["id"]: snap for snap in _snapshots(device)}
    try:
        while count is None or count > 0:
            time.sleep(watch)
            snaps = _snapshots(device)
            _show([_summary(snap, old.get(snap["id"])) for snap in snaps], as_json, True)
            old = {snap["id"]: snap for snap in snaps}
            count = count and count - 1
    except KeyboardInterrupt:
        # The way to end it, not a failure.
        return


def _snapshots(device: int | None) -> list[dict[str, Any]]:
    from ublkd.errors import UblkdError
    from ublkd.shm import reader

    if device is not None:
        return [reader.snapshot(device)]
    from ublkd import inventory

    snaps = []
    for record in inventory.records():
        try:
            snaps.append(reader.snapshot(record["id"]))
        except UblkdError:
            # It went away meanwhile, or its segment did.
            continue
    return snaps


def _summary(snap: dict[str, Any], old: dict[str, Any] | None) -> dict[str, Any]:
    """What `stat --json` prints of a device: since old, or since the start if there is no such."""
    from ublkd.shm import reader

    if old is not None and old["start_ns"] == snap["start_ns"]:
        snap = reader.delta(snap, old)
        seconds = snap["seconds"]
    else:
        seconds = (time.time_ns() - snap["start_ns"]) / 1e9
    queues = []
    for slot in snap["queues"]:
        words = {word: slot[word] for word in ("queue", "worker", "pid", "in_flight")}
        queues.append({**words, **_measure(slot["ops"].values(), seconds)})
    return {
        "id": snap["id"],
        "path": f"/dev/ublkb{snap['id']}",
        "seconds": round(seconds, 3),
        "queues": queues,
        "operations": {op: _measure([counters], seconds) for op, counters in reader.total(snap).items()},
        "total": {
            "in_flight": sum(queue["in_flight"] for queue in queues),
            **_measure(reader.total(snap).values(), seconds),
        },
    }


def _measure(counters: Iterable[dict[str, Any]], seconds: float) -> dict[str, Any]:
    from ublkd.shm import reader

    both = reader.zero()
    for each in counters:
        both = reader.add(both, each)
    ios, hist = both["ios"], both["hist"]
    seconds = max(seconds, 1e-9)
    return {
        "ios": ios,
        "bytes": both["bytes"],
        "errors": both["errors"],
        "iops": round(ios / seconds, 1),
        "mb_per_s": round(both["bytes"] / seconds / 1e6, 2),
        "latency_us": {
            "mean": round(both["lat_ns"] / ios / 1e3, 1) if ios else 0.0,
            **{name: round(reader.percentile(hist, p) / 1e3, 1) for name, p in PERCENTILES.items()},
        },
    }


PERCENTILES = {"p50": 50.0, "p99": 99.0, "p99.9": 99.9}


def _show(devices: list[dict[str, Any]], as_json: bool, watching: bool) -> None:
    if as_json and watching:
        import json

        click.echo(json.dumps(devices))
    elif as_json:
        print_json(devices)
    else:
        for device in devices:
            span = "in the last" if watching else "since the start,"
            click.echo(f"{device['path']}  {span} {_duration(device['seconds'])}")
            shared = any(q["worker"] for q in device["queues"])
            names = [f"queue {q['queue']}" + f".{q['worker']}" * shared for q in device["queues"]]
            rows = [
                (name, q["pid"], q["in_flight"], *_cells(q))
                for name, q in zip(names, device["queues"], strict=True)
            ]
            rows += [(op, "", "", *_cells(m)) for op, m in device["operations"].items() if m["ios"]]
            rows.append(("total", "", device["total"]["in_flight"], *_cells(device["total"])))
            print_table(("", "PID", "IN FLIGHT", *HEADS), rows, right=("PID", "IN FLIGHT", *HEADS))
            click.echo()


def _cells(m: dict[str, Any]) -> list[str]:
    rates = [f"{m['iops']:.0f}", f"{m['mb_per_s']:.1f}"]
    counts = [str(m["ios"]), f"{m['bytes'] / 1e6:.1f}", str(m["errors"])]
    return rates + counts + [f"{us:.0f}" if m["ios"] else "-" for us in m["latency_us"].values()]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
