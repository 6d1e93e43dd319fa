# SPDX-License-Identifier: Apache-2.0
"""What a Python handler does with a request's data has the same effect on every transport."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from lib.device import Device
from lib.tools import MIB, direct_reader, fio, forget, has, pread, pwrite, room_in_shm
from test_stale_memory import dirty_the_free_pages, look

TARGETS = f"{Path(__file__).resolve().parent}/lib/targets.py"
SIZE = 16 * MIB
TRANSPORTS = [("copy", "off"), ("user-copy", "off"), ("user-copy", "on")]


def offered(batch: str) -> None:
    """Skip what this driver has not."""
    if batch == "on" and not has("BATCH_IO"):
        pytest.skip("the driver has no BATCH_IO")


@pytest.mark.parametrize("ways", ["Ways", "StraightWays"])
@pytest.mark.parametrize(("transport", "batch"), TRANSPORTS)
def test_every_way_to_keep_data(
    transport: str, batch: str, ways: str, serve: Callable[..., Device], image: Callable[..., Path]
) -> None:
    offered(batch)
    file = image(SIZE)
    settings = {"size": SIZE, "max_io_size": "1M", "transport": transport, "batch": batch}
    device = serve("python", f"{TARGETS}:{ways}", queues=2, params={"file": str(file)}, **settings)
    job = {"rw": "randwrite", "bsrange": "512-256k", "iodepth": 16}
    for seed in (1, 2):
        fio(device.path, {**job, "randseed": seed, "size": SIZE})
    # Large and whole; what lies where is the same on every transport.
    data = os.urandom(SIZE)
    pwrite(device.path, data, 0)
    forget(device.path)
    assert pread(device.path, SIZE, 0) == data
    for at in range(0, SIZE, MIB):
        way = at >> 20 & 7
        kept = data[at : at + MIB]
        if way in (2, 3, 4, 7):
            assert pread(file, MIB, at) == kept, way
    errors = [queue["ops"][op]["errors"] for queue in device.snapshot()["queues"] for op in ("read", "write")]
    assert not any(errors)


@pytest.mark.parametrize(("transport", "batch"), TRANSPORTS)
def test_a_careless_read_shows_no_old_memory(transport: str, batch: str, serve: Callable[..., Device]) -> None:
    """Neither the kernel's nor the reader's."""
    offered(batch)
    device = serve("python", f"{TARGETS}:Careless", queues=1, depth=8, transport=transport, batch=batch)
    for direct in (True, False):
        dirty_the_free_pages()
        forget(device.path)
        found = look(device.path, direct)
        assert not found, f"direct {direct}: {found.strip(bytes(1))[:100]!r}"


def test_memory_that_can_not_be_had_fails_the_request(serve: Callable[..., Device]) -> None:
    """Where the worker fetches the data, a full /dev/shm is an error and not its death."""
    device = serve("python", f"{TARGETS}:Disk", queues=1, size=SIZE, transport="user-copy")
    workers = device.workers()
    pwrite(device.path, b"kept" * 1024, 0)
    with room_in_shm(MIB):
        with pytest.raises(OSError) as caught:
            pwrite(device.path, os.urandom(8 * MIB), 4 * MIB)
        assert caught.value.errno == errno.EIO
        assert direct_reader(device.path, 0).communicate()[0] == b"kept" * 1024
    assert device.workers() == workers and device.record["recoveries"] == 0
