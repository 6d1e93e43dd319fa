# SPDX-License-Identifier: Apache-2.0
"""What to do about a test whose prerequisites are not there."""

from __future__ import annotations

import os

import pytest


def skip_or_fail(reason: str) -> None:
    """A skipped test, or a failed one where everything should be there."""
    if os.environ.get("UBLKD_REQUIRE_KERNEL") == "1":
        pytest.fail(f"{reason}, and UBLKD_REQUIRE_KERNEL is set", pytrace=False)
    pytest.skip(reason)


def kernel_has(symbol: str) -> bool:
    """Whether the running kernel has a function of this name: root can tell what it can do without trying."""
    with open("/proc/kallsyms") as symbols:
        return any(line.split()[2] == symbol for line in symbols)
