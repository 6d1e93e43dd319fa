# SPDX-License-Identifier: Apache-2.0
"""The control side of the loop target: what it makes of a backing file, and what it says of a bad one."""

import fcntl
import os
import subprocess

import pytest

from ublkd import inventory, native
from ublkd.config.schema import DeviceSpec
from ublkd.errors import UsageError
from ublkd.targets.base import MAX_RANGE_BYTES
from ublkd.targets.loop import LoopTarget

MIB = 1 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 4 * MIB)
    return path


@pytest.fixture
def opened():
    """open_target(path, **settings) -> (target, limits), closed at the end."""
    made = []

    def open_target(path, **settings):
        target = LoopTarget(DeviceSpec(target="loop", file=str(path), **settings))
        made.append(target)
        return target, target.open()

    yield open_target
    for target in made:
        target.close(discard=True)


def descriptors():
    return set(os.listdir("/proc/self/fd"))


def refused(path, match, **settings):
    """The UsageError that opening raises; nothing may stay open."""
    before = descriptors()
    target = LoopTarget(DeviceSpec(target="loop", file=str(path), **settings))
    with pytest.raises(UsageError, match=match) as e:
        target.open()
    assert descriptors() == before
    assert e.value.exit_status == 2
    assert "\n" not in e.value.message
    return e.value


def test_limits_of_a_file(image, opened):
    target, limits = opened(image)
    assert limits.size == 4 * MIB
    assert limits.block_size in (512, 4096)
    assert limits.physical_block_size >= limits.block_size
    assert limits.volatile_cache and limits.fua and not limits.read_only
    assert limits.max_write_zeroes == MAX_RANGE_BYTES
    assert target.backing() == str(image)
    st = image.stat()
    assert target.backing_id() == f"{st.st_dev}:{st.st_ino}"
    engine = target.engine_target(0)
    engine.close()


def test_discard_where_holes_can_be_punched(image, opened):
    with open(image, "r+b") as f:
        f.write(b"keep" * 1024)
        can = native.can_punch(f.fileno(), 4 * MIB)
    _, limits = opened(image)
    assert limits.max_discard == (MAX_RANGE_BYTES if can else 0)
    assert bool(limits.discard_granularity) == can
    assert image.stat().st_size == 4 * MIB
    assert image.read_bytes().startswith(b"keep" * 1024)


def test_read_only(image, opened):
    image.chmod(0o400)
    _, limits = opened(image, read_only=True)
    assert limits.read_only
    assert (limits.max_discard, limits.discard_granularity, limits.max_write_zeroes) == (0, 0, 0)
    assert not limits.volatile_cache and not limits.fua


def test_missing(tmp_path):
    e = refused(tmp_path / "none.img", "none.img does not exist")
    assert "truncate" in e.hint


def test_below_a_file(image):
    refused(image / "disk", "can't be reached: Not a directory")


def test_directory(tmp_path):
    refused(tmp_path, "is a directory")


def test_neither_file_nor_device(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "neither a regular file nor a block device")
    refused("/dev/null", "neither a regular file nor a block device")


def test_dangling_link(tmp_path):
    (tmp_path / "link").symlink_to("gone")
    refused(tmp_path / "link", "does not exist")


def test_empty(tmp_path):
    (tmp_path / "empty.img").touch()
    e = refused(tmp_path / "empty.img", "is empty")
    assert "truncate" in e.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to everything")
def test_not_writable(image):
    image.chmod(0o400)
    e = refused(image, "can't be written")
    assert "--read-only" in e.hint


def test_immutable_is_not_writable(image):
    if subprocess.run(["chattr", "+i", str(image)], capture_output=True).returncode:
        pytest.skip("no immutable files here")
    try:
        e = refused(image, "can't be written")
        assert "--read-only" in e.hint
    finally:
        subprocess.run(["chattr", "-i", str(image)], check=True)


def test_no_whole_blocks(image):
    os.truncate(image, 4 * MIB + 100)
    e = refused(image, "4194404 bytes to serve, which is no multiple of the block size")
    assert f"--size-limit {4 * MIB}" in e.hint


def test_size_limit(image, opened):
    os.truncate(image, 4 * MIB + 100)
    _, limits = opened(image, size_limit=MIB)
    assert limits.size == MIB
    refused(image, "already being served", size_limit=MIB)


def test_size_limit_beyond_the_end(image):
    refused(image, "beyond the end", size_limit=5 * MIB)
    refused(image, f"{3 * MIB} bytes from the offset on", size_limit=4 * MIB, offset=MIB)


def test_offset(image, opened):
    target, limits = opened(image, offset=MIB)
    assert limits.size == 3 * MIB
    assert target.details()["offset"] == MIB
    for offset in (4 * MIB, 5 * MIB):
        refused(image, "is beyond the end", offset=offset, force=True)


def test_lock_one_writer(image, opened):
    opened(image)
    e = refused(image, "is already being served or locked by another program")
    assert "--force" in e.hint
    refused(image, "already being served", read_only=True)
    opened(image, force=True)


def test_lock_many_readers(image, opened):
    opened(image, read_only=True)
    opened(image, read_only=True)
    refused(image, "already being served")


def test_lock_names_the_device(image, opened, monkeypatch):
    target, _ = opened(image)
    records = [
        {"id": 6, "backing_id": "0:0", "path": "/dev/ublkb6"},
        {"id": 7, "backing_id": target.backing_id(), "path": "/dev/ublkb7"},
    ]
    monkeypatch.setattr(inventory, "records", lambda: records)
    refused(image, "already being served as /dev/ublkb7")


def test_lock_of_another_program(image):
    with open(image, "r+b") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        refused(image, "or locked by another program")


def test_lock_ends_with_close(image, opened):
    before = descriptors()
    target, _ = opened(image)
    target.close(discard=False)
    assert descriptors() == before
    target.close(discard=False)
    opened(image)


def test_direct_as_the_file_allows(image, opened):
    align = native.dio_align(str(image), True)
    assert align in (0, 512, 1024, 2048, 4096)
    target, limits = opened(image)
    assert target.details()["direct"] == bool(align)
    if align:
        assert target.details()["direct_alignment"] == align
        assert limits.block_size >= align
        assert fcntl.fcntl(target._fd, fcntl.F_GETFL) & os.O_DIRECT
    target.close(discard=False)
    target, limits = opened(image, direct="off")
    assert not target.details()["direct"]
    assert limits.block_size == 512
    assert not fcntl.fcntl(target._fd, fcntl.F_GETFL) & os.O_DIRECT


def test_direct_at_a_bad_offset(image, opened):
    if not native.dio_align(str(image), True):
        pytest.skip("no direct I/O here")
    # An offset that no direct I/O has: buffered instead, unless it was asked for.
    os.truncate(image, 4 * MIB + 100)
    e = refused(image, "served with --direct: its direct I/O needs an offset", direct="on", offset=100)
    assert "--buffered" in e.hint
    target, limits = opened(image, offset=100)
    assert not target.details()["direct"]
    assert limits.size == 4 * MIB


def test_direct_where_there_is_none(image, monkeypatch, opened):
    monkeypatch.setattr(native, "dio_align", lambda path, writable: 0)
    refused(image, "it doesn't take direct I/O", direct="on")
    target, _ = opened(image)
    assert not target.details()["direct"]


def test_direct_with_blocks_too_small(image, monkeypatch, opened):
    monkeypatch.setattr(native, "dio_align", lambda path, writable: 4096)
    refused(image, "its direct I/O needs blocks of 4096", direct="on", block_size=512)
    target, limits = opened(image, block_size=512)
    assert (limits.block_size, target.details()["direct"]) == (512, False)
    target.close(discard=False)
    _, limits = opened(image, direct="on")
    assert limits.block_size == 4096


def test_resize(image):
    target = LoopTarget(DeviceSpec(target="loop", file=str(image), offset=MIB))
    assert target.resized(None) == 3 * MIB
    os.truncate(image, 6 * MIB + 700)
    assert target.resized(None) == 5 * MIB + 512
    assert target.resized(2 * MIB) == 2 * MIB
    with pytest.raises(UsageError, match="has only") as e:
        target.resized(6 * MIB)
    assert f"truncate -s {7 * MIB}" in e.value.hint
    with pytest.raises(UsageError, match="no multiple"):
        target.resized(MIB + 1)
