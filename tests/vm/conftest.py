# SPDX-License-Identifier: Apache-2.0
"""Make the package importable however pytest imports tests, and keep machine tests out of quick runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Machine tests run only when asked for."""
    if os.environ.get("UBLKD_TEST_VM") == "1":
        return
    for item in items:
        if item.get_closest_marker("vm"):
            item.add_marker(pytest.mark.skip(reason="boots machines: use `make test-harness`"))
