# SPDX-License-Identifier: Apache-2.0
"""Tests of our own driver, by small C clients. They run in a VM on which it is loaded: see run.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[1]
CLIENTS = TOP / "build" / "driver" / "tests"
MODULE = TOP / "build" / "driver" / os.uname().release / "ublkd_drv.ko"
sys.path.insert(0, str(HERE.parent))

from ublkd.control.commands import Control  # noqa: E402
from vm import debug, dmesg  # noqa: E402

DEBUG = os.environ.get("UBLKD_DEBUG_KERNEL") == "1"
"""On a kernel of scripts/driver --debug."""

LEAKS = Path("/sys/kernel/debug/kmemleak")

Results = dict[str, int]
Compare = Callable[..., tuple[Results, Results]]

NOT_THERE = 9999
LIMIT_S = 1200
"""Only so that a hang is a failure: a client's cases take seconds."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests here need a driver."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.kernel)


@pytest.fixture(autouse=True)
def clean_log() -> Iterator[None]:
    """Skipped without a driver; fails if the kernel complained or a device is left."""
    if os.geteuid() or not os.path.exists("/dev/ublk-control"):
        if os.environ.get("UBLKD_REQUIRE_KERNEL") == "1":
            pytest.fail("needs root and the ublk driver, and UBLKD_REQUIRE_KERNEL is set", pytrace=False)
        pytest.skip("needs root and the ublk driver")
    before = len(kernel_log())
    yield
    lines = kernel_log()[before:]
    if dmesg.find_splats(lines):
        pytest.fail("the kernel complained:\n" + "\n".join(dmesg.excerpt(lines)), pytrace=False)
    assert not list(Path("/sys/class/ublk-char").iterdir()), "a device is left"
    if DEBUG:
        # it goes off when it finds something, or has no room
        assert re.search(r"debug_locks: +1$", Path("/proc/lockdep_stats").read_text(), re.MULTILINE), "lockdep is off"


@pytest.fixture(autouse=True, scope="session")
def no_leaks() -> Iterator[None]:
    """On a debug kernel: at the end the driver is unloaded, and memory that nothing points to is a failure."""
    if not DEBUG:
        yield
        return
    _scan()
    LEAKS.write_text("clear")  # what the boot left
    yield
    subprocess.run(["rmmod", "ublkd_drv"], check=True)
    time.sleep(6)  # younger memory is not looked at
    _scan()
    _scan()
    if lost := debug.leaks(LEAKS.read_text()):
        pytest.fail("memory is lost:\n" + "".join(lost)[:5000], pytrace=False)


def _scan() -> None:
    # fails if the detector is off
    LEAKS.write_text("scan")


def kernel_log() -> list[str]:
    """The lines of dmesg."""
    return subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture
def ours() -> None:
    """Only for our own driver."""
    if not os.path.exists("/sys/module/ublkd_drv"):
        pytest.skip("another driver is loaded")


def delete_all() -> None:
    """What a failed run leaves, so that the driver can be unloaded and the failure is the one that is told."""
    with Control() as ctl:
        for node in Path("/sys/class/ublk-char").iterdir():
            ctl.del_dev(int(node.name.removeprefix("ublkc")))


def results(program: str, *arguments: str) -> Results:
    """What a client says of the driver that is loaded, by name."""
    command = [CLIENTS / program, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired as e:
        last = (e.stdout or b"").decode().splitlines()[-3:]
        delete_all()
        pytest.fail(f"the cases were not through within {LIMIT_S} seconds; the last were {last}", pytrace=False)
    if done.returncode:
        delete_all()
        pytest.fail(f"exit status {done.returncode}: {done.stderr}{done.stdout[-500:]}", pytrace=False)
    pairs = (line.split() for line in done.stdout.splitlines())
    return {name: int(value) for name, value in pairs}


def differences(theirs: Results, ours: Results) -> dict[str, tuple[int, int]]:
    """By name, where two drivers differ: the first one's result, the second one's."""
    return {
        name: (theirs.get(name, NOT_THERE), ours.get(name, NOT_THERE))
        for name in {*theirs, *ours}
        if theirs.get(name) != ours.get(name)
    }


@pytest.fixture
def compare() -> Compare:
    """compare(program, argument...): a client's results with the kernel's driver, and with ours."""
    there = subprocess.run(["modinfo", "ublk_drv"], capture_output=True, text=True)
    if "alias" in there.stdout or there.returncode:
        pytest.skip("this kernel has no driver of its own")

    def compare(program: str, *arguments: str) -> tuple[Results, Results]:
        ours = results(program, *arguments)
        subprocess.run(["rmmod", "ublkd_drv"], check=True)
        subprocess.run(["modprobe", "ublk_drv"], check=True)
        try:
            refused = subprocess.run(["insmod", MODULE], capture_output=True, text=True)
            assert refused.returncode and "Device or resource busy" in refused.stderr
            theirs = results(program, *arguments)
        finally:
            subprocess.run(["rmmod", "ublk_drv"], check=True)
            subprocess.run(["insmod", MODULE], check=True)
        return theirs, ours

    return compare
