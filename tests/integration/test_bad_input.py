# SPDX-License-Identifier: Apache-2.0
"""What is wrong is said in one line, and nothing is left of the attempt."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from lib import leaks
from lib.device import Device, Result, cli
from lib.tools import GIB, MIB, forget, pread, pwrite, room_in_shm, sh

NOBODY = 65534
TARGETS = f"{Path(__file__).resolve().parent}/lib/targets.py"


def refused(result: Result, *texts: str, status: int | None = None) -> str:
    """The one line of a refusal, which holds these texts; nothing was made."""
    assert result.out == ""
    assert result.err.startswith("ublkd: error: ") and result.err.count("\n") == 1, result.err
    assert result.status in ((1, 2) if status is None else (status,)), result
    for text in texts:
        assert text in result.err, result.err
    return result.err


def nothing_left() -> None:
    """Besides, the leak check looks after every test; here it is after every command."""
    assert leaks.find() == []


@pytest.fixture
def backing(image: Callable[..., Path]) -> Path:
    return image(16 * MIB)


def test_backing_files(files: Path, backing: Path) -> None:
    missing, empty, odd = files / "missing.img", files / "empty.img", files / "odd.img"
    empty.touch()
    odd.write_bytes(bytes(MIB + 100))
    refused(cli("add", "loop", missing), f"the backing file {missing} does not exist", "truncate -s 1G")
    refused(cli("add", "loop", files), f"the backing file {files} is a directory")
    refused(cli("add", "loop", empty), f"the backing file {empty} is empty", "truncate -s")
    refused(cli("add", "loop", "/dev/null"), "/dev/null is neither a regular file nor a block device")
    refused(cli("add", "loop", odd), f"{odd} has 1048676 bytes", "no multiple of the block size 512", "1048576")
    refused(cli("add", "loop"), "the loop target needs a backing file")
    refused(cli("-q", 2, missing), f"the backing file {missing} does not exist")
    nothing_left()


def test_no_room_for_statistics(backing: Path) -> None:
    with room_in_shm(4096):
        refused(cli("add", "loop", backing), "cannot set up the statistics in /dev/shm/ublkd-", "make room in /dev/shm")
    nothing_left()


def test_a_file_that_may_not_be_read(backing: Path) -> None:
    """Root may read everything, so this is for somebody else, who may use the driver."""
    backing.chmod(0o600)
    mode = os.stat("/dev/ublk-control").st_mode
    os.chmod("/dev/ublk-control", 0o666)
    try:
        line = refused(cli("add", "loop", backing, before=become_nobody), f"{backing} can't be")
        assert "Permission denied" in line
        refused(
            cli("add", "loop", backing, "-r", before=become_nobody),
            f"{backing} can't be read: Permission denied",
        )
    finally:
        os.chmod("/dev/ublk-control", mode)
    nothing_left()


def test_sizes_and_offsets(backing: Path) -> None:
    refused(cli("add", "loop", backing, "--offset", "16M"), "offset 16777216 is beyond the end", "16777216 bytes")
    refused(cli("add", "loop", backing, "--offset", "1T"), "is beyond the end of")
    refused(cli("add", "loop", backing, "--size-limit", "17M"), "size limit 17825792 is beyond the end")
    refused(cli("add", "loop", backing, "--offset", "8M", "--size-limit", "9M"), "is beyond the end")
    refused(cli("add", "loop", backing, "--size-limit", 1000), "1000 is no multiple of the block size 512")
    refused(cli("add", "loop", backing, "-b", 4096, "--offset", 512), "no multiple of the block size 4096")
    refused(
        cli("add", "memory", "--size", 5000),
        "size 5000 is no multiple of the block size 512",
        "4608 and 5120",
    )
    refused(cli("add", "memory", "--size", "1M", "-b", 3000), "3000", status=2)
    refused(cli("add", "memory", "--size", "lots"), "lots", status=2)
    nothing_left()


def test_numbers_queues_and_cpus(serve: Callable[..., Device]) -> None:
    size = ("--size", "16M")
    for flag, value in (
        ("-q", 0),
        ("-q", 5000),
        ("-q", "many"),
        ("-d", 0),
        ("-d", 4097),
        ("-n", -7),
        ("-q", -1),
    ):
        refused(cli("add", "null", flag, value), str(value), status=2)
    refused(cli("add", "null", *size, "--cpus", "0-2000"), "does not exist", "usable here: 0-3")
    refused(cli("add", "null", *size, "--cpus", "0,77"), "CPU 77 does not exist")
    refused(cli("add", "null", *size, "--cpus", "3-1"), "3-1", status=2)

    def narrow() -> None:
        os.sched_setaffinity(0, {0, 1})

    refused(
        cli("add", "null", *size, "--cpus", "1-2", before=narrow),
        "CPU 2 is not among those this process may run on",
        "usable here: 0-1",
    )
    nothing_left()
    device = serve("null", size=MIB, number=5)
    assert device.path == "/dev/ublkb5"
    refused(cli("add", "null", *size, "-n", 5), "device number 5 is in use", "ublkd list")
    refused(cli("add", "null", *size, "-n", 1 << 24), str(1 << 24))
    device.stop()
    nothing_left()


def test_an_offline_cpu() -> None:
    online = Path("/sys/devices/system/cpu/cpu3/online")
    online.write_text("0")
    try:
        refused(cli("add", "null", "--cpus", "3"), "CPU 3 is offline")
    finally:
        online.write_text("1")
    nothing_left()


def test_a_backing_served_twice(serve: Callable[..., Device], backing: Path) -> None:
    writer = serve("loop", backing, queues=1)
    line = f"the backing file {backing} is already being served as {writer.path}"
    refused(cli("add", "loop", backing), line, "--force")
    refused(cli("add", "loop", backing, "--read-only"), line, "--force")
    os.link(backing, backing.parent / "other-name.img")
    refused(cli("add", "loop", backing.parent / "other-name.img"), "is already being served")
    second = serve("loop", backing, queues=1, force=True)
    pwrite(second.path, b"insisted", 0)
    second.stop()
    writer.stop()
    readers = [serve("loop", backing, queues=1, read_only=True) for _ in range(2)]
    assert {pread(reader.path, 8, 0) for reader in readers} == {b"insisted"}
    refused(cli("add", "loop", backing), "is already being served")


def become_nobody() -> None:
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def without_driver() -> None:
    """A view of the machine that has no control device."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18
    assert libc.unshare(CLONE_NEWNS) == 0
    assert libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) == 0
    assert libc.mount(b"none", b"/dev", b"tmpfs", 0, None) == 0
    os.mkdir("/dev/shm")
    os.mknod("/dev/null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))


def test_no_driver_and_no_permission() -> None:
    for argv in (("add", "memory", "--size", "16M"), ("run", "memory", "--size", "16M"), ("features",)):
        refused(cli(*argv, before=without_driver), "/dev/ublk-control", "modprobe ublk_drv")
        line = refused(cli(*argv, before=become_nobody), "/dev/ublk-control", "root")
        assert "ermission" in line
    nothing_left()


def test_settings_files(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    for text, *expected in (
        ('[device]\ntarget = "memory"\nsise = "1G"\n', "sise", "size"),
        ('[device]\ntarget = "memory"\nqueues = "four"\n', "queues", "four"),
        ('[device]\ntarget = "memory"\nqueues = 0\n', "queues", "1"),
        ('[device]\ntarget = "memory"\nsize = true\n', "size"),
        ('[device]\ntarget = "tape"\n', "tape", "loop, memory, null"),
        ('[device]\ntarget = "memory\n', ":2: "),
        ('[devise]\ntarget = "memory"\n', "devise"),
    ):
        path.write_text(text)
        for argv in (("add", "--config", path), ("check-config", path)):
            refused(cli(*argv), str(path), *expected, status=2)
    refused(cli("add", "--config", tmp_path / "none.toml"), "none.toml")
    nothing_left()


def test_python_targets(tmp_path: Path) -> None:
    broken, absent = tmp_path / "broken.py", tmp_path / "absent.py"
    broken.write_text("import ublkd\nimport no_such_module\n")
    syntax = tmp_path / "syntax.py"
    syntax.write_text("class Disk(\n")

    def add(reference: object, *options: object) -> Result:
        return cli("add", "python", reference, "--size", "16M", *options)

    refused(add(f"{broken}:Disk"), f"{broken} can't be imported", "No module named 'no_such_module'", ":2")
    refused(add(f"{syntax}:Disk"), f"{syntax} can't be imported", "SyntaxError")
    refused(add(f"{absent}:Disk"), f"there is no Python file {absent}")
    refused(add(f"{TARGETS}:Nothing"), "has no class Nothing", "Disk")
    refused(add(f"{TARGETS}:os"), "is no subclass of ublkd.Target")
    refused(add(TARGETS), "needs FILE:CLASS")
    refused(add(f"{TARGETS}:NoRead"), "has no read() method, which every target needs")
    refused(add(f"{TARGETS}:RaisesInPrepare"), "prepare() raised ValueError: no such shelf", "targets.py:")
    refused(add(f"{TARGETS}:RaisesInOpen"), "open() raised", "the vault is closed", "targets.py:")
    refused(add(f"{TARGETS}:SingleProcess", "-q", 4), "is served by one process, not 4", "multiprocess = True")
    refused(cli("add", "python", f"{TARGETS}:Disk"), "size")
    nothing_left()


@pytest.mark.parametrize("direct", ["on", "off"])
def test_a_full_disk_under_a_sparse_file(
    direct: str, serve: Callable[..., Device], tmp_path: Path, raw_disk_4k: str
) -> None:
    """The application is told, and the device goes on."""
    sh("mkfs.ext4", "-qF", "-b", 4096, raw_disk_4k, "48M")
    place = tmp_path / "small"
    place.mkdir()
    sh("mount", raw_disk_4k, place)
    try:
        backing = place / "big.img"
        backing.touch()
        os.truncate(backing, GIB)
        device = serve("loop", backing, direct=direct)
        pwrite(device.path, b"kept" * 1024, 0)
        fd = os.open(device.path, os.O_WRONLY | os.O_DIRECT)
        try:
            with pytest.raises(OSError) as caught:
                fill(fd, 96)
        finally:
            os.close(fd)
        assert caught.value.errno == errno.ENOSPC
        assert device.state == "live"
        forget(device.path)
        assert pread(device.path, 4096, 0) == b"kept" * 1024
        sh("blkdiscard", "--offset", MIB, "--length", 96 * MIB, device.path)
        pwrite(device.path, b"room" * 1024, 8 * MIB)
        forget(device.path)
        assert pread(device.path, 4096, 8 * MIB) == b"room" * 1024
        device.stop()
    finally:
        sh("umount", place)


def fill(fd: int, count: int) -> None:
    """Write count MiB, 1 MiB at a time, from the second on; a short write is followed by its error."""
    import mmap

    with mmap.mmap(-1, MIB) as block:
        block.write(b"x" * MIB)
        view = memoryview(block)
        try:
            for number in range(1, count + 1):
                done = os.pwritev(fd, [view], number * MIB)
                if done < MIB:
                    os.pwritev(fd, [view[done:]], number * MIB + done)
        finally:
            view.release()


def test_devices_that_are_not_there() -> None:
    for verb in ("del", "show", "stat", "recover", "resize"):
        refused(cli(verb, 99), "99")
    refused(cli("del", "disk"), "'disk' is no ublk device", status=2)
    refused(cli("del"), "device numbers", status=2)
    refused(cli("frobnicate"), "frobnicate", status=2)
    refused(cli("add", "tape"), "'tape' is no target", status=2)
    assert re.fullmatch(r"\[\]\n", cli("list", "--json").out)
