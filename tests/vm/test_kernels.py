# SPDX-License-Identifier: Apache-2.0
"""Which package a kernel name means, and the cache."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest

from vm import apt, kernels
from vm.outcome import VMError

PACKAGES = [
    "linux-image-6.1.0-9-amd64",
    "linux-image-6.1.0-56-amd64",
    "linux-image-6.1.0-57-cloud-amd64",
    "linux-image-6.12.9+deb12-amd64",
    "linux-image-6.12.117+deb12-amd64",
    "linux-image-6.12.118+deb12-cloud-amd64",
    "linux-image-6.12.118+deb12-rt-amd64",
    "linux-image-6.12-amd64",
    "linux-image-7.1.9+deb14-amd64",
    "linux-image-7.2.12+deb14-amd64",
    "linux-image-7.2.9+deb14-amd64",
    "linux-image-7.10.1+deb14-rt-amd64",
]


@pytest.mark.parametrize(
    ("name", "release"),
    [
        ("bookworm", "6.1.0-56-amd64"),
        ("6.1", "6.1.0-56-amd64"),
        ("6.12", "6.12.117+deb12-amd64"),
        ("newest", "7.2.12+deb14-amd64"),
    ],
)
def test_name_means_the_newest_plain_image(name: str, release: str) -> None:
    assert kernels.pick(kernels.series(name), PACKAGES) == release


def test_newest_is_never_older_than_7_2() -> None:
    assert kernels.pick(kernels.series("newest"), ["linux-image-7.1.9+deb14-amd64"]) is None


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(VMError, match=r"5\.10.*bookworm, 6\.1, 6\.12, newest"):
        kernels.series("5.10")


class FakeApt:
    """Stands for apt.Source: its packages, and how often it was asked."""

    def __init__(self, packages: dict[str, list[str]]) -> None:
        self.packages_by_suite, self.updates, self.failure = packages, 0, ""

    def __call__(self, suite: str, state: Path) -> FakeApt:
        self.suite = suite
        return self

    def update(self) -> None:
        self.updates += 1
        if self.failure:
            raise apt.AptError(self.failure)

    def packages(self, pattern: str) -> list[str]:
        return self.packages_by_suite.get(self.suite, [])


@pytest.fixture
def fake_apt(monkeypatch: pytest.MonkeyPatch) -> FakeApt:
    fake = FakeApt({apt.OWN: ["linux-image-6.12.5+deb12-amd64"], "sid": ["linux-image-7.3.1+deb14-amd64"]})
    monkeypatch.setattr(apt, "Source", fake)

    def unpack(store: object, source: object, release: str, directory: Path) -> None:
        time.sleep(0.05)
        directory.mkdir()
        (directory / "vmlinuz").touch()

    monkeypatch.setattr(kernels.Store, "_unpack", unpack)
    return fake


def test_next_suite_is_asked_when_one_has_no_such_kernel(fake_apt: FakeApt, tmp_path: Path) -> None:
    kernel = kernels.Store(tmp_path).get("newest")
    assert (kernel.release, fake_apt.suite) == ("7.3.1+deb14-amd64", "sid")


def test_apt_is_asked_once_a_day(fake_apt: FakeApt, tmp_path: Path) -> None:
    store = kernels.Store(tmp_path)
    store.get("6.12")
    assert store.get("6.12").release == "6.12.5+deb12-amd64"
    assert fake_apt.updates == 1
    record = tmp_path / "6.12.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "resolved": 0}))
    fake_apt.packages_by_suite[apt.OWN].append("linux-image-6.12.6+deb12-amd64")
    assert store.get("6.12").release == "6.12.6+deb12-amd64"


def test_cached_kernel_is_used_when_apt_fails_and_that_is_said(fake_apt: FakeApt, tmp_path: Path) -> None:
    store = kernels.Store(tmp_path)
    store.get("6.12")
    fake_apt.failure = "no network"
    kernel = store.get("6.12", refresh=True)
    assert kernel.release == "6.12.5+deb12-amd64"
    assert "no network" in kernel.note


def test_without_cache_a_failing_apt_is_an_error(fake_apt: FakeApt, tmp_path: Path) -> None:
    fake_apt.failure = "no network"
    with pytest.raises(VMError, match=r"can't fetch kernel 6\.12: no network"):
        kernels.Store(tmp_path).get("6.12")


def test_concurrent_users_fetch_once(fake_apt: FakeApt, tmp_path: Path) -> None:
    threads = [threading.Thread(target=kernels.Store(tmp_path).get, args=("6.12",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake_apt.updates == 1


def test_replaced_kernel_goes_when_it_was_not_used_for_long(fake_apt: FakeApt, tmp_path: Path) -> None:
    store = kernels.Store(tmp_path)
    old, recent = store.get("6.12").directory, tmp_path / "6.12.4+deb12-amd64"
    recent.mkdir()
    (recent / "vmlinuz").touch()
    os.utime(old, (0, 0))
    fake_apt.packages_by_suite[apt.OWN].append("linux-image-6.12.6+deb12-amd64")
    new = store.get("6.12", refresh=True).directory
    assert (old.exists(), recent.exists(), new.exists()) == (False, True, True)


def test_damaged_record_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / "6.12.json").write_text("{")
    assert kernels.Store(tmp_path).cached("6.12") is None


def test_module_lookup_takes_dashes_for_underscores(tmp_path: Path) -> None:
    kernel = kernels.Kernel("6.12", "6.12.5", tmp_path)
    kernel.modules.mkdir(parents=True)
    (kernel.modules / "modules.dep").write_text("kernel/a/ublk_drv.ko:\nkernel/b/dm-mod.ko:\n")
    assert kernel.has_module("dm_mod")
    assert not kernel.has_module("mod")
