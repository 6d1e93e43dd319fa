# SPDX-License-Identifier: Apache-2.0
"""Random data of all block sizes, trimmed in places, is found again: every target, every transport."""

from __future__ import annotations

import errno
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lib.device import Device, cli
from lib.tools import BLKDISCARD, MIB, fio, forget, has, over_range, pread, pwrite, read

from ublkd.errors import UblkdError

HERE = Path(__file__).resolve().parent
DISK = f"{HERE}/lib/targets.py:Disk"
BATCHES = f"{HERE}/lib/targets.py:Batches"
EXAMPLE = f"{HERE.parents[1]}/configs/examples/ram_disk.py:RamDisk"

SIZE = 64 * MIB
MIXED = {"rw": "randwrite", "bsrange": "512-1M"}
# Every part of the disk has one writer; all of them work at the same time.
JOBS: tuple[dict[str, object], ...] = (
    {**MIXED, "iodepth": 1, "offset": 0, "size": 2 * MIB},
    {**MIXED, "iodepth": 64, "offset": 8 * MIB, "size": 4 * MIB},
    {**MIXED, "iodepth": 64, "offset": 16 * MIB, "size": 4 * MIB},
    {"rw": "trimwrite", "bs": "64k", "iodepth": 8, "offset": 24 * MIB, "size": 2 * MIB},
    {"rw": "randtrim", "bs": "64k", "iodepth": 4, "offset": 32 * MIB, "size": 2 * MIB, "verify": 0},
)
REFUSED = [({"transport": "copy"}, "the transport is copy"), ({"on_crash": "fail"}, "--on-crash is fail")]
TRIMS = 32 + 32
OWN = 40 * MIB

TARGETS: dict[str, tuple[str, dict[str, object]]] = {
    "loop-direct": ("loop", {"direct": "on"}),
    "loop-buffered": ("loop", {"direct": "off"}),
    "memory": ("memory", {"size": SIZE}),
    "python": ("python", {"file": DISK, "size": SIZE}),
}


@pytest.mark.parametrize(
    ("transport", "batch"),
    [("copy", "off"), ("user-copy", "off"), ("user-copy", "on"), ("zero-copy", "off"), ("zero-copy", "on")],
)
@pytest.mark.parametrize("name", TARGETS)
def test_written_data_is_found_again(
    name: str, transport: str, batch: str, serve: Callable[..., Device], image: Callable[..., Path]
) -> None:
    target, settings = TARGETS[name]
    if target == "loop":
        settings = {**settings, "file": image(SIZE)}
    settings = {**settings, "transport": transport, "batch": batch}
    # Refused, not ignored.
    if transport == "zero-copy" and (target != "loop" or not has("AUTO_BUF_REG")):
        with pytest.raises(UblkdError, match=r"zero-copy can't be had"):
            serve(target, **settings)
        return
    if batch == "on" and not has("BATCH_IO"):
        with pytest.raises(UblkdError, match=r"--batch on can't be had: the driver has no BATCH_IO"):
            serve(target, **settings)
        return
    device = serve(target, max_io_size="1M", **settings)
    assert device.record["transport"] == transport + ("+batch" if batch == "on" else "")
    write_and_find(device)
    if target == "loop":
        backing = str(settings["file"])
        forget(device.path, backing)
        assert all(same(device.path, backing, at) for at in range(0, SIZE, 8 * MIB))


@pytest.mark.parametrize(("settings", "why"), REFUSED)
def test_batch_that_can_not_be_had(settings: dict[str, object], why: str, serve: Callable[..., Device]) -> None:
    """Refused if asked for, left out otherwise, and `show` says why."""
    if not has("BATCH_IO"):
        why = "the driver has no BATCH_IO"
    with pytest.raises(UblkdError, match=f"--batch on can't be had: {why}"):
        serve("memory", size=SIZE, batch="on", **settings)
    device = serve("memory", size=SIZE, **settings)
    shown = json.loads(cli("show", device.id, "--json").out)
    assert shown["batch"].startswith("off: ") and "batch" not in shown["transport"]


def test_written_data_is_found_again_by_batches(serve: Callable[..., Device]) -> None:
    write_and_find(serve("python", BATCHES, size=SIZE))


def test_workers_that_poll(serve: Callable[..., Device]) -> None:
    """They find requests without a sleep, and one that has nothing to do for long sleeps all the same."""
    device = serve("memory", size=SIZE, poll=2000)
    write_and_find(device)
    assert 0 < device.word("polled") < device.word("passes")
    time.sleep(1)
    before = device.word("passes")
    ticks = [cpu_ticks(pid) for pid in device.workers()]
    time.sleep(3)
    assert [cpu_ticks(pid) for pid in device.workers()] == ticks, "an idle worker takes CPU time"
    assert device.word("passes") == before
    done = cli("upgrade", device.id, "--poll", "0", "--start-timeout", "120")
    assert done.status == 0, done.err
    device.supervisor = device.record["supervisor"]["pid"]
    polled = device.word("polled")
    pwrite(device.path, b"slept", 0)
    forget(device.path)
    assert pread(device.path, 5, 0) == b"slept" and device.word("polled") == polled


def cpu_ticks(pid: int) -> int:
    """CPU time that a process has had."""
    return sum(int(field) for field in read(f"/proc/{pid}/stat").rpartition(")")[2].split()[11:13])


def same(one: str, other: str, at: int) -> bool:
    return pread(one, 8 * MIB, at) == pread(other, 8 * MIB, at)


def write_and_find(device: Device) -> None:
    """fio's jobs and a pass of trims; the engine must have seen all of it and failed nothing."""
    for job in fio(device.path, *JOBS)[:4]:
        assert job["write"]["io_bytes"] > 0 and job["read"]["io_bytes"] > 0, job["jobname"]
    trims = TRIMS + trim_in_places(device.path)
    queues = device.snapshot()["queues"]
    assert len(queues) == 4 and sum(bool(queue["completed"]) for queue in queues) > 1
    assert all(queue["started"] == queue["completed"] for queue in queues)
    errors = {op: sum(queue["ops"][op]["errors"] for queue in queues) for op in queues[0]["ops"]}
    assert not any(errors.values()), errors
    assert device.ios("discard") >= trims


def trim_in_places(path: str) -> int:
    """Trimmed blocks read as zeroes and their neighbours as they were; how many were trimmed."""
    dice = random.Random(7)
    length, block = 4 * MIB, 64 << 10
    expected = bytearray(dice.randbytes(length))
    pwrite(path, bytes(expected), OWN)
    trimmed = dice.sample(range(0, length, block), 20)
    for at in trimmed:
        over_range(path, BLKDISCARD, OWN + at, block)
        expected[at : at + block] = bytes(block)
    # The page cache knows of the discards; the device must agree.
    forget(path)
    assert pread(path, length, OWN) == expected
    return len(trimmed)


def test_a_read_only_python_target_and_its_errors(serve: Callable[..., Device]) -> None:
    """One without write() makes a read-only device; what it raises is what the application gets."""
    device = serve("python", f"{HERE}/lib/targets.py:Sparse", queues=1)
    assert device.record["read_only"] and device.record["size"] == MIB
    assert pread(device.path, 65536, 0) == bytes(65536)
    with pytest.raises(OSError) as caught:
        pread(device.path, 4096, 65536)
    assert caught.value.errno in (errno.ENODATA, errno.EIO)
    assert pread(device.path, 65536, 131072) == bytes(65536)
    assert device.snapshot()["queues"][0]["ops"]["read"]["errors"] > 0


def test_example_ram_disk(serve: Callable[..., Device]) -> None:
    device = serve("python", EXAMPLE, size=SIZE, transport="auto", batch="off")
    assert device.record["transport"] == ("user-copy" if has("USER_COPY") else "copy")
    fio(device.path, {**JOBS[0], "size": MIB}, {**JOBS[1], "size": 2 * MIB})


def test_four_devices_at_once(serve: Callable[..., Device], image: Callable[..., Path]) -> None:
    devices = [
        serve("loop", image(SIZE, "a.img"), queues=2, direct="on"),
        serve("loop", image(SIZE, "b.img"), queues=1, direct="off"),
        serve("memory", size=SIZE, queues=2),
        serve("python", DISK, size=SIZE, queues=2),
    ]
    assert len({device.path for device in devices}) == 4
    jobs = [
        {**MIXED, "iodepth": 32, "size": 3 * MIB, "filename": device.path, "randseed": number}
        for number, device in enumerate(devices)
    ]
    fio(devices[0].path, *jobs)
    assert all(device.ios("write") > 0 and device.ios("read") > 0 for device in devices)
