# SPDX-License-Identifier: Apache-2.0
"""The systemd unit under a real systemd: starts, restarts, hands over, and stops after what is mounted on it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lib.needs import skip_or_fail
from lib.systemd import PROGRAM, Systemd
from lib.tools import MIB, fio_command, fio_result, sh, wait_until

SIZE = 64 * MIB
PATH = "/dev/ublkb7"
UNIT = "ublkd@disk"


@pytest.fixture
def boot(files: Path, tmp_path: Path) -> Iterator[Callable[..., Systemd]]:
    """boot(settings, fstab) -> systemd, whose unit ublkd@disk serves a file of the scratch disk as device 7."""
    if not os.path.exists(PROGRAM):
        skip_or_fail("needs systemd")
    booted: list[Systemd] = []
    backing = files / "disk.img"
    with open(backing, "wb") as file:
        file.truncate(SIZE)
    # an overlay's upper half can't be on another overlay
    sh("mount", "-t", "tmpfs", "tmpfs", tmp_path)

    def boot(more: str = "", fstab: str = "") -> Systemd:
        disk = f'[device]\ntarget = "loop"\nfile = "{backing}"\nnumber = 7\nqueues = 2\n{more}'
        booted.append(Systemd(tmp_path, disk, fstab))
        return booted[-1]

    yield boot
    for each in booted:
        each.close()
    sh("umount", "--lazy", tmp_path)


def is_live(systemd: Systemd) -> bool:
    """Whether the device is served."""
    found = json.loads(systemd.run("ublkd", "list", "--json"))
    return [(each["path"], each["state"], each["served"]) for each in found] == [(PATH, "live", True)]


def is_gone(systemd: Systemd) -> None:
    """The unit has stopped well, and left nothing."""
    wait_until(lambda: systemd.properties(UNIT)["ActiveState"] in ("inactive", "failed"), "the unit ends", 60)
    last = systemd.properties(UNIT)
    assert (last["ActiveState"], last["Result"]) == ("inactive", "success"), systemd.said()
    assert not os.path.exists(PATH)
    assert systemd.run("ublkd", "list", "--json").strip() == "[]"


@pytest.mark.time_limit(500)
def test_a_unit_starts_restarts_reloads_and_stops(boot: Callable[..., Systemd]) -> None:
    """fio on the device sees neither the crash of the supervisor nor the new version."""
    systemd = boot()
    first = systemd.properties(UNIT)
    assert (first["ActiveState"], first["SubState"], first["NRestarts"]) == ("active", "running", "0"), systemd.said()
    assert is_live(systemd) and first["StatusText"] == f"serving {PATH}"
    job = {"rw": "randwrite", "bs": "8k", "iodepth": 8, "size": 2 * MIB, "rate_iops": 20}
    fio = subprocess.Popen(fio_command(PATH, job), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        systemd.ctl("kill", "--signal=KILL", "--kill-whom=main", UNIT)
        wait_until(lambda: systemd.properties(UNIT)["NRestarts"] == "1", "systemd starts another one", 60)
        wait_until(lambda: systemd.properties(UNIT)["ActiveState"] == "active", "which serves", 60)
        second = systemd.properties(UNIT)
        assert second["MainPID"] not in ("0", first["MainPID"]) and is_live(systemd)
        assert "taken over" in systemd.said() or "recovered" in systemd.said(), systemd.said()
        systemd.ctl("reload", UNIT)
        wait_until(lambda: systemd.properties(UNIT)["MainPID"] not in ("0", second["MainPID"]), "it is replaced", 60)
        wait_until(lambda: is_live(systemd), "the new one serves")
        out = fio.communicate(timeout=120)[0]
        assert fio.returncode == 0, out[:2000]
        fio_result(out)
    finally:
        fio.kill()
        fio.wait()
    assert systemd.properties(UNIT)["NRestarts"] == "1", systemd.said()
    systemd.ctl("stop", UNIT)
    is_gone(systemd)


@pytest.mark.time_limit(300)
def test_a_device_that_is_removed_by_hand_stays_away(boot: Callable[..., Systemd]) -> None:
    """That is no failure of the unit's, which can be started again and stopped as well."""
    systemd = boot()
    systemd.run("ublkd", "del", "7")
    is_gone(systemd)
    systemd.ctl("start", UNIT)
    assert is_live(systemd) and systemd.properties(UNIT)["NRestarts"] == "0"
    systemd.ctl("stop", UNIT)
    is_gone(systemd)


@pytest.mark.time_limit(300)
def test_a_unit_with_a_bad_settings_file_fails_once(boot: Callable[..., Systemd]) -> None:
    """And says why; trying again would not make it better."""
    systemd = boot("sise = 5\n")
    found = systemd.properties(UNIT)
    assert (found["ActiveState"], found["NRestarts"], found["ExecMainStatus"]) == ("failed", "0", "2"), systemd.said()
    assert "sise" in systemd.said() and not os.path.exists(PATH)


@pytest.mark.time_limit(500)
def test_shutdown_unmounts_first(boot: Callable[..., Systemd], files: Path, tmp_path: Path) -> None:
    """What was written without a sync before a power-off is there after the next boot; fstab as in the manual."""
    place = files / "mnt"
    place.mkdir()
    fstab = f"{PATH} {place} ext4 _netdev,x-systemd.requires=ublkd@disk.service,nofail 0 2"
    systemd = boot()
    sh("mkfs.ext4", "-qF", PATH)
    systemd.power_off()
    assert not os.path.exists(PATH), systemd.said()
    text = os.urandom(3 * MIB)
    for turn in range(2):
        systemd = boot(fstab=fstab)
        wait_until(lambda: is_live(systemd), "the device is served")  # noqa: B023
        assert systemd.run("findmnt", "-no", "SOURCE", place).strip() == PATH, systemd.said()
        if turn:
            assert systemd.run("cmp", place / "data", tmp_path / "data") == ""
        else:
            (tmp_path / "data").write_bytes(text)
            systemd.run("cp", tmp_path / "data", place / "data")
        systemd.power_off()
        assert not os.path.exists(PATH), systemd.said()
        # clean without its journal: it was unmounted while the device was served
        assert "clean" in sh("e2fsck", "-n", files / "disk.img")
        assert "needs_recovery" not in sh("dumpe2fs", "-h", files / "disk.img")
