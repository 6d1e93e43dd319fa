# SPDX-License-Identifier: Apache-2.0
"""Reads a device's counters while it runs. Any process that may read the file may do so."""

from __future__ import annotations

import os
import struct
import time
from typing import Any

from ublkd.errors import UblkdError
from ublkd.shm import layout

Counters = dict[str, Any]


def snapshot(dev_id: int) -> dict[str, Any]:
    """All counters of a device.

    {"id", "time_ns" (CLOCK_MONOTONIC), "start_ns" (CLOCK_REALTIME), "size", "depth", "workers_per_queue",
    "queues": [...]} with one dict per worker: the words of layout.QUEUE_WORDS, "queue", "worker" (0, 1... of that
    queue), "in_flight", and "ops": {name: {"ios",
    "bytes", "errors", "lat_ns", "hist"}}. Raises UblkdError where there is no such segment or not of our
    version.
    """
    path = f"/dev/shm/{layout.name_of(dev_id)}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise UblkdError(f"device {dev_id} has no counters", hint="`ublkd list` shows what is served") from None
    except PermissionError:
        raise UblkdError(f"{path} may not be read", hint="run as root") from None
    try:
        data = os.pread(fd, os.fstat(fd).st_size, 0)
    finally:
        os.close(fd)
    return _parse(dev_id, path, data, time.monotonic_ns())


def _parse(dev_id: int, path: str, data: bytes, now_ns: int) -> dict[str, Any]:
    size = struct.calcsize(layout.HEADER_FORMAT)
    head = struct.unpack_from(layout.HEADER_FORMAT, data) if len(data) >= size else (0,) * 12
    magic, version, header_bytes, slot_bytes, nr_slots, _dev, depth, _pid, start_ns, dev_bytes, shares, _ = head
    shares = shares or 1  # versions without them had zeroes there
    if magic != layout.MAGIC or version != layout.VERSION or slot_bytes != layout.SLOT_BYTES:
        raise UblkdError(f"{path} holds no counters of this version", hint="was the device started by another ublkd?")
    if len(data) < header_bytes + nr_slots * slot_bytes:
        raise UblkdError(f"{path} is cut short", hint="restart the device")
    slots = [_slot(data, header_bytes + i * slot_bytes, *divmod(i, shares)) for i in range(nr_slots)]
    return {
        "id": dev_id,
        "time_ns": now_ns,
        "start_ns": start_ns,
        "size": dev_bytes,
        "depth": depth,
        "workers_per_queue": shares,
        "queues": slots,
    }


def _slot(data: bytes, offset: int, queue: int, worker: int) -> dict[str, Any]:
    words = struct.unpack_from(f"<{layout.SLOT_WORDS}Q", data, offset)
    slot: dict[str, Any] = {"queue": queue, "worker": worker, **dict(zip(layout.QUEUE_WORDS, words, strict=False))}
    slot["in_flight"] = max(0, slot["started"] - slot["completed"])
    slot["ops"] = {}
    for i, op in enumerate(layout.OPS):
        at = layout.QUEUE_HEAD_WORDS + i * layout.COUNTER_WORDS
        ios, nbytes, errors, lat_ns = words[at : at + 4]
        hist = list(words[at + 4 : at + layout.COUNTER_WORDS])
        slot["ops"][op] = {"ios": ios, "bytes": nbytes, "errors": errors, "lat_ns": lat_ns, "hist": hist}
    return slot


def add(a: Counters, b: Counters, sign: int = 1) -> Counters:
    """a + sign * b, counter by counter."""
    out = {key: a[key] + sign * b[key] for key in ("ios", "bytes", "errors", "lat_ns")}
    out["hist"] = [x + sign * y for x, y in zip(a["hist"], b["hist"], strict=True)]
    return out


def zero() -> Counters:
    """Counters of nothing."""
    return {"ios": 0, "bytes": 0, "errors": 0, "lat_ns": 0, "hist": [0] * layout.HIST_BUCKETS}


def total(snap: dict[str, Any]) -> dict[str, Counters]:
    """Counters per operation over all queues."""
    out = {op: zero() for op in layout.OPS}
    for slot in snap["queues"]:
        for op, counters in slot["ops"].items():
            out[op] = add(out[op], counters)
    return out


def delta(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """What happened between two snapshots of one device, in the shape of a snapshot, with "seconds" added."""
    out = {**new, "seconds": (new["time_ns"] - old["time_ns"]) / 1e9, "queues": []}
    for n, o in zip(new["queues"], old["queues"], strict=True):
        slot = dict(n)
        for word in ("passes", "started", "completed", "fua", "python_entries", "run_returns", "retries"):
            slot[word] = n[word] - o[word]
        slot["ops"] = {op: add(n["ops"][op], o["ops"][op], -1) for op in n["ops"]}
        out["queues"].append(slot)
    return out


def percentile(hist: list[int], p: float) -> float:
    """Latency in ns below which p percent of the counted requests lie, interpolated in its bucket; 0 if none."""
    count = sum(hist)
    if not count:
        return 0.0
    want = count * p / 100.0
    seen = 0
    for i, n in enumerate(hist):
        if n and seen + n >= want:
            low, high = layout.bucket_bounds(i)
            return low + (high - low) * max(0.0, want - seen) / n
        seen += n
    return float(layout.bucket_bounds(len(hist) - 1)[1])
