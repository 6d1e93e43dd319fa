# SPDX-License-Identifier: Apache-2.0
"""Whatever servers and users do, the kernel keeps well."""

from __future__ import annotations

import os
import subprocess
import time

import pytest
from conftest import CLIENTS

SECONDS = int(os.environ.get("UBLKD_FUZZ_SECONDS", "20"))
SEED = os.environ.get("UBLKD_FUZZ_SEED", str(int(time.time())))


@pytest.mark.usefixtures("ours")
def test_fuzz(capsys: pytest.CaptureFixture[str]) -> None:
    done = subprocess.run(
        [CLIENTS / "fuzz", str(SECONDS), SEED], capture_output=True, text=True, timeout=SECONDS + 1800
    )
    with capsys.disabled():
        print(f"\nfuzz: {done.stdout.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
