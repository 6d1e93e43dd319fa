# SPDX-License-Identifier: Apache-2.0
"""The cache of debug kernels, and the judge of whether they find bugs."""

from __future__ import annotations

from pathlib import Path

import pytest

from vm import apt, debug, driver, kernels


class FakeApt:
    """Stands for apt.Source with one kernel and its source."""

    def __init__(self, suite: str, state: Path) -> None:
        pass

    def update(self) -> None:
        pass

    def packages(self, pattern: str) -> list[str]:
        return ["linux-image-6.12.117+deb13-amd64"]

    def version(self, package: str) -> str:
        assert package == "linux-source-6.12"
        return "6.12.117-1"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> debug.Store:
    def unpack(store: object, source: object, release: str, directory: Path) -> None:
        directory.mkdir()
        (directory / "vmlinuz").touch()

    monkeypatch.setattr(apt, "Source", FakeApt)
    monkeypatch.setattr(debug.Store, "_unpack", unpack)
    return debug.Store(tmp_path)


def test_another_configuration_is_another_kernel(
    store: debug.Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = store.get("6.12").release
    assert first.startswith("6.12.117-1-debug-")
    assert store.get("6.12").release == first
    other = tmp_path / "config"
    other.write_text("CONFIG_X=y\n")
    monkeypatch.setattr(debug, "CONFIG", other)
    assert store.cached("6.12") is None
    assert store.get("6.12").release != first


def test_they_are_not_among_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert debug.Store().root != kernels.Store().root


@pytest.mark.parametrize("release", ["6.1.0-56-amd64", "6.1.176-1-debug-00000000"])
def test_name_of_the_source_package(release: str) -> None:
    assert debug.source_package(release) == "linux-source-6.1"


def test_what_the_configuration_lacks() -> None:
    wanted = "# a comment\n\nCONFIG_A=y\nCONFIG_B=n\nCONFIG_C=7\nCONFIG_D=n\n"
    config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=70\nCONFIG_D=y\n"
    assert debug.not_granted(wanted, config) == ["CONFIG_C=7", "CONFIG_D=n"]


def test_what_checks_is_in_the_configuration() -> None:
    lines = debug.CONFIG.read_text().splitlines()
    for option in ("KASAN", "PROVE_LOCKING", "DEBUG_LIST", "FAILSLAB", "FAIL_PAGE_ALLOC", "DEBUG_KMEMLEAK"):
        assert f"CONFIG_{option}=y" in lines


def test_leaks_of_a_driver_are_told_from_those_of_the_kernel_s_own() -> None:
    head = "unreferenced object 0xffff888100000000 (size 8):\n  backtrace:\n    [<00>] kstrdup+0x1/0x2\n"
    theirs = head + "    [<00>] sysfs_slab_add+0x1/0x2\n"
    ours = head + "    [<00>] ublk_add+0x1/0x2 [ublkd_drv]\n"
    assert debug.leaks(theirs + ours + theirs) == [ours]
    assert debug.leaks("") == []


def test_each_bug_must_be_reported() -> None:
    log = [f"[    1.000000] {text}" for text in REPORTS]
    assert driver.missing_reports(log) == []
    assert driver.missing_reports(log[1:]) == [next(iter(driver.BUGS))]
    assert driver.missing_reports([f"said of it: {text}" for text in driver.BUGS.values()]) != []


REPORTS = [
    "BUG: sleeping function called from invalid context at bugs.c:30",
    "list_del corruption, ffff->next is LIST_POISON1 (dead000000000100)",
    "ODEBUG: free active (active state 0) object: ffff object type: timer_list hint: nothing+0x0/0x10 [bugs]",
    "WARNING: possible circular locking dependency detected",
    "INFO: task insmod:77 blocked for more than 2 seconds.",
    "BUG: KASAN: slab-use-after-free in bugs_init+0x10/0x20 [bugs]",
]
