# SPDX-License-Identifier: Apache-2.0
"""The same commands for the kernel's driver and for ours: the same results, but for what docs/driver.md lists."""

from __future__ import annotations

import pytest
from conftest import NOT_THERE, Compare, differences, results

from ublkd.control import uapi

ALWAYS: dict[str, tuple[int, int]] = {
    # what means nothing, and a size that overflows, is refused
    "params.fua-without-cache": (0, -22),
    "params.fua-without-cache.read-back": (1, 0),
    "params.huge-size": (0, -22),
    "params.huge-size.read-back": (1, 0),
}
"""By name: the kernel's result, and ours. docs/driver.md says why."""

BEFORE_7_0: dict[str, tuple[int, int]] = {
    **ALWAYS,
    # re-issue means nothing without recovery: refused, as by 7.2
    "add.reissue-alone": (0, -22),
    "add.reissue-alone.flags": (16, NOT_THERE),
    "add.reissue-alone.rest": (65536, NOT_THERE),
    # so are shifts beyond a word
    "params.huge-shift": (0, -22),
    "params.huge-shift.read-back": (1, 0),
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

SINCE_7_0: dict[str, tuple[int, int]] = {
    **ALWAYS,
    # a second FETCH of a tag, as in 6.12
    "copy.fetch.again": (-22, -16),
    "user-copy.fetch.again": (-22, -16),
    "get-data.fetch.again": (-22, -16),
}


@pytest.mark.usefixtures("ours")
def test_same_results_as_the_kernel_s_driver(compare: Compare) -> None:
    theirs, ours = compare("conformance")
    assert len(ours) > 150
    recent = theirs.pop("features") & uapi.F_SAFE_STOP_DEV
    assert ours.pop("features") & uapi.F_SAFE_STOP_DEV
    expected = SINCE_7_0 if recent else BEFORE_7_0
    found = differences(theirs, ours)
    assert found == expected, "\n".join(f"{name}: {was} {now}" for name, (was, now) in sorted(found.items()))


@pytest.mark.usefixtures("ours")
def test_every_case_runs_on_ours() -> None:
    assert len(results("conformance")) > 150
