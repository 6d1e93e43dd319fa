# SPDX-License-Identifier: Apache-2.0
"""Sizes that several targets check, and the targets without a backing file: null and memory."""

import os
import pathlib

import pytest

from ublkd import targets
from ublkd.config.schema import DeviceSpec
from ublkd.errors import UblkdError, UsageError
from ublkd.supervisor import create
from ublkd.targets import memory
from ublkd.targets.base import MAX_RANGE_BYTES
from ublkd.targets.sizes import block_sizes, whole_blocks

KIB = 1024


def test_whole_blocks():
    assert whole_blocks("--size", 8192, 4096) == 8192
    with pytest.raises(UsageError, match="--size of 5000 bytes is no multiple of the block size 512") as e:
        whole_blocks("--size", 5000, 512)
    assert e.value.hint.endswith(" 4608")
    for size in (0, -512):
        with pytest.raises(UsageError, match="at least one block of 512"):
            whole_blocks("--size", size, 512)


def test_block_sizes():
    spec = DeviceSpec(target="null", size=1 << 20)
    assert block_sizes(spec, 512, 4096) == (512, 4096)
    spec = DeviceSpec(target="null", size=1 << 20, block_size=4096)
    assert block_sizes(spec, 512, 512) == (4096, 4096)
    spec = DeviceSpec(target="null", size=1 << 20, physical_block_size=512)
    assert block_sizes(spec, 512, 4096) == (512, 512)
    # What the backing device demands is above what was asked for.
    with pytest.raises(UsageError, match="physical block size 512 is smaller than the logical 4096"):
        block_sizes(spec, 4096, 4096)


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_registry(name):
    cls = targets.get(name)
    assert cls.name == name
    assert {"copy", "user-copy"} <= set(cls.transports) <= set(create.TRANSPORTS)
    assert targets.TARGETS[name][2]


def test_unknown_target():
    with pytest.raises(KeyError):
        targets.get("floppy")


def test_null_limits():
    target = targets.get("null")(DeviceSpec(target="null", size=1 << 20))
    limits = target.open()
    assert (limits.size, limits.block_size, limits.physical_block_size) == (1 << 20, 512, 4096)
    assert limits.max_discard == limits.max_write_zeroes == MAX_RANGE_BYTES
    assert not limits.volatile_cache
    assert target.resized(2 << 20) == 2 << 20
    assert target.resized(None) == 1 << 20
    with pytest.raises(UsageError, match="the new size of 1000 bytes"):
        target.resized(1000)
    engine = target.engine_target(0)
    engine.close()
    engine.close()
    assert target.files() == []
    target.close(discard=True)


@pytest.mark.parametrize("name", ["null", "memory"])
def test_read_only_offers_nothing_that_writes(name, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "SHM_DIR", str(tmp_path))
    target = targets.get(name)(DeviceSpec(target=name, size=1 << 20, read_only=True))
    try:
        limits = target.open()
        assert limits.read_only
        assert (limits.discard_granularity, limits.max_discard, limits.max_write_zeroes) == (0, 0, 0)
    finally:
        target.close(discard=True)


@pytest.mark.parametrize("name", ["null", "memory"])
def test_size_of_no_whole_blocks(name, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "SHM_DIR", str(tmp_path))
    with pytest.raises(UsageError, match="no multiple of the block size 4096"):
        targets.get(name)(DeviceSpec(target=name, size=4096 * 3 + 512, block_size=4096)).open()
    assert list(tmp_path.iterdir()) == []


class TestMemory:
    """The file behind a memory device, from its making to its end."""

    DEV_ID = 900_000_000 + os.getpid()

    def target(self, size=1 << 20):
        return targets.get("memory")(DeviceSpec(target="memory", size=size))

    def test_life(self):
        target = self.target()
        target.open()
        try:
            (path,) = map(pathlib.Path, target.files())
            assert path.stat().st_mode & 0o777 == 0o600
            assert path.stat().st_size == (1 << 20) + 16
            target.added(self.DEV_ID)
            assert not path.exists()
            (path,) = map(pathlib.Path, target.files())
            assert path.name == f"ublkd-{self.DEV_ID}.data"
            engine = target.engine_target(0)
            engine.close()
            target.close(discard=False)
            assert path.exists(), "the contents outlive the supervisor"

            # Recovery takes them over, and only at their own size.
            path.write_bytes(b"x" * path.stat().st_size)
            again = self.target()
            again.open(self.DEV_ID)
            again.close(discard=False)
            assert path.read_bytes()[:4] == b"xxxx"
            with pytest.raises(UblkdError, match="has not the size"):
                self.target(2 << 20).open(self.DEV_ID)
            assert path.exists()
        finally:
            target.close(discard=True)
        assert not path.exists()
        target.close(discard=True)

    def test_marks_have_their_memory_from_the_start(self):
        # One mark per 64 KiB: 64 pages of them for 16 GiB, and not a page of the disk.
        target = self.target(16 << 30)
        target.open()
        try:
            used = os.stat(target.files()[0]).st_blocks * 512
            assert 256 * KIB <= used <= 260 * KIB
        finally:
            target.close(discard=True)

    def test_nowhere_to_put_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr(memory, "SHM_DIR", str(tmp_path / "none"))
        with pytest.raises(UblkdError, match="cannot set up 1 MiB of memory") as e:
            self.target().open()
        assert "tmpfs" in e.value.hint

    def test_more_than_there_can_be(self):
        before = set(os.listdir("/dev/shm"))
        with pytest.raises(UblkdError, match="cannot set up"):
            self.target(1 << 60).open()
        assert not {n for n in set(os.listdir("/dev/shm")) - before if f"new-{os.getpid()}" in n}

    def test_recovery_without_the_file(self):
        with pytest.raises(UblkdError, match=r"ublkd-\d+\.data"):
            self.target().open(self.DEV_ID)
