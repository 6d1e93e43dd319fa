# SPDX-License-Identifier: Apache-2.0
"""scripts/tune on real disks: what it shows, makes, unmakes, measures and refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lib.device import Device, Result, fork, in_child
from lib.tools import MIB, pread, pwrite, read, sh, wait_until

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from tunelib.cli import main
from tunelib.disk import Disk

SIZE = 32 * MIB
QUICK = ("--measure", "--milliseconds", "60", "--repeats", "2")
Serve = Callable[..., Device]


def tune(*arguments: object) -> Result:
    """One command line of scripts/tune, to its end."""
    return in_child(lambda: main([str(argument) for argument in arguments]))


def done(*arguments: object) -> Result:
    """One that succeeds."""
    result = tune(*arguments)
    assert result.status == 0, result.err
    return result


def refused(*arguments: object) -> str:
    """One that fails: its one line, after those of progress."""
    result = tune(*arguments)
    assert result.status in (1, 2), result
    *progress, error = result.err.splitlines()
    assert error.startswith("tune: error: ") and not [line for line in progress if "error" in line], result.err
    return error


def settings(device: Device) -> dict[str, str]:
    return Disk(device.name).snapshot()


def detuned(device: Device) -> dict[str, str]:
    """Badly set up: all settings, as they are then."""
    queue = Path(f"/sys/block/{device.name}/queue")
    for name, value in {
        "scheduler": "mq-deadline",
        "nr_requests": "40",
        "nomerges": "1",
        "read_ahead_kb": "64",
    }.items():
        (queue / name).write_text(value)
    found = settings(device)
    assert (found["scheduler"], found["nr_requests"], found["read_ahead_kb"]) == ("mq-deadline", "40", "64")
    return found


def record(device: Device) -> Path:
    return Path(f"/run/ublkd/tune-{device.id}.json")


def test_a_device_as_ublkd_makes_it_needs_nothing(serve: Serve) -> None:
    device = serve("null", size=SIZE)
    for target in (device.id, device.path):
        result = done(target)
        assert result.out.startswith(f"{device.path}: nothing to change") and not result.err
    assert "nothing to compare" in done(device.id, "--measure").err
    assert done(device.id, "--apply").out and not record(device).exists()


def test_the_diff_changes_nothing(serve: Serve) -> None:
    device = serve("null", size=SIZE, queues=1)
    before = detuned(device)
    out = done(device.id, "--profile", "latency").out.splitlines()
    assert out[:2] == [f"--- {device.path} (as it is)", f"+++ {device.path} (profile latency)"]
    assert [line.split("#")[0].split() for line in out[2 : out.index("")]] == [
        ["-scheduler", "mq-deadline"],
        ["+scheduler", "none"],
        ["-read_ahead_kb", "64"],
        ["+read_ahead_kb", "32"],
        ["-nomerges", "1"],
        ["+nomerges", "0"],
    ]
    found = json.loads(done(device.id, "--json").out)
    assert {change["key"] for change in found["changes"]} == {"scheduler", "nomerges"}
    assert found["applied"] is False and all(change["why"] and change["source"] for change in found["changes"])
    assert settings(device) == before and not record(device).exists()


def test_apply_and_undo(serve: Serve) -> None:
    device = serve("null", size=SIZE, queues=1)
    before = detuned(device)
    done(device.path, "--apply")
    now = settings(device)
    assert (now["scheduler"], now["nomerges"]) == ("none", "0")
    assert now["nr_requests"] == "64", "the new scheduler brings its own"
    assert now["read_ahead_kb"] == "64", "nobody asked for another"
    # twice, and more: the first originals stay
    done(device.path, "--apply")
    found = json.loads(done(device.path, "--apply", "--profile", "latency", "--set", "iostats=0", "--json").out)
    assert found["applied"] is True
    assert (settings(device)["read_ahead_kb"], settings(device)["iostats"]) == ("32", "0")
    # which is a limit of the queue, and with those 7.2 sets read-ahead anew
    done(device.path, "--apply", "--set", "iostats=1", "--set", "max_sectors_kb=256")
    assert (settings(device)["read_ahead_kb"], settings(device)["iostats"]) == ("32", "1")
    most = read(f"/sys/block/{device.name}/queue/max_hw_sectors_kb").strip()
    assert f"-max_sectors_kb  256\n+max_sectors_kb  {most}" in done(device.id).out
    undone = done(device.path, "--undo").out
    assert "-scheduler  none\n+scheduler  mq-deadline\n" in undone
    assert settings(device) == before and not record(device).exists()
    assert "there is nothing to undo" in refused(device.path, "--undo")


def test_a_setting_that_is_refused_takes_all_with_it(serve: Serve) -> None:
    device = serve("null", size=SIZE, queues=1)
    before = detuned(device)
    error = refused(device.id, "--apply", "--set", "nr_requests=100000")
    assert "nr_requests does not take 100000: Invalid argument; all is as it was" in error
    error = refused(device.id, "--apply", "--set", "read_ahead_kb=5")
    assert "read_ahead_kb does not keep 5: it is 4; all is as it was" in error
    error = refused(device.id, *QUICK, "--set", "scheduler=bogus")
    assert "scheduler does not take bogus" in error
    assert settings(device) == before and not record(device).exists()
    # one that was applied before stays applied, and undoable
    done(device.id, "--apply")
    applied = settings(device)
    refused(device.id, "--apply", "--set", "iostats=0", "--set", "max_sectors_kb=999999999")
    assert settings(device) == applied
    done(device.id, "--undo")
    assert settings(device) == before


def test_a_record_of_a_disk_that_is_gone(serve: Serve) -> None:
    first = serve("null", size=SIZE, queues=1, number=5)
    detuned(first)
    done(5, "--apply")
    first.stop()
    second = serve("null", size=SIZE, queues=1, number=5)
    before = detuned(second)
    assert "is of another disk that was /dev/ublkb5 before" in refused(5, "--undo")
    assert settings(second) == before
    done(5, "--apply")
    done(5, "--undo")
    assert settings(second) == before


def test_what_the_settings_say_is_respected(serve: Serve) -> None:
    device = serve("null", size=SIZE, queues=1, scheduler="keep")
    Path(f"/sys/block/{device.name}/queue/scheduler").write_text("mq-deadline")
    found = json.loads(done(device.id, "--json").out)
    assert not found["changes"]
    [scheduler] = [remark for remark in found["left_alone"] if remark["key"] == "scheduler"]
    assert scheduler["value"] == "mq-deadline" and "scheduler = keep" in scheduler["why"]


def test_measure(serve: Serve) -> None:
    device = serve("memory", size=SIZE, queues=1)
    data = os.urandom(MIB)
    pwrite(device.path, data, 3 * MIB)
    before = detuned(device)
    writes = device.ios("write")
    result = done(device.id, *QUICK, "--profile", "latency", "--json")
    measured = json.loads(result.out)["measured"]
    wanted = {"read-4k-1", "read-4k-32", "read-128k-8", "stream-128k", "faults-4k"}
    assert set(measured["ratios"]) == wanted == set(measured["samples"]["before"]) == set(measured["samples"]["after"])
    for cell, ratio in measured["ratios"].items():
        assert 0 < ratio["low"] <= ratio["high"] and ratio["medians"] > 0
        assert [len(measured["samples"][state][cell]) for state in ("before", "after")] == [2, 2]
    assert result.err.splitlines() == [
        f"tune: round {number} of 2: {state}"
        for number, state in [(1, "before"), (1, "after"), (2, "after"), (2, "before")]
    ]
    assert settings(device) == before and not record(device).exists()
    assert pread(device.path, MIB, 3 * MIB) == data and device.ios("write") == writes
    # for people, and kept
    result = done(device.id, *QUICK, "--apply")
    assert re.search(r"^\| 4k read, depth 1 +\| .*\d+ \[\d+-\d+\] \| +\d+\.\d\d \[\d", result.out, re.MULTILINE)
    assert settings(device)["scheduler"] == "none"
    done(device.id, "--undo")
    assert settings(device) == before and device.ios("write") == writes


def test_writes_are_measured_when_asked_for_on_a_disk_of_nobody(serve: Serve, tmp_path: Path) -> None:
    device = serve("memory", size=SIZE, queues=1)
    sh("mkfs.ext4", "-qF", device.path)
    sh("mount", device.path, tmp_path)
    (tmp_path / "file").write_text("precious")
    try:
        before = settings(device)
        error = refused(device.id, *QUICK, "--write", "--set", "iostats=0")
        assert f"is in use: mounted on {tmp_path}" in error
        assert settings(device) == before and not record(device).exists()
        # reading is harmless
        done(device.id, *QUICK, "--set", "iostats=0")
    finally:
        sh("umount", tmp_path)
    sh("udevadm", "settle")  # it looks at the disk after that
    with open(device.path, "rb"):
        assert "open in process" in refused(device.id, *QUICK, "--write", "--set", "iostats=0")
    assert "precious" in sh("debugfs", "-R", "cat /file", device.path)
    sh("udevadm", "settle")
    result = done(device.id, *QUICK, "--write", "--set", "iostats=0", "--json")
    assert {"write-4k-32", "write-128k-8"} < set(json.loads(result.out)["measured"]["ratios"])
    assert settings(device) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_while_it_measures(number: signal.Signals, serve: Serve) -> None:
    device = serve("null", size=SIZE, queues=1)
    before = detuned(device)
    null = os.open(os.devnull, os.O_WRONLY)

    def task() -> int:
        os.setsid()  # so that fio can be ended with it
        try:
            return main([str(device.id), "--measure", "--milliseconds", "600000"])
        except SystemExit as ended:
            assert isinstance(ended.code, int)
            return ended.code

    pid = fork(task, null, null)
    os.close(null)
    reads = device.ios("read")
    wait_until(lambda: device.ios("read") > reads + 20, "fio reads")
    assert "another scripts/tune is at work" in refused(device.id, "--apply")
    os.killpg(pid, number) if number == signal.SIGKILL else os.kill(pid, number)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if number == signal.SIGKILL:
        assert status == -number and record(device).exists()
        done(device.id, "--undo")
    else:
        assert status == 128 + number
    assert settings(device) == before and not record(device).exists()


def test_workers_are_moved_by_an_upgrade(serve: Serve) -> None:
    device = serve("null", size=SIZE, queues=2, cpus=[0, 0])
    Path(f"/sys/block/{device.name}/queue/scheduler").write_text("mq-deadline")
    before = settings(device)
    [advice] = [remark for remark in json.loads(done(device.id, "--json").out)["advice"] if remark["key"] == "workers"]
    assert "share a CPU" in advice["why"] and device.record["settings"]["cpus"] == [0, 0]

    def placed() -> list[int]:
        device.supervisor = device.record["supervisor"]["pid"]
        return [worker["cpu"] for worker in device.record["workers"]]

    # the upgrade has taken place by the time the kernel refuses the other
    assert "all is as it was" in refused(device.id, "--apply", "--workers", "--set", "nr_requests=100000")
    assert (placed(), device.record["settings"]["cpus"], settings(device)) == ([0, 0], [0, 0], before)
    done(device.id, "--apply", "--workers")
    masks = Disk(device.name).masks()
    assert all(cpu in mask for cpu, mask in zip(placed(), masks, strict=True)) and len(set(placed())) == 2
    assert settings(device)["scheduler"] == "none"
    assert "workers" not in {remark["key"] for remark in json.loads(done(device.id, "--json").out)["advice"]}
    done(device.id, "--undo")
    assert (placed(), device.record["settings"]["cpus"], settings(device)) == ([0, 0], [0, 0], before)
    assert device.state == "live" and not record(device).exists()


def test_a_disk_whose_server_is_gone_is_only_looked_at(serve: Serve) -> None:
    device = serve("null", size=SIZE, queues=1)
    before = detuned(device)
    device.kill_supervisor()
    for what in ("--apply", "--undo", "--measure"):
        assert f"{device.path} is not served (`ublkd recover {device.id}`" in refused(device.id, what)
    assert "+scheduler  none" in done(device.id).out
    assert settings(device) == before and not record(device).exists()


def test_other_disks(raw_disk: str) -> None:
    queue = Path(f"/sys/block/{Path(raw_disk).name}/queue")
    assert "nothing to change" in done(raw_disk).out
    before = read(queue / "read_ahead_kb")
    done(raw_disk, "--apply", "--set", "read_ahead_kb=2048")
    assert read(queue / "read_ahead_kb") == "2048" != before
    done(raw_disk, "--undo")
    assert read(queue / "read_ahead_kb") == before


def test_what_is_no_disk(serve: Serve) -> None:
    device = serve("null", size=SIZE, queues=1)
    for path, reason in (
        (f"/dev/ublkc{device.id}", "there is no block device"),
        ("/dev/null", "there is no block device"),
        (device.id + 1, "there is no block device"),
        ("/etc/passwd", "is no block device"),
    ):
        assert reason in refused(path, "--apply", "--set", "iostats=0")


def test_the_command_itself(serve: Serve) -> None:
    device = serve("null", size=SIZE, queues=1)
    script = Path(__file__).resolve().parents[2] / "scripts" / "tune"
    assert "nothing to change" in sh(script, device.id)
    found: dict[str, Any] = json.loads(sh(script, device.path, "--json"))
    assert found["device"] == device.path
