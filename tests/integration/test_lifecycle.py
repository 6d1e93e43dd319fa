# SPDX-License-Identifier: Apache-2.0
"""From start to end: run, add, list, show, stat, the processes themselves, del."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lib import leaks
from lib.device import Device, Foreground, cli, in_child
from lib.tools import MIB, fio, fio_command, fio_result, has, pread, pwrite, read, sh, wait_until

from ublkd import native

HERE = Path(__file__).resolve().parent
TARGETS = f"{HERE}/lib/targets.py"
UBLKD = [sys.executable, "-B", "-m", "ublkd"]

SLOW = """
import ublkd


class Slow(ublkd.Target):
    size = 1 << 20

    async def read(self, req):
        await ublkd.sleep(600 if req.offset == 77 * 512 else 0)
        req.zero()
"""

LATE = """
import time

import ublkd


class Late(ublkd.Target):
    size = 1 << 20

    def open(self, spec):
        open({opened!r}, "w").close()
        time.sleep(600)

    def read(self, req):
        req.zero()
"""


@pytest.fixture
def run() -> Iterator[Callable[..., Foreground]]:
    """Starts `ublkd run`."""
    started: list[Foreground] = []

    def run(*argv: object) -> Foreground:
        started.append(Foreground("run", *argv))
        return started[-1]

    yield run
    for each in started:
        each.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_ends_cleanly(number: int, run: Callable[..., Foreground]) -> None:
    server = run("memory", "--size", "64M", "-q", 4, "--log-format", "json")
    path = server.first_line()
    assert re.fullmatch(r"/dev/ublkb\d+", path)
    pwrite(path, b"x" * MIB, 0)
    status, out, err = server.end(number)
    assert (status, out) == (0, "")
    events = [json.loads(line) for line in err.splitlines()]
    assert {"live", "stopping", "removed"} <= {event["event"] for event in events}
    live = next(event for event in events if event["event"] == "live")
    assert live["path"] == path and live["device"] == int(path[10:])
    assert sorted(event["queue"] for event in events if event["event"] == "queue served") == [0, 1, 2, 3]
    assert not os.path.exists(path)
    assert leaks.find() == []


def test_a_second_signal_is_faster(run: Callable[..., Foreground], tmp_path: Path) -> None:
    """The first waits for a handler that takes its time; the second doesn't."""
    slow = tmp_path / "slow.py"
    slow.write_text(SLOW)
    server = run("python", f"{slow}:Slow")
    path = server.first_line()
    reader = subprocess.Popen(
        ["dd", f"if={path}", "of=/dev/null", "bs=512", "skip=77", "count=1", "iflag=direct"],
        stderr=subprocess.DEVNULL,
    )
    inflight = Path(f"/sys/block/{os.path.basename(path)}/inflight")
    wait_until(lambda: inflight.read_text().split()[0] != "0", "the read is under way")
    os.kill(server.pid, signal.SIGTERM)
    time.sleep(1.5)
    assert server.running() and reader.poll() is None, "it did not wait for the request in flight"
    status, _, _ = server.end(signal.SIGTERM)
    assert status == 0
    assert reader.wait(60) != 0, "it waited for the request in flight"
    assert leaks.find() == []


def test_a_signal_during_the_start(run: Callable[..., Foreground], tmp_path: Path) -> None:
    late = tmp_path / "late.py"
    late.write_text(LATE.format(opened=str(tmp_path / "opened")))
    server = run("python", f"{late}:Late")
    wait_until((tmp_path / "opened").exists, "the worker starts", 60)
    status, out, _ = server.end(signal.SIGTERM)
    assert (status, out) == (0, "")
    assert leaks.find() == []


def test_add_prints_the_path_alone() -> None:
    done = cli("add", "memory", "--size", "64M", "-q", 4)
    assert done.status == 0 and re.fullmatch(r"/dev/ublkb\d+\n", done.out), done
    assert done.err == ""
    assert os.path.exists(done.out.strip())
    done = cli("del", done.out.strip())
    assert (done.status, done.out, done.err) == (0, "", "")


def test_the_command_itself() -> None:
    """As installed, once: an interpreter of its own, whose caller does not wait for the device to end."""
    done = subprocess.run([*UBLKD, "add", "null", "--size", "1G", "-q", "4", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    added = json.loads(done.stdout)
    assert added["state"] == "live" and added["target"] == "null" and added["size"] == 1 << 30
    assert cli("del", "--all").status == 0


def test_a_worker_that_fails_fails_the_start_at_once() -> None:
    for cls, reason in (("RaisesInOpen", "the vault is closed"), ("DiesInOpen", "was killed by SIGKILL")):
        done = cli("add", "python", f"{TARGETS}:{cls}", "--size", "1M", "-q", 4)
        assert done.status != 0 and done.out == ""
        assert reason in done.err and "worker of queue" in done.err and done.err.count("\n") == 1
        assert leaks.find() == []


def as_json(*argv: object) -> Any:
    done = cli(*argv, "--json")
    assert done.status == 0, done.err
    return json.loads(done.out)


def test_list_and_show(serve: Callable[..., Device], image: Callable[..., Path]) -> None:
    backing = image(64 * MIB)
    loop = serve("loop", backing, depth=32, batch="off")
    memory = serve("memory", size=MIB, queues=1, number=9)
    listed = {entry["path"]: entry for entry in as_json("list")}
    assert set(listed) == {loop.path, "/dev/ublkb9"} and memory.id == 9
    entry = listed[loop.path]
    expected = {
        "id": loop.id,
        "state": "live",
        "served": True,
        "target": "loop",
        "backing": str(backing),
        "size": 64 * MIB,
        "queues": 4,
        "depth": 32,
        "block_size": 512,
        "read_only": False,
        "supervisor": loop.supervisor,
        "owner": "ublkd",
    }
    assert {key: entry[key] for key in expected} == expected
    assert [(w["queue"], w["pid"]) for w in entry["workers"]] == list(enumerate(loop.workers()))
    shown = as_json("show", loop.path)
    assert shown.pop("batch").startswith("off: ")
    assert shown == entry
    table = cli("list").out
    assert table.count("\n") == 3 and all(word in table for word in (loop.path, "/dev/ublkb9", "64 MiB", str(backing)))
    assert str(backing) in cli("show", loop.id).out


def process_flags(pid: int | str) -> int:
    """The kernel's PF_* bits."""
    return int(read(f"/proc/{pid}/stat").rpartition(")")[2].split()[6])


def flags_of_a_flusher() -> int:
    """What PR_SET_IO_FLUSHER sets, which is nowhere else to be seen from outside."""

    def task() -> None:
        before = process_flags("self")
        native.be_io_flusher()
        print(process_flags("self") & ~before)

    flags = int(in_child(task).out)
    assert flags
    return flags


def test_the_processes(serve: Callable[..., Device]) -> None:
    """One supervisor, one worker for each queue: pinned, named, protected, out of the way."""
    device = serve("memory", size=64 * MIB, queues=4, cpus=[3, 2, 1, 0])
    workers = device.record["workers"]
    assert sorted(worker["cpu"] for worker in workers) == [0, 1, 2, 3]
    for worker in workers:
        status = dict(
            line.split(":\t", 1) for line in read(f"/proc/{worker['pid']}/status").splitlines() if ":\t" in line
        )
        assert status["Cpus_allowed_list"] == str(worker["cpu"])
        assert int(status["PPid"]) == device.supervisor
        assert int(read(f"/proc/{worker['pid']}/stat").rpartition(")")[2].split()[36]) == worker["cpu"]  # runs there
        assert status["Name"] == f"ublkd-{device.id}/q{worker['queue']}"
        title = Path(f"/proc/{worker['pid']}/cmdline").read_bytes().rstrip(b"\0")
        assert title == status["Name"].encode()
    assert read(f"/proc/{device.supervisor}/comm") == f"ublkd-{device.id}"
    flusher = flags_of_a_flusher()
    for pid in (device.supervisor, *device.workers()):
        assert read(f"/proc/{pid}/oom_score_adj") == "-1000"
        assert os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
        assert process_flags(pid) & flusher == flusher
        held = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        assert (f"/dev/ublkc{device.id}" in held) == (pid != device.supervisor)
    # Each worker has its own queue's command buffer and no other's.
    for pid in device.workers():
        maps = [line for line in read(f"/proc/{pid}/maps").splitlines() if f"/dev/ublkc{device.id}" in line]
        assert len(maps) == 1


def test_queues_without_cpus_are_spread(serve: Callable[..., Device]) -> None:
    device = serve("null", size=MIB, queues=4)
    chosen = [worker["cpu"] for worker in device.record["workers"]]
    assert sorted(chosen) == [0, 1, 2, 3]
    for queue, cpu in enumerate(chosen):
        cpus = read(f"/sys/block/{device.name}/mq/{queue}/cpu_list").replace(" ", "").split(",")
        assert str(cpu) in cpus, "a worker runs outside its queue's mask"
    device.stop()
    again = serve("null", size=MIB, queues=4)
    assert [worker["cpu"] for worker in again.record["workers"]] == chosen


def test_more_queues_than_cpus(serve: Callable[..., Device]) -> None:
    """The driver makes fewer; the log says so."""
    device = serve("null", size=MIB, queues=64)
    assert device.record["queues"] == len(device.workers()) == os.cpu_count()
    assert "64 queues were asked for, the driver made 4" in read(f"/run/ublkd/{device.id}.log")


def test_stat_grows_while_io_runs(serve: Callable[..., Device]) -> None:
    device = serve("memory", size=64 * MIB)
    job = {
        "rw": "randwrite",
        "bs": "4k",
        "size": 8 * MIB,
        "iodepth": 4,
        "time_based": 1,
        "runtime": 60,
        "rate_iops": 500,
    }
    writer = subprocess.Popen(
        fio_command(device.path, job, verify=0), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_until(lambda: device.ios("write"), "fio writes")
        [first], [second] = as_json("stat", device.id), as_json("stat", device.path)
        assert writer.poll() is None
        assert second["operations"]["write"]["ios"] > first["operations"]["write"]["ios"] > 0
        watched = cli("stat", device.id, "--watch", "0.3", "--count", 2, "--json").out.splitlines()
        assert len(watched) == 2
        for line in watched:
            [entry] = json.loads(line)
            write = entry["operations"]["write"]
            assert entry["seconds"] >= 0.3 and write["ios"] > 0
            latency = write["latency_us"]
            assert 0 < latency["p50"] <= latency["p99"] <= latency["p99.9"] and latency["mean"] > 0
        writer.send_signal(signal.SIGINT)
        out = writer.communicate(timeout=60)[0]
    finally:
        writer.kill()
        writer.wait()
    [job_result] = fio_result(out)
    [total] = as_json("stat", device.id)
    assert total["operations"]["write"]["bytes"] == job_result["write"]["io_bytes"]
    assert sum(queue["ios"] for queue in total["queues"]) == total["total"]["ios"]
    assert "write" in cli("stat", device.id).out and total["total"]["in_flight"] == 0


@pytest.mark.parametrize("target", ["null", "memory", "loop"])
def test_native_targets_never_enter_python(
    target: str, serve: Callable[..., Device], image: Callable[..., Path]
) -> None:
    """More than a thousand requests and not one return to the interpreter."""
    device = serve(target, image(64 * MIB)) if target == "loop" else serve(target, size=64 * MIB)
    before = device.snapshot()["queues"]
    fio(device.path, {"rw": "randrw", "bs": "4k", "iodepth": 32, "size": 6 * MIB}, verify=0)
    after = device.snapshot()["queues"]
    assert sum(queue["completed"] for queue in after) - sum(queue["completed"] for queue in before) > 1000
    for old, new in zip(before, after, strict=True):
        assert (old["run_returns"], old["python_entries"]) == (0, 0) == (new["run_returns"], new["python_entries"])
        assert new["pid"] == old["pid"]
    # Nor is there another thread that could: those that io_uring made are the kernel's.
    for pid in device.workers():
        names = {read(f"/proc/{pid}/task/{task}/comm") for task in os.listdir(f"/proc/{pid}/task")}
        assert all(name.startswith((f"ublkd-{device.id}", "iou-")) for name in names), names


def test_python_is_entered_once_per_pass(serve: Callable[..., Device]) -> None:
    device = serve("python", f"{TARGETS}:Disk", size=64 * MIB)
    fio(device.path, {"rw": "randwrite", "bs": "4k", "iodepth": 32, "size": 4 * MIB, "numjobs": 2}, verify=0)
    queues = device.snapshot()["queues"]
    assert sum(queue["completed"] for queue in queues) > 1000
    for queue in queues:
        assert queue["python_entries"] <= queue["passes"]
        assert queue["run_returns"] == 0
    assert 0 < sum(queue["python_entries"] for queue in queues) < sum(queue["completed"] for queue in queues)


def test_a_device_in_use_is_not_deleted(serve: Callable[..., Device], tmp_path: Path) -> None:
    device = serve("memory", size=64 * MIB)
    sh("mkfs.ext4", "-qF", device.path)
    sh("mount", device.path, tmp_path)
    try:
        done = cli("del", device.id)
        assert done.status == 1 and f"device {device.id} is in use: mounted on {tmp_path}" in done.err
        (tmp_path / "file").write_text("alive")
        os.sync()
    finally:
        sh("umount", tmp_path)
    done = cli("del", device.id)
    assert (done.status, done.err) == (0, "")
    device.gone = True
    os.waitpid(device.supervisor, 0)


@pytest.mark.parametrize("served", [True, False])
def test_a_lazy_removal_waits_for_the_last_user(served: bool, serve: Callable[..., Device]) -> None:
    device = serve("memory", size=64 * MIB, queues=1)
    user = subprocess.Popen(["sleep", "600"], stdin=open(device.path, "rb"))  # noqa: SIM115
    try:
        if not served:
            device.kill_supervisor()
        done = cli("del", device.id)
        assert done.status == 1 and f"open in process {user.pid} (sleep)" in done.err and "--lazy" in done.err
        assert device.state == ("live" if served else "quiesced")
        lazy = subprocess.Popen(
            [sys.executable, "-B", "-m", "ublkd", "del", str(device.id), "--lazy"], stderr=subprocess.PIPE, text=True
        )
        assert lazy.stderr and f"device {device.id} is in use: open in process {user.pid}" in lazy.stderr.readline()
        time.sleep(1)
        assert lazy.poll() is None and device.state != "gone"
    finally:
        user.kill()
        user.wait()
    assert lazy.wait(timeout=60) == 0
    device.gone = True
    if served:
        assert os.waitpid(device.supervisor, 0)[1] == 0
    assert device.state == "gone"


def test_a_removal_waits_for_udev(serve: Callable[..., Device], tmp_path: Path) -> None:
    """It has a disk open for a moment whenever somebody has closed it; on a busy machine a long one."""
    device = serve("memory", size=MIB, queues=1)
    (tmp_path / "systemd-udevd").symlink_to("/bin/sleep")
    udev = subprocess.Popen([tmp_path / "systemd-udevd", "3"], stdin=open(device.path, "rb"))  # noqa: SIM115
    done = cli("del", device.id)
    assert (done.status, done.err, udev.wait()) == (0, "", 0)
    device.gone = True
    assert os.waitpid(device.supervisor, 0)[1] == 0


@pytest.fixture
def shared_mounts() -> Iterator[None]:
    """Mounts travel between namespaces, as systemd sets it up."""
    sh("mount", "--make-rshared", "/")
    yield
    sh("mount", "--make-rprivate", "/")


def test_a_supervisor_keeps_no_file_system_busy(
    serve: Callable[..., Device], tmp_path: Path, shared_mounts: None
) -> None:
    """In its own mount namespace its disk is never mounted, and nothing for longer than elsewhere."""
    first = serve("memory", size=64 * MIB, queues=1)
    sh("mkfs.ext4", "-qF", first.path)
    sh("mount", first.path, tmp_path)
    try:
        second = serve("memory", size=64 * MIB, queues=1)
        assert first.path in read(f"/proc/{second.supervisor}/mounts")
        wait_until(lambda: first.path not in read(f"/proc/{first.supervisor}/mounts"), "the mount goes")
        (tmp_path / "file").write_text("alive")
        sh("sync", "--file-system", tmp_path)
    finally:
        sh("umount", tmp_path)
    fd = os.open(first.path, os.O_RDWR | os.O_EXCL)  # EBUSY while a file system is mounted anywhere
    os.close(fd)
    sh("e2fsck", "-fn", first.path)


def test_dry_run_makes_nothing(image: Callable[..., Path]) -> None:
    backing = image(64 * MIB)
    plan = as_json("run", "loop", backing, "-q", 4, "--dry-run")
    assert plan["target"] == "loop" and plan["size"] == 64 * MIB and plan["queues"] == 4
    assert plan["direct"] and len(plan["cpus"]) == 4
    assert plan["transport"] == ("zero-copy" if has("AUTO_BUF_REG") else "copy")
    assert leaks.find() == []
    assert pread(backing, 4096, 0) == bytes(4096)
