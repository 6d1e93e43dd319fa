# SPDX-License-Identifier: Apache-2.0
"""No record, whole, cut, foreign or made up, makes list, recover or cleanup fail, or touch what is not a device's."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import JSON, NESTED, fuzz
from hypothesis import example, given
from hypothesis import strategies as st

from ublkd import inventory
from ublkd.config.schema import DeviceSpec
from ublkd.errors import UblkdError
from ublkd.supervisor import lifecycle

ID = 5


def record(**changes: Any) -> dict[str, Any]:
    """A sound one, of a device whose server died."""
    return {
        "format": 1,
        "id": ID,
        "path": f"/dev/ublkb{ID}",
        "target": "loop",
        "backing": "/srv/disk.img",
        "backing_id": "1:2",
        "size": 1 << 20,
        "queues": 1,
        "depth": 64,
        "block_size": 512,
        "transport": "copy",
        "flags": 0x1E,
        "read_only": False,
        "remark": "",
        "details": {},
        "supervisor": {"pid": 0, "start_time": 1},
        "workers": [{"queue": 0, "pid": 0, "cpu": 1}],
        "settings": DeviceSpec(target="loop", file="/srv/disk.img").to_dict(),
        "boot_id": inventory.boot_id(),
        "files": [],
        **changes,
    }


@pytest.fixture
def bystander(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Directories of the test's own, supervisors that only note the call, and a file that nobody may touch."""
    for name in ("run", "shm", "sys"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("UBLKD_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(inventory, "SHM_DIR", str(tmp_path / "shm"))
    monkeypatch.setattr(inventory, "SYS", str(tmp_path / "sys"))
    monkeypatch.setattr(inventory, "_stop_and_delete", lambda *a: None)
    monkeypatch.setattr(lifecycle, "run_background", lambda spec, **k: "/dev/ublkb5")
    monkeypatch.setattr(lifecycle, "run_foreground", lambda spec, **k: 0)
    monkeypatch.setattr(os, "kill", lambda *a: pytest.fail(f"kill{a}"))
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *a: pytest.fail(f"pidfd_send_signal{a}"))
    path = tmp_path / "bystander"
    path.write_text("keep me")
    yield path
    assert path.read_text() == "keep me"


def use(data: bytes) -> None:
    """All that reads records; only UblkdError may come of it."""
    directory = Path(inventory.runtime_dir())
    (directory / f"{ID}.json").write_bytes(data)
    spec = DeviceSpec(target="loop", file="/srv/disk.img")
    calls = (
        inventory.devices,
        lambda: json.dumps(inventory.devices()),
        inventory.records,
        lambda: inventory.device(ID),
        lambda: lifecycle.recover(ID),
        lambda: lifecycle._take_over(spec),
        lambda: lifecycle.stop_device(ID),
        inventory.cleanup,
    )
    for call in calls:
        with contextlib.suppress(UblkdError):
            call()
    # whatever it is, it doesn't stay
    with contextlib.suppress(UblkdError):
        inventory.remove_device(ID)
    inventory.cleanup()


@fuzz
@given(st.binary(max_size=300))
def test_any_bytes(bystander: Path, data: bytes) -> None:
    use(data)


@fuzz
@given(st.integers(0, 1200))
def test_a_record_that_was_cut(bystander: Path, length: int) -> None:
    use(json.dumps(record()).encode()[:length])


@fuzz
@given(JSON)
def test_any_json(bystander: Path, value: Any) -> None:
    use(json.dumps(value).encode(errors="surrogatepass"))


@fuzz
@given(st.dictionaries(st.sampled_from(sorted(record())), JSON, min_size=1, max_size=4))
@example({"supervisor": {"pid": 1 << 70, "start_time": 1}})
@example({"supervisor": {"pid": True}})
@example({"supervisor": {"pid": os.getppid()}})
@example({"supervisor": {"pid": os.getppid(), "start_time": None}})
@example({"supervisor": {"pid": os.getppid(), "start_time": 1.5}})
@example({"workers": [{"pid": 1 << 70}, {"pid": -1}, 7]})
@example({"settings": {"target": "loop", "file": "a\0b"}})
@example({"files": ["a\0b", 7, "../../etc/passwd"]})
@example({"files": True})
@example({"details": [1, 2]})
@example({"target": "nonsense"})
def test_a_record_with_wrong_parts(bystander: Path, changes: dict[str, Any]) -> None:
    use(json.dumps(record(**changes)).encode(errors="surrogatepass"))


@fuzz
@given(st.dictionaries(st.sampled_from(sorted(record()["settings"])), JSON, min_size=1, max_size=3))
def test_a_record_with_wrong_settings(bystander: Path, changes: dict[str, Any]) -> None:
    use(json.dumps(record(settings={**record()["settings"], **changes})).encode(errors="surrogatepass"))


def test_files_elsewhere_are_not_removed(bystander: Path) -> None:
    shm = Path(inventory.SHM_DIR)
    hostile = [str(bystander), f"{shm}/../bystander", f"{shm}/", "/", "..", str(shm)]
    use(json.dumps(record(files=hostile)).encode())
    assert bystander.exists() and shm.is_dir()


@pytest.mark.parametrize("text", [*NESTED, '{"a":1' + "0" * 5000 + "}", "NaN"])
def test_a_record_that_is_too_much(bystander: Path, text: str) -> None:
    use(text.encode())


def test_a_record_that_is_no_file(bystander: Path) -> None:
    path = Path(inventory.record_path(ID))
    path.mkdir()
    for call in (inventory.devices, inventory.records, inventory.cleanup):
        with contextlib.suppress(UblkdError):
            call()
    path.rmdir()
    path.symlink_to(bystander)
    inventory.devices()
    inventory.cleanup()
