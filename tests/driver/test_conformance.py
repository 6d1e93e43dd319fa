# SPDX-License-Identifier: Apache-2.0
"""The same commands for the kernel's driver and for ours: the same results, but for what docs/driver.md lists."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from conftest import CLIENTS

from ublkd.control.commands import Control

TOP = Path(__file__).resolve().parents[2]
MODULE = TOP / "build" / "driver" / os.uname().release / "ublkd_drv.ko"

NOT_THERE = 9999

DIFFERENCES: dict[str, tuple[int, int]] = {
    # re-issue means nothing without recovery: refused, as by 7.2
    "add.reissue-alone": (0, -22),
    "add.reissue-alone.flags": (16, NOT_THERE),
    "add.reissue-alone.rest": (65536, NOT_THERE),
    # parameters are checked as 7.2 does it, and a size that overflows is refused
    "params.fua-without-cache": (0, -22),
    "params.fua-without-cache.read-back": (1, 0),
    "params.huge-shift": (0, -22),
    "params.huge-shift.read-back": (1, 0),
    "params.huge-size": (0, -22),
    "params.huge-size.read-back": (1, 0),
    # FETCH of a tag whose write waits for its data is refused because all is fetched, as in 7.2
    "get-data.write.fetch": (-22, -16),
    # pread and pwrite without USER_COPY are forbidden, rather than wrong, as in 7.2
    **{
        f"{kind}.{op}.{call}": (-22, -13)
        for kind in ("copy", "get-data")
        for op in ("read", "write")
        for call in ("pread", "pwrite", "pread-idle", "pread-at-end", "pread-past-end")
    },
}
"""By name: the kernel's result, and ours. docs/driver.md says why."""


LIMIT_S = 1200
"""Only so that a hang is a failure: the cases take seconds."""


def results() -> dict[str, int]:
    """By name, of the driver that is loaded."""
    try:
        done = subprocess.run([CLIENTS / "conformance"], capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired as e:
        last = (e.stdout or b"").decode().splitlines()[-3:]
        delete_all()
        pytest.fail(f"the cases were not through within {LIMIT_S} seconds; the last were {last}", pytrace=False)
    if done.returncode:
        delete_all()
        pytest.fail(f"exit status {done.returncode}: {done.stderr}{done.stdout[-500:]}", pytrace=False)
    pairs = (line.split() for line in done.stdout.splitlines())
    return {name: int(value) for name, value in pairs}


def delete_all() -> None:
    """What a failed run leaves, so that the driver can be unloaded and the failure is the one that is told."""
    with Control() as ctl:
        for node in Path("/sys/class/ublk-char").iterdir():
            ctl.del_dev(int(node.name.removeprefix("ublkc")))


@pytest.fixture
def both() -> tuple[dict[str, int], dict[str, int]]:
    """Results of the kernel's driver, and of ours."""
    there = subprocess.run(["modinfo", "ublk_drv"], capture_output=True, text=True)
    if "alias" in there.stdout or there.returncode:
        pytest.skip("this kernel has no driver of its own")
    ours = results()
    subprocess.run(["rmmod", "ublkd_drv"], check=True)
    subprocess.run(["modprobe", "ublk_drv"], check=True)
    try:
        refused = subprocess.run(["insmod", MODULE], capture_output=True, text=True)
        assert refused.returncode and "File exists" in refused.stderr
        theirs = results()
    finally:
        subprocess.run(["rmmod", "ublk_drv"], check=True)
        subprocess.run(["insmod", MODULE], check=True)
    return theirs, ours


@pytest.mark.usefixtures("ours")
def test_same_results_as_the_kernel_s_driver(both: tuple[dict[str, int], dict[str, int]]) -> None:
    theirs, ours = both
    assert len(ours) > 150
    found = {
        name: (theirs.get(name, NOT_THERE), ours.get(name, NOT_THERE))
        for name in {*theirs, *ours}
        if theirs.get(name) != ours.get(name)
    }
    assert found == DIFFERENCES, "\n".join(f"{name}: {was} {now}" for name, (was, now) in sorted(found.items()))


@pytest.mark.usefixtures("ours")
def test_every_case_runs_on_ours() -> None:
    assert len(results()) > 150
