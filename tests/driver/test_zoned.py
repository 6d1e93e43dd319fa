# SPDX-License-Identifier: Apache-2.0
"""Zoned devices: reports, writes in order, appends, commands to zones; and servers that report nonsense."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CLIENTS, DEBUG, Compare, differences, results

MIB = 1 << 20

EXPECTED = {
    "add.without-user-copy": -22,
    "params.good": 0,
    "params.not-zoned": -22,
    "params.no-chunk": -22,
    "params.odd-chunk": -22,
    "params.no-append": -22,
    "params.open-all": 0,
    "params.open-too-many": -22,
    "params.active-too-many": -22,
    "start": 0,
    "zoned": 100,
    "zones": 48,
    "chunk": 8192,
    "max-open": 8,
    "max-active": 16,
    "append-bytes": 65536,
    "report.all": 48,
    "report.last": 385024,
    "report.type": 12,
    "report.some": 7,
    "report.some.first": 40960,
    "report.past-end": 0,
    "empty.condition": 1,
    "empty.written": 0,
    "write.conventional": 4096,
    "read.conventional": 4290,
    "write.first": 4096,
    "write.second": 204800,
    "read.back": 209100,
    "written.condition": 2,
    "written.written": 408,
    "reset": 0,
    "reset.condition": 1,
    "reset.written": 0,
    "read.after-reset": 4096,
    "write.after-reset": 8192,
    "open": 0,
    "open.condition": 3,
    "open.written": 0,
    "close": 0,
    "close.condition": 1,
    "close.written": 0,
    "finish": 0,
    "finish.condition": 14,
    "finish.written": 8192,
    "reset.some": 0,
    "reset.unaligned": -22,
    "fill": 262144,
    "reset.all": 0,
    "reset.all.condition": 1,
    "reset.all.written": 0,
    "came.reset-all": 1,
    "came.finish": 1,
    "came.unknown": 0,
}


@pytest.mark.usefixtures("ours")
def test_what_users_of_a_zoned_disk_see() -> None:
    assert results("zoned", "cases") == EXPECTED


@pytest.mark.usefixtures("ours")
def test_zoned_disks_as_by_the_kernel_s_driver(compare: Compare) -> None:
    theirs, ours = compare("zoned", "cases")
    assert ours == EXPECTED
    assert differences(theirs, ours) == {}


@pytest.mark.usefixtures("ours")
def test_a_server_that_reports_nonsense_or_dies_in_a_report() -> None:
    found = results("zoned", "liars")
    assert found.pop("die.in-own-start") == 0
    assert set(found) == {"no-zones", "wrong-place", "too-long", "refuse", "die", "die.recovery"}
    assert all(result < 0 for result in found.values()), found
    # The block layer looks at its requests every 5 seconds: nothing of these disks may be left for it.
    time.sleep(6)


class Disk:
    """A zoned disk, served until it is closed."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [CLIENTS / "zoned", "disk"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        self.path = self.process.stdout.readline().strip()
        assert self.path.startswith("/dev/ublkb")

    def tell(self, line: str) -> None:
        """o: appends go outside their zone from now on; h: the server is honest again."""
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def close(self) -> dict[str, Any]:
        """How often each operation came."""
        out, _ = self.process.communicate()
        assert self.process.returncode == 0
        return dict(json.loads(out))


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    if DEBUG:
        pytest.skip("the debug kernel has no btrfs")
    yield tmp_path
    subprocess.run(["umount", "-q", tmp_path])


@pytest.mark.usefixtures("ours")
def test_btrfs_appends(mounted: Path) -> None:
    disk = Disk()
    subprocess.run(["mkfs.btrfs", "-q", "-O", "zoned", "-d", "single", "-m", "single", disk.path], check=True)
    data = os.urandom(MIB) * 3
    for generation in range(3):
        subprocess.run(["mount", "-t", "btrfs", disk.path, mounted], check=True)
        for number in range(generation):
            assert (mounted / f"{number}").read_bytes() == data[number:], "what was written is read"
        (mounted / f"{generation}").write_bytes(data[generation:])
        subprocess.run(["umount", mounted], check=True)
    came = disk.close()
    assert came["append"] > 0, "btrfs writes data by appends"
    assert came["report"] > 0


@pytest.mark.usefixtures("ours")
def test_an_append_that_went_elsewhere_is_an_error(mounted: Path) -> None:
    disk = Disk()
    subprocess.run(["mkfs.btrfs", "-q", "-O", "zoned", "-d", "single", "-m", "single", disk.path], check=True)
    subprocess.run(["mount", "-t", "btrfs", disk.path, mounted], check=True)
    disk.tell("o")
    write = ["dd", "if=/dev/zero", f"of={mounted}/file", "bs=64k", "count=1", "oflag=direct", "status=none"]
    failed = subprocess.run(write, capture_output=True, text=True)
    assert failed.returncode and "Input/output error" in failed.stderr
    disk.tell("h")
    subprocess.run(["umount", mounted], check=True)
    disk.close()
