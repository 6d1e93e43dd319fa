# SPDX-License-Identifier: Apache-2.0
"""Discards give space back, zeroes are zeroes, flush and FUA reach the disk: seen there, not believed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from lib import trace
from lib.device import Device
from lib.tools import BLKZEROOUT, MIB, allocated, forget, over_range, pread, pwrite, queue_attribute, sh

SIZE = 64 * MIB
PATTERN = os.urandom(4096) * 256  # 1 MiB
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 1, 2, 16

EVENTS = (
    f"io_uring/{trace.SUBMIT}",
    "block/block_rq_issue",
    "ext4/ext4_sync_file_enter",
    "ext4/ext4_punch_hole",
    "ext4/ext4_zero_range",
)


def fill(path: str, length: int) -> None:
    pwrite(path, PATTERN * (length // MIB), 0)


def about(expected: int, found: int) -> bool:
    """Equal, but for what the file system needs to keep account."""
    return abs(found - expected) <= 32768


def durable_write(path: str, data: bytes, offset: int) -> None:
    """A direct write with FUA."""
    import mmap

    aligned = mmap.mmap(-1, len(data))
    aligned.write(data)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
    try:
        assert os.pwritev(fd, [aligned], offset) == len(data)
    finally:
        os.close(fd)
        aligned.close()


@pytest.mark.parametrize("direct", ["on", "off"])
def test_discard_shrinks_the_file_and_zeroes_are_zeroes(
    direct: str, serve: Callable[..., Device], image: Callable[..., Path]
) -> None:
    backing = image(SIZE)
    device = serve("loop", backing, direct=direct)
    assert allocated(backing) == 0
    fill(device.path, 16 * MIB)
    full = allocated(backing)
    assert full >= 16 * MIB

    sh("blkdiscard", "--offset", 4 * MIB, "--length", 4 * MIB, device.path)
    assert about(full - 4 * MIB, allocated(backing))
    forget(device.path)
    assert pread(device.path, 4 * MIB, 4 * MIB) == bytes(4 * MIB)
    assert pread(device.path, MIB, 3 * MIB) == PATTERN == pread(device.path, MIB, 8 * MIB)

    # Odd ranges: the blocks at the ends are zeroed, not punched, and their neighbours stay.
    over_range(device.path, BLKZEROOUT, 512, 5 * 512)
    assert pread(device.path, 8192, 0) == PATTERN[:512] + bytes(5 * 512) + PATTERN[3072:8192][: 8192 - 3072]

    # fallocate(1) on a block device: with and without leave to unmap.
    before = allocated(backing)
    sh("fallocate", "--zero-range", "--keep-size", "--offset", 9 * MIB, "--length", MIB, device.path)
    assert about(before, allocated(backing)), "zeroes that must stay allocated were unmapped"
    sh("fallocate", "--punch-hole", "--offset", 11 * MIB, "--length", MIB, device.path)
    assert about(before - MIB, allocated(backing))
    forget(device.path)
    for at in (9, 11):
        assert pread(device.path, MIB, at * MIB) == bytes(MIB)
        assert pread(device.path, MIB, (at + 1) * MIB) == PATTERN
    assert device.ios("discard") and device.ios("write_zeroes")

    sh("blkdiscard", device.path)
    assert allocated(backing) == 0
    sh("blkdiscard", "--zeroout", "--length", MIB, device.path)
    assert pread(device.path, MIB, 0) == bytes(MIB)
    device.stop()
    assert pread(backing, SIZE, 0) == bytes(SIZE)


def test_sparse_files_stay_sparse(serve: Callable[..., Device], image: Callable[..., Path]) -> None:
    backing = image(SIZE)
    device = serve("loop", backing)
    assert pread(device.path, SIZE, 0) == bytes(SIZE)
    assert allocated(backing) == 0
    sh("mkfs.ext4", "-qF", device.path)
    forget(device.path)
    pread(device.path, SIZE, 0)
    assert 0 < allocated(backing) < SIZE // 4


def test_memory_disk_gives_memory_back(serve: Callable[..., Device]) -> None:
    device = serve("memory", size=SIZE)
    data = Path(f"/dev/shm/ublkd-{device.id}.data")
    pread(device.path, SIZE, 0)
    assert data.stat().st_blocks * 512 < MIB, "reading took memory"
    fill(device.path, 16 * MIB)
    assert data.stat().st_blocks * 512 >= 16 * MIB
    sh("blkdiscard", "--length", 8 * MIB, device.path)
    assert data.stat().st_blocks * 512 < 10 * MIB
    forget(device.path)
    assert pread(device.path, 16 * MIB, 0) == bytes(8 * MIB) + PATTERN * 8
    over_range(device.path, BLKZEROOUT, 8 * MIB + 512, MIB)
    assert pread(device.path, 2 * MIB, 8 * MIB) == PATTERN[:512] + bytes(MIB) + PATTERN[512:]


@pytest.mark.parametrize("direct", ["on", "off"])
def test_flush_and_fua_reach_the_disk(
    direct: str, serve: Callable[..., Device], image: Callable[..., Path], scratch: object
) -> None:
    """An fsync is a data sync of the backing file, a durable write one that is synced."""
    backing = image(SIZE)
    device = serve("loop", backing, direct=direct)
    assert queue_attribute(device.path, "fua") == 1
    assert "write back" in Path(f"/sys/block/{device.name}/queue/write_cache").read_text()
    fill(device.path, 2 * MIB)
    ours, below = trace.number(device.path), trace.number(scratch.disk)  # type: ignore[attr-defined]
    inode = f"ino {backing.stat().st_ino} "

    flushes, fua = device.ios("flush"), device.word("fua")
    with trace.recording(*EVENTS) as events:
        fd = os.open(device.path, os.O_RDWR)
        os.fsync(fd)
        os.close(fd)
    assert device.ios("flush") > flushes and device.word("fua") == fua
    assert events.of("block_rq_issue", f" {ours} FF "), "no flush on the device"
    assert events.of(trace.SUBMIT, "FSYNC"), "no fsync through the ring"
    assert events.of("ext4_sync_file_enter", inode, "datasync 1"), "no data sync of the backing file"
    assert events.of("block_rq_issue", f" {below} F"), "no flush of the disk below"
    assert not events.of("ext4_sync_file_enter", inode, "datasync 0")

    with trace.recording(*EVENTS) as events:
        durable_write(device.path, PATTERN[:8192], 4096)
    assert device.word("fua") > fua
    assert events.of("block_rq_issue", f" {ours} WFS "), "no durable write on the device"
    assert events.of("ext4_sync_file_enter", inode, "datasync 1"), "the write was not synced"
    written = events.of("block_rq_issue", f" {below} W")
    assert written and events.of("block_rq_issue", f" {below} F"), "it is not on the disk below"

    with trace.recording(*EVENTS) as events:
        fd = os.open(device.path, os.O_RDWR)
        os.pwrite(fd, PATTERN[:4096], 0)  # stays in the page cache of the device
        os.close(fd)
    assert not events.of("ext4_sync_file_enter", inode), "a plain write was synced"


def test_zeroing_uses_the_file_system(serve: Callable[..., Device], image: Callable[..., Path]) -> None:
    """No zeroes are written where the file system can do without."""
    device = serve("loop", image(SIZE))
    fill(device.path, 4 * MIB)
    writes = device.ios("write")
    with trace.recording(*EVENTS) as events:
        sh("blkdiscard", "--length", MIB, device.path)
        sh("fallocate", "--zero-range", "--keep-size", "--offset", MIB, "--length", MIB, device.path)
    assert device.ios("write") == writes
    assert len(events.of(trace.SUBMIT, "FALLOCATE")) >= 2
    assert events.of("ext4_punch_hole") and events.of("ext4_zero_range")
