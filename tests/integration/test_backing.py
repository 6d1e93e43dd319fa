# SPDX-License-Identifier: Apache-2.0
"""What may be behind a loop device: disks, partitions, read-only files, parts of files."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lib import trace
from lib.device import Device, cli
from lib.needs import kernel_has
from lib.tools import (
    MIB,
    device_bytes,
    fio,
    forget,
    has,
    pread,
    pwrite,
    queue_attribute,
    read,
    sh,
    wait_until,
)

SIZE = 64 * MIB


def digest(path: str | Path, offset: int, length: int) -> str:
    return hashlib.sha256(pread(path, length, offset)).hexdigest()


def test_a_disk(serve: Callable[..., Device], raw_disk: str) -> None:
    check_disk(serve("loop", raw_disk), raw_disk, 512)


def test_a_disk_with_big_sectors(serve: Callable[..., Device], raw_disk_4k: str) -> None:
    device = serve("loop", raw_disk_4k)
    assert queue_attribute(device.path, "physical_block_size") == 4096
    check_disk(device, raw_disk_4k, 4096)
    device.stop()
    refused = cli("add", "loop", raw_disk_4k, "--block-size", 512, "--direct")
    assert (refused.status, refused.out) == (2, "")
    assert f"{raw_disk_4k} can't be served with --direct: its direct I/O needs blocks of 4096" in refused.err


def check_disk(device: Device, disk: str, block_size: int) -> None:
    """Limits follow the disk's, data and discards arrive there."""
    assert device.record["details"]["direct"]
    assert queue_attribute(device.path, "logical_block_size") == block_size
    assert device_bytes(device.path) == device_bytes(disk)
    assert queue_attribute(device.path, "discard_max_bytes") > 0
    written = {"rw": "randwrite", "bsrange": f"{block_size}-1M", "size": 4 * MIB}
    fio(device.path, {**written, "iodepth": 1}, {**written, "iodepth": 64, "offset": 8 * MIB})
    pattern = os.urandom(MIB)
    pwrite(device.path, pattern * 3, 16 * MIB)
    forget(disk)
    assert pread(disk, 3 * MIB, 16 * MIB) == pattern * 3
    discards = discarded_sectors(disk)
    with trace.recording("block/block_rq_issue") as events:
        sh("blkdiscard", "--offset", 17 * MIB, "--length", MIB, device.path)
    if kernel_has("blkdev_uring_cmd"):
        assert discarded_sectors(disk) - discards == MIB // 512
    else:
        # Before 6.12 io_uring can only punch a hole into a disk: zeroes that it may make by unmapping.
        assert zeroed_sectors(events, disk) == MIB // 512
    sh("blkdiscard", "--zeroout", "--offset", 18 * MIB, "--length", MIB, device.path)
    forget(device.path)
    assert pread(device.path, MIB, 16 * MIB) == pattern
    assert pread(device.path, MIB, 18 * MIB) == bytes(MIB)


def discarded_sectors(disk: str) -> int:
    return int(read(f"/sys/block/{os.path.basename(disk)}/stat").split()[13])


def zeroed_sectors(events: trace.Events, disk: str) -> int:
    """For how much of a disk the command to write zeroes came, N or WZ in block events; no data may have come."""
    issued = "\n".join(events.of("block_rq_issue", f" {trace.number(disk)} "))
    assert not re.search(rf" {trace.number(disk)} W(?!Z)", issued), issued
    return sum(map(int, re.findall(r" (?:N|WZ)\w* \d+ \(.*\) \d+ \+ (\d+)", issued)))


def test_a_mounted_disk_is_refused(files: Path, scratch: object) -> None:
    disk = scratch.disk  # type: ignore[attr-defined]
    refused = cli("add", "loop", disk)
    assert refused.status != 0 and refused.out == ""
    assert f"the backing device {disk} is in use (mounted, or part of another device)" in refused.err


@pytest.fixture
def partitioned(image: Callable[..., Path]) -> Iterator[Path]:
    """Two partitions with something to tell them by."""
    backing = image(SIZE)
    sh("sfdisk", "--quiet", backing, input="label: gpt\nstart=1MiB, size=16MiB\nstart=32MiB, size=8MiB\n")
    pwrite(backing, b"first", MIB)
    pwrite(backing, b"second", 32 * MIB)
    yield backing


def partitions(device: Device) -> list[str]:
    return sorted(p.name for p in Path(f"/sys/block/{device.name}").glob(f"{device.name}p*"))


def test_partitions_are_shown(serve: Callable[..., Device], partitioned: Path) -> None:
    device = serve("loop", partitioned)
    first, second = f"{device.path}p1", f"{device.path}p2"
    wait_until(lambda: os.path.exists(second), "the partitions appear", 10)
    assert partitions(device) == [f"{device.name}p1", f"{device.name}p2"]
    assert (device_bytes(first), device_bytes(second)) == (16 * MIB, 8 * MIB)
    assert pread(first, 5, 0) == b"first" and pread(second, 6, 0) == b"second"
    pwrite(second, b"changed", 0)
    device.stop()
    assert not os.path.exists(first)
    assert pread(partitioned, 7, 32 * MIB) == b"changed"


def test_partitions_can_be_hidden(serve: Callable[..., Device], partitioned: Path) -> None:
    if has("NO_AUTO_PART_SCAN"):
        device = serve("loop", partitioned, partscan=False)
        assert pread(device.path, 5, MIB) == b"first"
        assert partitions(device) == []
        return
    refused = cli("add", "loop", partitioned, "--no-partscan")
    assert refused.status == 2 and refused.out == ""
    assert "--no-partscan needs a driver with NO_AUTO_PART_SCAN (Linux 7.0)" in refused.err


@pytest.fixture
def filled(image: Callable[..., Path]) -> Path:
    """A file of random bytes."""
    path = image(8 * MIB, "filled.img")
    path.write_bytes(os.urandom(8 * MIB))
    return path


def check_read_only(device: Device, backing: Path) -> None:
    assert sh("blockdev", "--getro", device.path).strip() == "1"
    assert device.record["read_only"]
    assert digest(device.path, 0, 8 * MIB) == digest(backing, 0, 8 * MIB)
    with pytest.raises(OSError):
        pwrite(device.path, bytes(4096), 0)
    assert "read-only" in sh("blkdiscard", device.path, status=1).lower() or device.ios("discard") == 0
    assert device.ios("write") == 0


def test_a_read_only_file(serve: Callable[..., Device], filled: Path) -> None:
    filled.chmod(0o444)
    check_read_only(serve("loop", filled, read_only=True), filled)


def test_a_file_on_a_read_only_mount(serve: Callable[..., Device], filled: Path, tmp_path: Path) -> None:
    place = tmp_path / "readonly"
    place.mkdir()
    sh("mount", "--bind", filled.parent, place)
    try:
        sh("mount", "-o", "remount,bind,ro", place)
        backing = place / filled.name
        refused = cli("add", "loop", backing)
        assert refused.status == 2 and refused.out == ""
        assert f"the backing file {backing} can't be written: Read-only file system" in refused.err
        assert "--read-only" in refused.err
        device = serve("loop", backing, read_only=True)
        check_read_only(device, backing)
        device.stop()
    finally:
        sh("umount", place)


@pytest.mark.parametrize(
    ("offset", "limit", "direct"),
    [
        (0, 3 * MIB, True),
        (MIB, None, True),
        (4096, 64 << 10, True),
        (777 * 512, MIB, True),
        (1000, 1024 * 513, False),
    ],
)
def test_part_of_a_file(
    offset: int, limit: int | None, direct: bool, serve: Callable[..., Device], filled: Path
) -> None:
    """The right bytes, and none but those; where direct I/O can't, it goes through the page cache."""
    before = filled.read_bytes()
    length = limit or 8 * MIB - offset
    device = serve("loop", filled, offset=offset, size_limit=limit, queues=1)
    assert device.record["details"]["direct"] == direct
    assert device_bytes(device.path) == length
    assert pread(device.path, length, 0) == before[offset : offset + length]
    new = os.urandom(4096)
    pwrite(device.path, new, 0)
    pwrite(device.path, new, length - 4096)
    device.stop()
    forget(filled)
    after = filled.read_bytes()
    assert after[offset : offset + 4096] == new == after[offset + length - 4096 : offset + length]
    kept = slice(offset + 4096, offset + length - 4096)
    assert after[kept] == before[kept]
    assert after[:offset] == before[:offset] and after[offset + length :] == before[offset + length :]


def test_block_sizes(serve: Callable[..., Device], image: Callable[..., Path]) -> None:
    device = serve("loop", image(SIZE), block_size=4096, physical_block_size=8192)
    assert queue_attribute(device.path, "logical_block_size") == 4096
    assert queue_attribute(device.path, "physical_block_size") == 8192
    device.stop()
    device = serve("memory", size=SIZE, block_size=1024, max_io_size="128K")
    assert queue_attribute(device.path, "logical_block_size") == 1024
    assert queue_attribute(device.path, "max_hw_sectors_kb") == 128
