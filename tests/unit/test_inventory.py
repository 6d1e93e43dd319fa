# SPDX-License-Identifier: Apache-2.0
"""Records and the list of devices, with /sys, /proc and /dev/shm of the test's own."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from ublkd import inventory
from ublkd.control import uapi
from ublkd.control.commands import SERVER_FLAGS, DeviceInfo
from ublkd.errors import UblkdError

ME = os.getpid()


class World:
    """The kernel's view, as far as the inventory looks at it."""

    def __init__(self, root: pathlib.Path) -> None:
        self.sys = root / "sys"
        self.shm = root / "shm"
        self.run = root / "run"
        self.shm.mkdir()
        self.infos: dict[int, DeviceInfo] = {}

    def add(self, dev_id: int, *, disk: bool = True, size: int = 1 << 20, read_only: bool = False) -> None:
        (self.sys / "class" / "ublk-char" / f"ublkc{dev_id}").mkdir(parents=True)
        if disk:
            block = self.sys / "class" / "block" / f"ublkb{dev_id}"
            (block / "queue").mkdir(parents=True)
            (block / "size").write_text(f"{size // 512}\n")
            (block / "ro").write_text(f"{int(read_only)}\n")
            (block / "queue" / "logical_block_size").write_text("4096\n")

    def info(self, dev_id: int, **changes: Any) -> None:
        info = DeviceInfo(dev_id, 2, 64, uapi.STATE_LIVE, 1 << 19, ME, 0x1E, SERVER_FLAGS, 0, 0)
        self.infos[dev_id] = info._replace(**changes)

    def record(self, dev_id: int, **changes: Any) -> dict[str, Any]:
        record = {
            "id": dev_id,
            "path": f"/dev/ublkb{dev_id}",
            "target": "loop",
            "backing": "/srv/disk.img",
            "size": 1 << 20,
            "queues": 2,
            "depth": 64,
            "block_size": 512,
            "transport": "copy",
            "flags": 0x1E,
            "read_only": False,
            "supervisor": {"pid": ME, "start_time": inventory.start_time(ME)},
            "workers": [{"queue": 0, "pid": ME, "cpu": 1}],
            "settings": {},
            "files": [],
            **changes,
        }
        inventory.write_record(record)
        return record


@pytest.fixture
def world(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path)
    monkeypatch.setenv("UBLKD_RUNTIME_DIR", str(world.run))
    monkeypatch.setattr(inventory, "SYS", str(world.sys))
    monkeypatch.setattr(inventory, "SHM_DIR", str(world.shm))
    monkeypatch.setattr(
        inventory, "_ask_driver", lambda ids: {i: world.infos[i] for i in ids if i in world.infos}
    )
    return world


def gone_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_record_round_trip(world: World) -> None:
    written = world.record(3)
    read = inventory.read_record(3)
    assert read == {"format": 1, "boot_id": inventory.boot_id(), **written}
    assert inventory.records() == [read]
    assert os.listdir(world.run) == ["3.json"]
    assert os.stat(world.run / "3.json").st_mode & 0o777 == 0o644
    inventory.remove_record(3)
    inventory.remove_record(3)
    assert inventory.read_record(3) is None and inventory.records() == []


def test_a_record_that_cannot_be_written_leaves_nothing(world: World) -> None:
    world.record(3)
    with pytest.raises(TypeError):
        world.record(3, target=object())
    assert os.listdir(world.run) == ["3.json"]
    read = inventory.read_record(3)
    assert read is not None and read["target"] == "loop"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "damaged"),
        (b'{"format": 1, "id": 4, "pa', "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        (b"[]", "not of this version"),
        (b'{"format": 2}', "not of this version"),
        (b'{"format": 1, "id": "4"}', "no usable id"),
        (b'{"format": 1, "id": 4, "path": "", "target": "", "supervisor": 7}', "no usable supervisor"),
        (
            b'{"format": 1, "id": 5, "path": "", "target": "", "supervisor": {"pid": 1}, "boot_id": ""}',
            "device 4",
        ),
        (b'{"format": 1, "id": 4, "path": "", "target": "", "supervisor": {}, "boot_id": ""}', "device 4"),
    ],
)
def test_bad_records_are_told_not_fatal(world: World, text: bytes, says: str) -> None:
    world.run.mkdir()
    (world.run / "4.json").write_bytes(text)
    with pytest.raises(inventory.RecordError, match=says):
        inventory.read_record(4)
    assert inventory.records() == []
    [entry] = inventory.devices()
    assert (entry["id"], entry["state"], entry["served"], entry["owner"]) == (4, "gone", False, "other")
    assert says in entry["note"]
    [line] = inventory.cleanup()
    assert says in line and inventory.devices() == []


def test_nothing_there(world: World) -> None:
    assert inventory.devices() == [] and inventory.cleanup() == [] and inventory.device(0) is None


def test_alive() -> None:
    ticks = inventory.start_time(ME)
    assert ticks is not None and inventory.alive(ME, ticks) and inventory.alive(ME, None)
    assert not inventory.alive(ME, ticks + 1)
    assert (
        not inventory.alive(gone_pid(), None)
        and not inventory.alive(-1, None)
        and not inventory.alive(0, None)
    )


def test_a_zombie_is_not_alive() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert os.path.exists(f"/proc/{pid}") and not inventory.alive(pid, None)
    os.waitpid(pid, 0)


def test_start_time_of_a_process_with_an_odd_name() -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "open('/proc/self/comm','w').write('a) R (b'); print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.readline()
    ticks, mine = inventory.start_time(child.pid), inventory.start_time(ME)
    child.communicate(b"\n")
    assert ticks is not None and mine is not None and ticks >= mine


def test_live_device_with_the_driver_s_word(world: World) -> None:
    world.add(0, size=8 << 20, read_only=True)
    world.info(0)
    world.record(0)
    assert inventory.devices() == [
        {
            "id": 0,
            "path": "/dev/ublkb0",
            "state": "live",
            "served": True,
            "target": "loop",
            "backing": "/srv/disk.img",
            "size": 8 << 20,
            "queues": 2,
            "depth": 64,
            "block_size": 4096,
            "read_only": True,
            "transport": "copy",
            "flags": 0x1E,
            "version": None,
            "on_crash": None,
            "recoveries": None,
            "supervisor": ME,
            "workers": [{"queue": 0, "pid": ME, "cpu": 1}],
            "details": {},
            "owner": "ublkd",
            "note": None,
        }
    ]
    assert inventory.device(0) == inventory.devices()[0]


def test_live_device_without_asking_the_driver(world: World) -> None:
    world.add(0)
    world.record(0)
    entry = inventory.devices()[0]
    assert (entry["state"], entry["served"], entry["owner"], entry["queues"]) == ("live", True, "ublkd", 2)


def test_states_without_asking_the_driver(world: World) -> None:
    world.add(0, disk=False)
    world.add(1)
    world.record(2)
    states = {e["id"]: (e["state"], e["owner"], e["served"]) for e in inventory.devices()}
    assert states == {
        0: ("dead", "other", False),
        1: ("unknown", "other", False),
        2: ("gone", "ublkd", False),
    }


@pytest.mark.parametrize(
    ("state", "name"), [(uapi.STATE_QUIESCED, "quiesced"), (uapi.STATE_FAIL_IO, "fail-io"), (9, "unknown")]
)
def test_server_is_gone(world: World, state: int, name: str) -> None:
    world.add(1)
    world.info(1, state=state, pid=-1)
    world.record(1, supervisor={"pid": gone_pid(), "start_time": 5})
    [entry] = inventory.devices()
    assert (entry["state"], entry["served"], entry["supervisor"], entry["owner"]) == (
        name,
        False,
        None,
        "ublkd",
    )
    assert inventory.cleanup() == []  # it can be recovered


def test_pid_of_a_dead_supervisor_was_given_to_another(world: World) -> None:
    ticks = inventory.start_time(ME)
    assert ticks is not None
    world.add(1)
    world.info(1, state=uapi.STATE_QUIESCED, pid=-1)
    world.record(1, supervisor={"pid": ME, "start_time": ticks - 1})
    assert inventory.devices()[0]["supervisor"] is None


def test_device_of_another_program(world: World) -> None:
    world.add(2)
    world.info(2, server_flags=0, flags=0x1E | uapi.F_AUTO_BUF_REG)
    world.record(2)  # of a device of ours that had this number before
    [entry] = inventory.devices()
    assert (entry["owner"], entry["target"], entry["transport"]) == ("other", None, "zero-copy")
    assert entry["served"] and entry["supervisor"] == ME and entry["workers"] == []
    with pytest.raises(UblkdError, match="made by another program"):
        inventory.remove_device(2)


def test_record_of_a_previous_boot(world: World) -> None:
    world.record(6, boot_id="an-older-one")
    [entry] = inventory.devices()
    assert entry["state"] == "gone" and entry["note"] == "its record is of a previous boot"
    world.add(6)
    world.info(6, server_flags=0)
    [entry] = inventory.devices()
    assert (entry["state"], entry["owner"], entry["target"]) == ("live", "other", None)
    [line] = inventory.cleanup()
    assert "previous boot" in line
    assert [e["note"] for e in inventory.devices()] == [None]


def test_remove_what_a_killed_process_did_not_finish(world: World) -> None:
    world.record(1)
    others = [world.run / name for name in ("11.json", "11.json.5.new", "21.sock.5")]
    for path in (*others, world.run / "1.json.77.new", world.run / "1.sock.78"):
        path.write_text("{")
    inventory.remove_record(1)
    assert sorted(world.run.iterdir()) == sorted(others)


def test_remove_what_is_only_a_record(world: World) -> None:
    data = world.shm / "ublkd-1.data"
    kept = world.shm / "ublkd-10"
    elsewhere = world.run.parent / "precious"
    for path in (data, kept, elsewhere, world.shm / "ublkd-1", world.shm / "named"):
        path.write_text("x")
    world.record(
        1,
        supervisor={"pid": gone_pid(), "start_time": 1},
        files=[str(world.shm / "named"), str(elsewhere), 7],
    )
    inventory.remove_device(1)
    assert inventory.devices() == []
    assert sorted(os.listdir(world.shm)) == ["ublkd-10"] and elsewhere.exists()


def test_remove_refuses_what_is_served_or_not_there(world: World) -> None:
    with pytest.raises(UblkdError, match="there is no device 0"):
        inventory.remove_device(0)
    world.add(0)
    world.info(0)
    world.record(0)
    with pytest.raises(UblkdError, match=f"served by process {ME}"):
        inventory.remove_device(0)
    with pytest.raises(UblkdError, match=f"served by process {ME}"):
        inventory.remove_device(0, force=True)


def test_cleanup(world: World) -> None:
    dead = {"pid": gone_pid(), "start_time": 1}
    world.record(1, supervisor=dead)  # gone
    world.record(2)  # its supervisor is just adding or deleting it
    world.add(3)
    world.record(3, supervisor=dead)  # can be recovered
    for name in ("ublkd-1", "ublkd-1.data", "ublkd-2", "ublkd-3", "ublkd-12", "ublkd-x", "other"):
        (world.shm / name).write_text("x")
    lines = inventory.cleanup()
    assert len(lines) == 4 and "1.json: the device is gone" in lines[0]
    assert [r["id"] for r in inventory.records()] == [2, 3]
    assert sorted(os.listdir(world.shm)) == ["other", "ublkd-2", "ublkd-3", "ublkd-x"]
    assert inventory.cleanup() == []


def test_list_needs_no_driver_module_without_devices(tmp_path: pathlib.Path) -> None:
    code = (
        "import sys, json; from ublkd import inventory; inventory.SYS = sys.argv[1];"
        "inventory.devices(); print(json.dumps(sorted(sys.modules)))"
    )
    env = {
        **os.environ,
        "UBLKD_RUNTIME_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    (tmp_path / "class" / "ublk-char").mkdir(parents=True)
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True, env=env
    )
    heavy = {
        "ublkd.native",
        "ublkd._engine",
        "ublkd.control",
        "dataclasses",
        "subprocess",
        "logging",
        "multiprocessing",
    }
    assert not heavy & set(json.loads(out.stdout))
