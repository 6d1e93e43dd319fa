# SPDX-License-Identifier: Apache-2.0
"""Several workers that share a queue, each with its part of the tags."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from lib.device import Device, cli
from lib.tools import MIB, fio, forget, has, pread, pwrite
from test_recovery import verifying

from ublkd.errors import UblkdError

HERE = Path(__file__).resolve().parent
EXAMPLE = f"{HERE.parents[1]}/configs/examples/ram_disk.py:RamDisk"
SIZE = 64 * MIB


def test_refused_where_a_queue_is_one_task(serve: Callable[..., Device]) -> None:
    if has("PER_IO_DAEMON"):
        pytest.skip("this driver has a task per tag")
    with pytest.raises(UblkdError, match="--workers-per-queue needs a driver with PER_IO_DAEMON"):
        serve("memory", size=SIZE, workers_per_queue=2)


@pytest.mark.parametrize("target", ["loop", "memory", "python"])
def test_workers_share_queues(target: str, serve: Callable[..., Device], image: Callable[..., Path]) -> None:
    """All of them work; one that is killed, and an upgrade, are noticed by nobody."""
    if not has("PER_IO_DAEMON"):
        pytest.skip("needs a task per tag")
    file = {"loop": lambda: image(SIZE), "python": lambda: EXAMPLE, "memory": lambda: None}[target]()
    settings = {} if target == "loop" else {"size": SIZE}
    device = serve(target, file, queues=2, workers_per_queue=2, depth=33, start_timeout=120, **settings)
    posts = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [(w["queue"], w["worker"]) for w in device.record["workers"]] == posts
    fio(device.path, {"rw": "randwrite", "bs": "4k", "iodepth": 64, "size": 4 * MIB})
    slots = device.snapshot()["queues"]
    assert [(slot["queue"], slot["worker"], slot["pid"]) for slot in slots] == [
        (*post, pid) for post, pid in zip(posts, device.workers(), strict=True)
    ]
    for queue in (0, 1):
        done = [slot["completed"] for slot in slots if slot["queue"] == queue]
        assert all(done) or not any(done), f"the workers of queue {queue} answered {done}"
    assert "queue 0.1" in cli("stat", device.id).out
    assert json.loads(cli("show", device.id, "--json").out)["workers"] == device.record["workers"]

    old = device.workers()
    with verifying(device):
        os.kill(old[1], signal.SIGKILL)
        device.await_replacement(old, old[1])
    [died] = device.said("worker died")
    assert (died["queue"], died["worker"]) == (0, 1) and "queue 0.1 was killed" in died["reason"]

    pwrite(device.path, b"before", 5 * MIB)
    done = cli("upgrade", device.id)
    assert done.status == 0, done.err
    device.supervisor = device.record["supervisor"]["pid"]
    forget(device.path)
    assert pread(device.path, 6, 5 * MIB) == b"before"
    assert [(w["queue"], w["worker"]) for w in device.record["workers"]] == posts
