# SPDX-License-Identifier: Apache-2.0
"""Requests in a ring's buffer table, and batches of commands: as by the kernel's driver, where io_uring has them."""

from __future__ import annotations

import pytest
from conftest import Compare, Results, differences, results

from ublkd.control import uapi
from ublkd.control.commands import Control

NEEDED = uapi.F_SUPPORT_ZERO_COPY | uapi.F_AUTO_BUF_REG | uapi.F_BATCH_IO

KINDS = ("zero-copy.write", "zero-copy.read", "auto-zero-copy.write", "auto-zero-copy.read")
BATCH_KINDS = ("batch-auto.write", "batch-auto.read")

DIFFERENCES: dict[str, tuple[int, int]] = {
    # an index of more than 32 bits is none
    **{f"{kind}.register.huge-index": (0, -1) for kind in KINDS + BATCH_KINDS},
    # a request that was answered is no more to be had
    **{f"{kind}.late.register": (0, -22) for kind in BATCH_KINDS},
}
"""By name: the kernel's result, and ours. docs/driver.md says why."""


@pytest.fixture(autouse=True)
def there(ours: None) -> None:
    """Only where io_uring lets a driver do it."""
    with Control() as ctl:
        if ctl.get_features() & NEEDED != NEEDED:
            pytest.skip("this kernel's io_uring lets no driver do it")


def check_data(found: Results) -> None:
    """What a disk's users wrote and read is what its server had, where it came by a table or a copy."""
    wrong = {name: value for name, value in found.items() if name.endswith(".wrong") and value}
    assert wrong.keys() <= {"user-copy.read.user.wrong"}
    assert found["batch.copy.written"] == 1


def test_same_results_as_the_kernel_s_driver(compare: Compare) -> None:
    theirs, ours = compare("zerocopy")
    assert len(ours) > 400
    check_data(ours)
    found = differences(theirs, ours)
    assert found == DIFFERENCES, "\n".join(f"{name}: {was} {now}" for name, (was, now) in sorted(found.items()))


def test_a_server_dies_with_a_request() -> None:
    """The next one gets it, but not while a process that outlives the server has its pages in a table."""
    expected = {"start": 0, "waits": 1, "recovery.start": 0, "recovery.end": 0, "result": 8192, "wrong": 0, "stop": 0}
    kinds = ("zero-copy", "auto", "auto-zero-copy", "batch", "batch-auto")
    wanted = {f"{kind}.{name}": value for kind in kinds for name, value in expected.items()}
    held = {f"{kind}.held": -16 for kind in ("zero-copy", "auto-zero-copy", "batch-auto")}
    stops = {"start": 0, "waits": 1, "killed": 1, "result": -5, "stop": 0}
    kinds = ("zero-copy", "auto", "batch-auto")
    own = {f"{kind}.self-stop.{name}": value for kind in kinds for name, value in stops.items()}
    assert results("zerocopy", "death") == wanted | held | own
