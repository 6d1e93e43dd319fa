# SPDX-License-Identifier: Apache-2.0
"""Whatever servers and users do, the kernel keeps well."""

from __future__ import annotations

import os
import random
import re
import subprocess
import time
from pathlib import Path

import pytest
from conftest import CLIENTS, DEBUG, kernel_log

from vm import dmesg

SECONDS = int(os.environ.get("UBLKD_FUZZ_SECONDS", "120" if DEBUG else "20"))
SEED = os.environ.get("UBLKD_FUZZ_SEED", str(int(time.time())))

FAULTS = {"failslab": 1.0, "fail_page_alloc": 0.1, "fail_usercopy": 2.0}
"""What fails on debug kernels: small allocations, pages, copies from and to users; and how often beside each other."""

ONE_IN = (30, 100, 400)
"""One of how many fails; another choice every few seconds, so that some processes get far."""

ENDLESS = 1 << 30


class Faults:
    """Failures for processes that ask for them."""

    def __init__(self) -> None:
        for fault in FAULTS:
            # for them only, first: we write here, too
            for name, value in {"task-filter": "Y", "verbose": "0", "times": str(ENDLESS)}.items():
                self._path(fault, name).write_text(value)
        # also where the caller could wait for memory, and single pages
        for name, value in {"ignore-gfp-wait": "N", "ignore-gfp-highmem": "N", "min-order": "0"}.items():
            self._path("fail_page_alloc", name).write_text(value)
        self._path("failslab", "ignore-gfp-wait").write_text("N")
        text = Path("/sys/module/ublkd_drv/sections/.text").read_text().strip()
        size = int(Path("/sys/module/ublkd_drv/coresize").read_text())
        self._places = (("0", hex((1 << 64) - 1)), (text, hex(int(text, 16) + size)))
        self._random = random.Random(SEED)

    def change(self) -> None:
        """Anywhere in the kernel or in calls from the driver only, and how often."""
        start, end = self._random.choice(self._places)
        one_in = self._random.choice(ONE_IN)
        for fault, factor in FAULTS.items():
            self._path(fault, "require-start").write_text(start)
            self._path(fault, "require-end").write_text(end)
            self._path(fault, "interval").write_text(str(max(1, int(one_in * factor / 10))))
            self._path(fault, "probability").write_text("10")

    def end(self) -> dict[str, int]:
        """No more of them. How many there were."""
        for fault in FAULTS:
            self._path(fault, "probability").write_text("0")
        return {fault: ENDLESS - int(self._path(fault, "times").read_text()) for fault in FAULTS}

    @staticmethod
    def _path(fault: str, name: str) -> Path:
        return Path("/sys/kernel/debug") / fault / name


@pytest.mark.usefixtures("ours")
def test_fuzz(capsys: pytest.CaptureFixture[str]) -> None:
    faults = Faults() if DEBUG else None
    command = [CLIENTS / "fuzz", str(SECONDS), SEED, *(["faults"] if faults else [])]
    deadline = time.monotonic() + SECONDS + 1800
    splats: list[str] = []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while True:
        if faults:
            faults.change()
        try:
            output, errors = process.communicate(timeout=10)
            break
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                process.kill()
                raise
        # clean_log judges, but only at the end
        if news := dmesg.find_splats(kernel_log())[len(splats) :]:
            splats += news
            with capsys.disabled():
                print("", *news, sep="\n", flush=True)
    if faults:
        failed = faults.end()
        output += "made to fail: " + ", ".join(f"{name} {count}" for name, count in failed.items())
        assert all(failed.values()), output
    with capsys.disabled():
        print(f"\nfuzz: {output.strip()}")
    assert process.returncode == 0, output + errors
    assert all(int(count) for count in re.findall(r"(\d+) (?:commands|reads and writes)", output)), "nothing worked"
