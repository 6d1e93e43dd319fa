# SPDX-License-Identifier: Apache-2.0
"""scripts/tune: what it finds in sysfs, what it would change, and that it changes all or nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import JSON, NESTED, fuzz
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benchlib import fio
from tunelib import cli, measure, record, rules, show, workers
from tunelib import disk as disk_module
from tunelib.apply import apply, reverting, switch, undo
from tunelib.disk import ATTRIBUTES, Disk
from tunelib.rules import Change, Plan

from ublkd import inventory
from ublkd.errors import UblkdError, UsageError
from ublkd.supervisor.placement import Cpu

QUEUE = {
    "scheduler": "none [mq-deadline]",
    "wbt_lat_usec": "2000",
    "nr_requests": "128",
    "max_sectors_kb": "512",
    "max_hw_sectors_kb": "512",
    "read_ahead_kb": "128",
    "nomerges": "0",
    "rq_affinity": "1",
    "iostats": "1",
}


class Machine:
    """A root directory with the parts of sysfs and procfs that are read."""

    def __init__(self, root: Path) -> None:
        self.root = root
        boot = root / "proc/sys/kernel/random/boot_id"
        boot.parent.mkdir(parents=True)
        boot.write_text("00000000-0000-4000-8000-000000000000\n")

    def add(self, name: str = "ublkb0", seq: int = 7, **queue: str) -> Disk:
        top = self.root / "sys/class/block" / name
        (top / "queue").mkdir(parents=True)
        for file, text in {"diskseq": str(seq), "dev": "259:0", "size": "131072"}.items():
            (top / file).write_text(f"{text}\n")
        for file, text in {**QUEUE, **queue}.items():
            (top / "queue" / file).write_text(f"{text}\n")
        self.masks(name, "0", "1")
        return Disk(name, self.root)

    def disk(self) -> Disk:
        """The first one, made when it is asked for."""
        made = (self.root / "sys/class/block/ublkb0").exists()
        return Disk("ublkb0", self.root) if made else self.add()

    def masks(self, name: str, *lists: str) -> None:
        for number, text in enumerate(lists):
            place = self.root / "sys/class/block" / name / "mq" / str(number)
            place.mkdir(parents=True, exist_ok=True)
            (place / "cpu_list").write_text(f"{text}\n")

    def set(self, attribute: str, text: str, name: str = "ublkb0") -> None:
        (self.root / "sys/class/block" / name / "queue" / attribute).write_text(text)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("UBLKD_RUNTIME_DIR", str(tmp_path / "run"))
    return Machine(tmp_path)


def served(disk: Disk, cpus: tuple[int, ...] = (0, 1), depth: int = 128, **settings: Any) -> Disk:
    """As if ublkd served it."""
    disk.shown = {
        "owner": "ublkd",
        "served": True,
        "queues": len(cpus),
        "depth": depth,
        "target": "null",
        "version": workers.__version__,
        "supervisor": os.getpid(),
        "workers": [{"queue": queue, "pid": 1, "cpu": cpu} for queue, cpu in enumerate(cpus)],
    }
    disk.settings = {"scheduler": "none", "cpus": None, "depth": depth, "max_io_size": 524288, **settings}
    return disk


def planned(disk: Disk, profile: str = "balanced", move_workers: bool = False, **asked: str) -> Plan:
    return rules.plan(disk, profile, asked, move_workers)


def changes(found: Plan) -> dict[str, tuple[str, str]]:
    return {change.key: (change.old, change.new) for change in found.changes}


def left(found: Plan) -> dict[str, str]:
    return {remark.key: remark.why for remark in found.left}


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Four CPUs on two cores: 0 and 2 are siblings, 1 and 3."""
    topo = {n: Cpu(n, frozenset({n, (n + 2) % 4}), 0) for n in range(4)}
    monkeypatch.setattr(Disk, "topology", lambda self: topo)
    yield


class TestRules:
    def test_the_scheduler_of_a_ublk_disk(self, machine: Machine) -> None:
        assert changes(planned(machine.add())) == {"scheduler": ("mq-deadline", "none")}

    def test_who_asked_to_keep_it_keeps_it(self, machine: Machine) -> None:
        found = planned(served(machine.add(), scheduler="keep"))
        assert "scheduler" not in changes(found) and "scheduler = keep" in left(found)["scheduler"]

    def test_a_disk_that_is_right(self, machine: Machine) -> None:
        found = planned(served(machine.add(scheduler="[none] mq-deadline")))
        assert not found.changes
        assert {"scheduler", "wbt_lat_usec", "rq_affinity", "iostats", "nomerges", "read_ahead_kb"} <= set(left(found))

    def test_what_was_turned_down(self, machine: Machine) -> None:
        disk = served(machine.add(scheduler="[none]", nr_requests="16", max_sectors_kb="64", nomerges="2"))
        assert changes(planned(disk)) == {
            "nr_requests": ("16", "128"),
            "max_sectors_kb": ("64", "512"),
            "nomerges": ("2", "0"),
        }

    def test_an_elevator_has_its_own_number_of_requests(self, machine: Machine) -> None:
        disk = served(machine.add(nr_requests="16"), scheduler="keep")
        assert not planned(disk).changes

    @pytest.mark.parametrize(
        ("profile", "now", "change"),
        [
            ("balanced", {"read_ahead_kb": "128", "iostats": "1"}, {}),
            ("balanced", {"read_ahead_kb": "4096", "iostats": "0"}, {}),
            ("latency", {"read_ahead_kb": "128"}, {"read_ahead_kb": ("128", "32")}),
            ("latency", {"read_ahead_kb": "0"}, {}),
            ("throughput", {"read_ahead_kb": "128"}, {"iostats": ("1", "0")}),
            ("throughput", {"iostats": "0"}, {}),
        ],
    )
    def test_profiles(
        self, profile: str, now: dict[str, str], change: dict[str, tuple[str, str]], machine: Machine
    ) -> None:
        disk = machine.add(scheduler="[none]", **now)
        assert changes(planned(disk, profile)) == change

    def test_other_disks_are_left_alone(self, machine: Machine) -> None:
        found = planned(machine.add("sda", nomerges="2"))
        assert not found.changes and "not a ublk disk" in left(found)["all of it"]
        assert changes(planned(machine.add("sdb"), iostats="0")) == {"iostats": ("1", "0")}

    def test_what_is_asked_for_wins(self, machine: Machine) -> None:
        found = planned(machine.add(), scheduler="bfq", iostats="1")
        assert changes(found) == {"scheduler": ("mq-deadline", "bfq")}
        assert found.changes[0].source == rules.ASKED

    def test_advice(self, machine: Machine, cores: None) -> None:
        for cpu, governor in enumerate(("performance", "powersave")):
            place = machine.root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
            place.mkdir(parents=True)
            (place / "scaling_governor").write_text(f"{governor}\n")
        disk = served(machine.add(), depth=4, workers_per_queue=2)
        grouping = machine.root / "proc/sys/kernel/sched_autogroup_enabled"
        grouping.parent.mkdir(parents=True, exist_ok=True)
        grouping.write_text("0\n")
        assert "autogroups" not in {remark.key for remark in planned(disk).advice}
        grouping.write_text("1\n")
        advice = {remark.key: remark for remark in planned(disk).advice}
        assert set(advice) == {"queues", "workers_per_queue", "depth", "governor", "autogroups"}
        assert advice["governor"].value == "powersave" and "CPU 1" in advice["governor"].why
        disk.shown["target"] = "python"
        assert "workers_per_queue" not in {remark.key for remark in planned(disk).advice}

    def test_every_reason_is_there_and_a_line(self, machine: Machine, cores: None) -> None:
        disk = served(machine.add(nr_requests="1", max_sectors_kb="4"), cpus=(0, 0), depth=4)
        for profile in rules.PROFILES:
            found = planned(disk, profile)
            for entry in (*found.changes, *found.advice, *found.left):
                assert entry.why and entry.source and "\n" not in entry.why


class TestWorkers:
    def test_two_on_a_cpu(self, machine: Machine, cores: None) -> None:
        disk = served(machine.add(), cpus=(0, 0), cpus_setting=None)
        found = planned(disk)
        assert WORKERS_KEY not in changes(found)
        [advice] = [remark for remark in found.advice if remark.key == WORKERS_KEY]
        assert "share a CPU" in advice.why and "--workers" in advice.why
        moving = planned(disk, move_workers=True)
        assert changes(moving)[WORKERS_KEY] == ("0,0", "0-1") and moving.cpus == [0, 1]

    @pytest.mark.parametrize(
        ("cpus", "masks", "better", "why"),
        [
            ((0, 1), ("0, 2", "1, 3"), None, ""),
            ((2, 3), ("0, 2", "1, 3"), None, ""),
            ((1, 0), ("0, 2", "1, 3"), [0, 1], "submits to its queue"),
            ((0, 2), ("0-3", "0-3"), [0, 1], "hyperthreads"),
            # as good as it gets
            ((0, 0), ("0", "0"), None, ""),
        ],
    )
    def test_placements(
        self,
        cpus: tuple[int, ...],
        masks: tuple[str, ...],
        better: list[int] | None,
        why: str,
        machine: Machine,
        cores: None,
    ) -> None:
        disk = served(machine.add(), cpus=cpus)
        machine.masks("ublkb0", *masks)
        found = workers.better(disk.placed() or [], disk.masks(), disk.topology())
        assert (found[0] if found else None) == better
        assert not found or why in found[1]

    def test_another_node(self) -> None:
        topo = {0: Cpu(0, frozenset({0}), 0), 1: Cpu(1, frozenset({1}), 1)}
        assert workers.defects([1], [{0}], topo) == (0, 1, 0, 1)
        assert workers.defects([0], [{0}], topo) == (0, 0, 0, 0)

    def test_a_server_of_another_version_is_not_replaced(self, machine: Machine, cores: None) -> None:
        disk = served(machine.add(), cpus=(0, 0))
        disk.shown["version"] = "0.0.1"
        with pytest.raises(UblkdError, match=r"served by ublkd 0\.0\.1"):
            planned(disk, move_workers=True)

    def test_who_has_no_workers(self, machine: Machine) -> None:
        with pytest.raises(UblkdError, match="no workers of ublkd's"):
            planned(machine.add("sda"), move_workers=True)


WORKERS_KEY = rules.WORKERS


class TestHostileSysfs:
    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"\n",
            b"\0",
            b"\xff\xfe",
            b"-1",
            b"1e3",
            b"12\n34",
            b"[none] [bfq]",
            b"[]",
            b"]none[",
            b"[../../etc]",
            b"9" * 5000,
            "٣".encode(),
            b"\x1b[31m",
            b"0x10",
            b" " * 70000,
        ],
    )
    def test_what_makes_no_sense_is_not_there(self, content: bytes, machine: Machine) -> None:
        disk = served(machine.add())
        for attribute in QUEUE:
            (machine.root / "sys/class/block/ublkb0/queue" / attribute).write_bytes(content)
        assert set(disk.snapshot()) <= {"scheduler"}  # whose names are the kernel's choice
        for profile in rules.PROFILES:
            assert not planned(disk, profile).changes

    @given(content=st.binary(max_size=40), number=st.integers(0, len(QUEUE) - 1))
    @fuzz
    def test_any_bytes(self, content: bytes, number: int, machine: Machine) -> None:
        name = list(QUEUE)[number]
        file = machine.root / "sys/class/block/ublkb0/queue" / name
        disk = served(machine.disk())
        file.write_bytes(content)
        try:
            self.harmless(disk)
        finally:
            file.write_text(QUEUE[name])

    @staticmethod
    def harmless(disk: Disk) -> None:
        found = planned(disk, "throughput")
        assert all(disk_module.valid(change.key, change.old) for change in found.changes)
        assert all(line.isprintable() for line in show.diff(disk, found, "throughput").split("\n"))

    def test_nothing_at_all(self, machine: Machine) -> None:
        (machine.root / "sys/class/block/ublkb0").mkdir(parents=True)
        disk = served(Disk("ublkb0", machine.root))
        assert not planned(disk, "throughput").changes and disk.masks() == [] and disk.size() == 0
        with pytest.raises(UblkdError, match="can't be told from other disks: the kernel gives no diskseq"):
            apply(disk, Plan([Change("iostats", "1", "0", "", "")]))

    def test_directories_in_place_of_files(self, machine: Machine) -> None:
        disk = machine.add()
        file = machine.root / "sys/class/block/ublkb0/queue/iostats"
        file.unlink()
        file.mkdir()
        assert disk.read("iostats") is None
        with pytest.raises(UblkdError, match="iostats does not take 0: Is a directory; all is as it was"):
            switch(disk, {"iostats": "0"})

    @pytest.mark.parametrize("lists", [("0", "x"), ("", "1"), ("0-99999999", "1"), ("-1", "1"), ("1-0", "0")])
    def test_queue_masks(self, lists: tuple[str, ...], machine: Machine, cores: None) -> None:
        disk = served(machine.add(), cpus=(0, 0))
        machine.masks("ublkb0", *lists)
        assert disk.masks() == []
        assert WORKERS_KEY not in changes(planned(disk))

    @pytest.mark.parametrize(
        "listed", [[], [{}], [{"queue": 0}], [{"queue": True, "cpu": 0}], [{"queue": 1, "cpu": 0}], [{"cpu": "0"}]]
    )
    def test_workers_in_a_damaged_record(self, listed: list[Any], machine: Machine) -> None:
        disk = served(machine.add())
        disk.shown["workers"] = listed
        assert disk.placed() is None and not planned(disk).advice[2:]

    @pytest.mark.parametrize(
        "settings", [{"scheduler": 5}, {"cpus": "0-3"}, {"cpus": []}, {"cpus": [-1]}, {"depth": []}]
    )
    def test_settings_in_a_damaged_record(self, settings: dict[str, Any], machine: Machine) -> None:
        disk = served(machine.add())
        disk.settings = settings
        assert planned(disk) and workers.setting(disk) is None


class TestFind:
    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("", "is no block device"),
            ("sda", "is no block device"),
            ("-1", "is no block device"),
            ("0x0", "is no block device"),
            ("٣", "is no block device"),
            ("1.5", "is no block device"),
            ("/", "is no block device"),
            ("/etc/passwd", "is no block device"),
            ("/dev/", "is no block device"),
            ("/dev/../etc/passwd", "is no block device"),
            ("/dev/\n", "is no block device"),
            ("/dev/a\0b", "is no block device"),
            ("/dev/" + "a" * 5000, "is no block device"),
            ("/dev/null", "there is no block device /dev/null"),
            ("/dev/ublkc0", "there is no block device /dev/ublkc0"),
            ("1", "there is no block device /dev/ublkb1"),
            ("9" * 5000, "there is no ublk device 9"),
            ("/dev/ublkb0p1", "is a partition"),
        ],
    )
    def test_what_is_no_disk(self, text: str, error: str, machine: Machine) -> None:
        machine.add()
        part = machine.add("ublkb0p1")
        (machine.root / "sys/class/block" / part.name / "partition").write_text("1\n")
        with pytest.raises(UblkdError, match=error) as raised:
            disk_module.find(text, machine.root)
        assert "\n" not in raised.value.message and len(raised.value.message) < 200

    @pytest.mark.parametrize("text", ["0", "00", "/dev/ublkb0", "/dev/../dev/ublkb0"])
    def test_spellings(self, text: str, machine: Machine) -> None:
        machine.add()
        found = disk_module.find(text, machine.root)
        assert (found.name, found.path, found.ublk_id) == ("ublkb0", "/dev/ublkb0", 0)


class TestApply:
    def test_and_undo(self, machine: Machine) -> None:
        disk = machine.add()
        machine.set("scheduler", "[mq-deadline]")  # a file keeps what is written: no kernel puts brackets there
        before = disk.snapshot()
        apply(disk, Plan([Change("read_ahead_kb", "128", "512", "", ""), Change("iostats", "1", "0", "", "")]))
        assert disk.snapshot() == {**before, "read_ahead_kb": "512", "iostats": "0"}
        content = json.loads(record.path_of(disk).read_text())
        assert content["attributes"] == {"read_ahead_kb": "128", "iostats": "1"}
        assert content["identity"] == disk.identity() and content["device"] == "/dev/ublkb0"
        undo(disk)
        assert disk.snapshot() == before
        assert not list(Path(inventory.runtime_dir()).iterdir())

    def test_twice_keeps_the_first_originals(self, machine: Machine) -> None:
        disk = machine.add()
        for value in ("256", "512", "1024"):
            apply(disk, planned(disk, read_ahead_kb=value, scheduler="mq-deadline"))
        apply(disk, planned(disk, nomerges="1", scheduler="mq-deadline"))
        undo(disk)
        assert (disk.read("read_ahead_kb"), disk.read("nomerges")) == ("128", "0")

    def test_nothing_to_undo(self, machine: Machine) -> None:
        with pytest.raises(UblkdError, match=r"there is nothing to undo for /dev/ublkb0: no record .*tune-0\.json"):
            undo(machine.add())

    def test_one_that_is_refused_takes_all_with_it(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        disk = machine.add()
        before = disk.snapshot()
        self.refuse(monkeypatch, "iostats", "0")
        asked = {"nr_requests": "64", "read_ahead_kb": "512", "iostats": "0"}
        with pytest.raises(UblkdError, match="iostats does not take 0: Invalid argument; all is as it was"):
            apply(disk, planned(disk, scheduler="mq-deadline", **asked))
        assert disk.snapshot() == before
        assert not record.path_of(disk).exists()

    def test_a_refusal_leaves_an_earlier_record_as_it_was(
        self, machine: Machine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        disk = machine.add()
        apply(disk, planned(disk, scheduler="mq-deadline", nomerges="1"))
        stored = record.path_of(disk).read_text()
        self.refuse(monkeypatch, "iostats", "0")
        with pytest.raises(UblkdError):
            apply(disk, planned(disk, scheduler="mq-deadline", read_ahead_kb="4", iostats="0"))
        assert record.path_of(disk).read_text() == stored
        assert disk.read("read_ahead_kb") == "128"

    def test_what_can_not_be_put_back_is_said(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        disk = machine.add()
        self.refuse(monkeypatch, "iostats", "0")
        self.refuse(monkeypatch, "nr_requests", "128")
        with pytest.raises(UblkdError, match=r"not put back: .*nr_requests does not take 128"):
            switch(disk, {"nr_requests": "64", "iostats": "0"})

    def test_an_interrupt_puts_all_back(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        disk = machine.add()
        before = disk.snapshot()
        write = Disk.write

        def interrupted(self: Disk, attribute: str, value: str) -> None:
            if (attribute, value) == ("iostats", "0"):
                raise KeyboardInterrupt
            write(self, attribute, value)

        monkeypatch.setattr(Disk, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            apply(disk, planned(disk, scheduler="mq-deadline", read_ahead_kb="512", iostats="0"))
        assert disk.snapshot() == before and not record.path_of(disk).exists()

    def test_side_effects_are_undone_too(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        disk = machine.add(nr_requests="100")
        self.schedule(machine, monkeypatch)
        apply(disk, planned(disk))
        assert (disk.read("scheduler"), disk.read("nr_requests")) == ("none", "64")
        undo(disk)
        assert (disk.read("scheduler"), disk.read("nr_requests")) == ("mq-deadline", "100")

    def test_read_ahead_that_the_kernel_forgets(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        disk = machine.add(read_ahead_kb="64")
        write = Disk.write

        def forgetting(self: Disk, attribute: str, value: str) -> None:
            if attribute == "iostats":
                machine.set("read_ahead_kb", "128")
            write(self, attribute, value)

        monkeypatch.setattr(Disk, "write", forgetting)
        apply(disk, planned(disk, scheduler="mq-deadline", iostats="0"))
        assert disk.read("read_ahead_kb") == "64"
        apply(disk, planned(disk, scheduler="mq-deadline", iostats="1", read_ahead_kb="32"))
        assert disk.read("read_ahead_kb") == "32"
        undo(disk)
        assert (disk.read("read_ahead_kb"), disk.read("iostats")) == ("64", "1")

    def test_a_value_that_does_not_stay(self, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        disk = machine.add(scheduler="none mq-deadline")  # nothing is chosen, whatever is written
        write = disk_module.os.write
        # read-ahead is in pages
        monkeypatch.setattr(disk_module.os, "write", lambda fd, data: write(fd, b"4" if data == b"5" else data))
        with pytest.raises(UblkdError, match="read_ahead_kb does not keep 5: it is 4; all is as it was"):
            switch(disk, {"read_ahead_kb": "5"})

    def test_reverting(self, machine: Machine) -> None:
        disk = machine.add()
        apply(disk, planned(disk, scheduler="mq-deadline", nomerges="1"))
        before, stored = disk.snapshot(), record.path_of(disk).read_text()
        with pytest.raises(ZeroDivisionError), reverting(disk):
            apply(disk, planned(disk, scheduler="mq-deadline", iostats="0"))
            assert disk.read("iostats") == "0"
            raise ZeroDivisionError
        assert disk.snapshot() == before and json.loads(record.path_of(disk).read_text()) == json.loads(stored)

    def test_a_disk_that_nobody_serves(self, machine: Machine) -> None:
        with pytest.raises(UblkdError, match="/dev/ublkb0 is not served"):
            machine.add().check_served()
        served(machine.add("ublkb1")).check_served()
        machine.add("sda").check_served()

    def test_one_at_a_time(self, machine: Machine) -> None:
        disk = machine.add()
        with disk.locked(), pytest.raises(UblkdError, match="another scripts/tune is at work"), disk.locked():
            pass
        with disk.locked():
            pass

    @staticmethod
    def refuse(monkeypatch: pytest.MonkeyPatch, attribute: str, value: str) -> None:
        """As the kernel does it: EINVAL, and the file is as it was."""
        write = disk_module.os.write
        opened = disk_module.os.open

        def opening(path: Any, flags: int, *more: int) -> int:
            # what the kernel does not do to a file of sysfs
            return opened(path, flags & ~os.O_TRUNC, *more)

        def refusing(fd: int, data: bytes) -> int:
            if os.readlink(f"/proc/self/fd/{fd}").endswith(f"/{attribute}") and data.decode() == value:
                raise OSError(22, "Invalid argument")
            if os.readlink(f"/proc/self/fd/{fd}").endswith(tuple(f"/queue/{name}" for name in ATTRIBUTES)):
                os.ftruncate(fd, 0)
            return write(fd, data)

        monkeypatch.setattr(disk_module.os, "open", opening)
        monkeypatch.setattr(disk_module.os, "write", refusing)

    @staticmethod
    def schedule(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
        """Like the kernel, set the number of requests with the scheduler, and print brackets."""
        write = Disk.write

        def scheduling(self: Disk, attribute: str, value: str) -> None:
            if attribute == "scheduler":
                machine.set("scheduler", f"[{value}] none mq-deadline")
                machine.set("nr_requests", "64" if value == "none" else "256")
            else:
                write(self, attribute, value)

        monkeypatch.setattr(Disk, "write", scheduling)


class TestRecord:
    def test_of_another_disk(self, machine: Machine) -> None:
        old = machine.add("ublkb1", seq=7)
        apply(old, planned(old, scheduler="mq-deadline", iostats="0"))
        stored = record.path_of(old).read_text()
        (machine.root / "sys/class/block/ublkb1/diskseq").write_text("8\n")
        new = Disk("ublkb1", machine.root)
        with pytest.raises(UblkdError, match="is of another disk that was /dev/ublkb1 before"):
            undo(new)
        assert new.read("iostats") == "0" and record.path_of(new).read_text() == stored
        # nothing there can be put back any more, so it makes room
        apply(new, planned(new, scheduler="mq-deadline", nomerges="1"))
        assert json.loads(record.path_of(new).read_text())["attributes"] == {"nomerges": "0"}

    @given(content=JSON)
    @fuzz
    def test_any_json(self, content: Any, machine: Machine) -> None:
        self.hostile(machine, json.dumps(content).encode())

    @given(part=st.sampled_from(["identity", "attributes", "moved", "cpus", "format"]), content=JSON)
    @fuzz
    def test_any_part(self, part: str, content: Any, machine: Machine) -> None:
        identity = machine.disk().identity()
        good: dict[str, Any] = {"format": 1, "identity": identity, "attributes": {}, "moved": False, "cpus": None}
        self.hostile(machine, json.dumps({**good, part: content}).encode())

    @pytest.mark.parametrize("content", [b"", b"\xff", b"{", *(text.encode() for text in NESTED), b"[" + b"0," * 90000])
    def test_no_json(self, content: bytes, machine: Machine) -> None:
        self.hostile(machine, content)

    @pytest.mark.parametrize(
        "attributes",
        [{"../../../etc/passwd": "1"}, {"rotational": "1"}, {"iostats": 1}, {"iostats": "0\n1"}, {"scheduler": "/"}],
    )
    def test_what_tune_would_not_write(self, attributes: dict[str, Any], machine: Machine) -> None:
        disk = machine.add()
        apply(disk, planned(disk, scheduler="mq-deadline", iostats="0"))
        path = record.path_of(disk)
        path.write_text(json.dumps({**json.loads(path.read_text()), "attributes": attributes}))
        with pytest.raises(UblkdError, match="is damaged"):
            undo(disk)
        assert disk.read("iostats") == "0"

    @staticmethod
    def hostile(machine: Machine, content: bytes) -> None:
        disk = machine.disk()
        before = disk.snapshot()
        path = record.path_of(disk)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        try:
            undo(disk)
        except UblkdError as error:
            assert "\n" not in error.message
        else:
            assert json.loads(content)["attributes"].keys() <= set(ATTRIBUTES)
        assert disk.snapshot() == before

    def test_a_directory_that_can_not_be_written(self, machine: Machine) -> None:
        disk = machine.add()
        Path(inventory.runtime_dir()).write_text("not a directory")
        with pytest.raises(UblkdError, match="can't be stored"):
            store = planned(disk, scheduler="mq-deadline", iostats="0")
            record.store(disk, record.Originals(store.attributes()))
        assert disk.read("iostats") == "1"


class TestMeasure:
    def test_reads_only(self) -> None:
        cells = measure.cells(Plan(), write=False)
        assert [cell.key for cell in cells] == ["read-4k-1", "read-4k-32", "read-128k-8"]
        text = fio.job_file("/dev/ublkb0", 1 << 20, 10, [], cells)
        assert "write" not in text and text.count("rw=") == len(cells) + 2
        assert {"write-4k-32", "write-128k-8"} < {cell.key for cell in measure.cells(Plan(), write=True)}

    def test_read_ahead_is_measured_where_it_acts(self) -> None:
        cells = measure.cells(Plan([Change("read_ahead_kb", "128", "512", "", "")]), write=False)
        text = fio.job_file("/dev/ublkb0", 1 << 20, 10, [], cells)
        assert text.count("direct=0\ntime_based=0") == 2 + 1  # and the warm-up that is of the last cell's kind

    def test_ratio(self) -> None:
        samples = {
            "before": {"read-4k-1": [{"iops": 100.0}, {"iops": 200.0}, {"iops": 110.0}]},
            "after": {"read-4k-1": [{"iops": 120.0}, {"iops": 180.0}, {"iops": 220.0}]},
        }
        found = measure.ratio(samples, "read-4k-1")
        assert found == {"medians": pytest.approx(180 / 110), "low": pytest.approx(0.9), "high": pytest.approx(2.0)}
        result = {
            "samples": samples,
            "cells": [{"key": "read-4k-1", "title": "4k read, depth 1"}],
            "ratios": {"read-4k-1": found},
        }
        last = measure.table(result).splitlines()[-1]
        assert [cell.strip() for cell in last.split("|")[1:5]] == [
            "4k read, depth 1",
            "110 [100-200]",
            "180 [120-220]",
            "1.64 [0.90-2.00]",
        ]

    def test_a_disk_that_is_too_small(self, machine: Machine) -> None:
        disk = machine.add()
        (machine.root / "sys/class/block/ublkb0/size").write_text("8\n")
        with pytest.raises(UblkdError, match="too small"):
            measure.measure(disk, planned(disk), 1, 10, False, print)


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "Missing argument 'DEVICE'"),
            (["0", "--undo", "--apply"], "--undo goes alone"),
            (["0", "--undo", "--set", "iostats=0"], "--undo goes alone"),
            (["0", "--write"], "--write is for --measure"),
            (["0", "--set", "rotational=1"], "there is no 'rotational'; there are scheduler,"),
            (["0", "--set", "iostats"], "'' is no value for iostats"),
            (["0", "--set", "scheduler=../x"], "is no value for scheduler"),
            (["0", "--repeats", "0"], "--repeats"),
            (["0", "--profile", "fast"], "--profile"),
            (["-1"], "No such option"),
            (["no\nsuch"], "is no block device"),
        ],
    )
    def test_bad_usage(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(arguments) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and err.startswith("tune: error: ") and message in err

    def test_the_diff(self, machine: Machine) -> None:
        disk = machine.add()
        lines = show.diff(disk, planned(disk), "balanced").splitlines()
        assert lines[:3] == [
            "--- /dev/ublkb0 (as it is)",
            "+++ /dev/ublkb0 (profile balanced)",
            "-scheduler  mq-deadline",
        ]
        assert lines[3].startswith("+scheduler  none         # an elevator") and lines[3].endswith(
            "[measured: docs/tuning.md]"
        )

    def test_json(self, machine: Machine) -> None:
        disk = served(machine.add(), depth=4)
        found = json.loads(json.dumps(show.document(disk, planned(disk), "balanced", applied=False)))
        assert found["changes"][0]["new"] == "none" and found["device"] == disk.path and found["applied"] is False
        assert {"key", "value", "why", "source"} == set(found["left_alone"][0]) == set(found["advice"][0])

    def test_every_attribute_has_a_rule(self, machine: Machine) -> None:
        found = planned(machine.add(scheduler="[none]"))
        assert set(ATTRIBUTES) <= set(left(found)) | set(changes(found))

    def test_a_disk_that_is_in_use_is_not_written_to(self, machine: Machine) -> None:
        disk = machine.add("sda")
        holder = machine.root / "sys/class/block/sda/holders/dm-0"
        holder.mkdir(parents=True)
        with pytest.raises(UsageError, match="in use: used by /dev/dm-0"), measure.exclusive(disk):
            pass
