# SPDX-License-Identifier: Apache-2.0
"""Prerequisites, a time limit and a leak check for every test; devices, files and disks on request."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
for place in (HERE, HERE.parent):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))

from lib import device, disks, leaks  # noqa: E402
from lib.needs import skip_or_fail  # noqa: E402

from vm import dmesg  # noqa: E402

LIMIT_S = 150


def _lacking() -> str:
    """What this machine lacks for tests on a real driver."""
    if os.geteuid() != 0:
        return "needs root"
    if not os.path.exists("/dev/ublk-control"):
        return "needs the ublk driver"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests here are tests on a real driver."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.kernel)


class TimeIsUp(Exception):
    """The test took too long."""


@pytest.fixture(scope="session", autouse=True)
def warm() -> None:
    """What every forked child would import again, imported once."""
    if not _lacking():
        device.warm()


@pytest.fixture(scope="session")
def kernel_log() -> Iterator[leaks.KernelLog]:
    log = leaks.KernelLog()
    yield log
    log.close()


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    """Nothing is left of a test: no device, process, file, mount, and no complaint of the kernel."""
    lacking = _lacking()
    if lacking:
        skip_or_fail(lacking)
    log: leaks.KernelLog = request.getfixturevalue("kernel_log")
    log.news()
    yield
    left = leaks.find()
    if left:
        where = leaks.stacks()
        leaks.clean()
        pytest.fail("left behind: " + ", ".join(left) + f"\n{where}", pytrace=False)
    lines = log.news()
    if dmesg.find_splats(lines):
        pytest.fail("the kernel complained:\n" + "\n".join(dmesg.excerpt(lines)), pytrace=False)


@pytest.fixture(autouse=True)
def time_limit(request: pytest.FixtureRequest, fresh: None) -> Iterator[None]:
    """A test that hangs fails, and shows where the processes are."""
    marker = request.node.get_closest_marker("time_limit")
    seconds = marker.args[0] if marker else LIMIT_S

    def alarm(_number: int, _frame: object) -> None:
        where = leaks.stacks()
        # Whoever waits for a device that nobody serves, as this test's clean-up may, waits for ever.
        leaks.clean()
        raise TimeIsUp(f"not done after {seconds} seconds\n{where}")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "time_limit(seconds): how long the test may take")


@pytest.fixture
def serve() -> Iterator[Callable[..., device.Device]]:
    """serve(target, file, **settings) -> Device; those that are left are stopped, and must stop well."""
    started: list[device.Device] = []

    def serve(target: str, file: object = None, **settings: Any) -> device.Device:
        started.append(device.start(target, file, **settings))
        return started[-1]

    yield serve
    for each in reversed(started):
        # One that is gone unasked was cleaned away when the time was up.
        if not each.gone and each.state != "gone":
            each.stop()


@pytest.fixture(scope="session")
def scratch() -> Iterator[disks.Scratch | None]:
    """The scratch disk with ordinary sectors, if the machine has one."""
    found = disks.with_blocks_of(512)
    scratch = disks.Scratch(found) if found else None
    yield scratch
    if scratch:
        scratch.release()


@pytest.fixture
def files(scratch: disks.Scratch | None) -> Iterator[Path]:
    """An empty directory on a real disk: direct I/O, holes and durable writes are what they are."""
    if scratch is None:
        skip_or_fail("needs a scratch disk (UBLKD_VM_DISKS)")
        return
    yield scratch.directory()
    scratch.empty()


@pytest.fixture
def image(files: Path) -> Callable[..., Path]:
    """image(size, name) -> a sparse file."""

    def image(size: int, name: str = "disk.img") -> Path:
        path = files / name
        with open(path, "wb") as file:
            file.truncate(size)
        return path

    return image


@pytest.fixture
def raw_disk(scratch: disks.Scratch | None) -> str:
    """A blank disk."""
    if scratch is None:
        skip_or_fail("needs a scratch disk (UBLKD_VM_DISKS)")
        raise AssertionError
    return scratch.raw()


@pytest.fixture
def raw_disk_4k() -> str:
    """A blank disk with sectors of 4096 bytes."""
    found = disks.with_blocks_of(4096)
    if found is None:
        skip_or_fail("needs a scratch disk with sectors of 4096 bytes (UBLKD_VM_DISKS)")
        raise AssertionError
    return disks.Scratch(found).raw()
