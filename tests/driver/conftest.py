# SPDX-License-Identifier: Apache-2.0
"""Tests of our own driver, by small C clients. They run in a VM on which it is loaded: see run.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CLIENTS = HERE.parents[1] / "build" / "driver" / "tests"
sys.path.insert(0, str(HERE.parent))

from vm import dmesg  # noqa: E402


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
    before = len(_log())
    yield
    lines = _log()[before:]
    if dmesg.find_splats(lines):
        pytest.fail("the kernel complained:\n" + "\n".join(dmesg.excerpt(lines)), pytrace=False)
    assert not list(Path("/sys/class/ublk-char").iterdir()), "a device is left"


def _log() -> list[str]:
    return subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture
def ours() -> None:
    """Only for our own driver."""
    if not os.path.exists("/sys/module/ublkd_drv"):
        pytest.skip("another driver is loaded")
