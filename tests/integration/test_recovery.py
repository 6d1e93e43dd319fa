# SPDX-License-Identifier: Apache-2.0
"""Workers and supervisors that die, devices that change their size."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lib.device import Device, cli, reap
from lib.tools import (
    MIB,
    device_bytes,
    direct_reader,
    fio_command,
    fio_result,
    forget,
    has,
    pread,
    pwrite,
    read,
    wait_until,
)

from ublkd import native, supervisor
from ublkd.control.commands import Control
from ublkd.control.device import open_char
from ublkd.errors import UblkdError
from ublkd.supervisor import create

SIZE = 64 * MIB
HERE = Path(__file__).resolve().parent
WRITE_AND_VERIFY = {"rw": "randwrite", "bs": "16k", "iodepth": 16, "size": 10 * MIB, "rate": 3 * MIB}


@contextmanager
def verifying(device: Device) -> Iterator[subprocess.Popen[str]]:
    """fio under way; it must end without an error or a mismatch."""
    process = subprocess.Popen(
        fio_command(device.path, WRITE_AND_VERIFY),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_until(lambda: device.ios("write") > 20, "fio writes")
        yield process
        assert process.poll() is None, "fio was done before it mattered"
        out = process.communicate(timeout=60)[0]
        assert process.returncode == 0, out[:2000]
        [job] = fio_result(out)
        assert job["write"]["io_bytes"] == 10 * MIB == job["read"]["io_bytes"]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("target", "batch"), [("loop", "off"), ("loop", "on"), ("memory", "on"), ("python", "off")]
)
def test_a_killed_worker_is_replaced(
    target: str, batch: str, serve: Callable[..., Device], image: Callable[..., Path]
) -> None:
    """Nobody who uses the device notices."""
    batch = batch if has("BATCH_IO") else "off"
    if target == "loop":
        device = serve("loop", image(SIZE), batch=batch)
    else:
        file = f"{HERE}/lib/targets.py:Disk" if target == "python" else None
        device = serve(target, file, size=SIZE, batch=batch)
    old = device.workers()
    with verifying(device):
        os.kill(old[2], signal.SIGKILL)
        device.await_replacement(old, old[2])
        assert device.state == "live"
    assert device.record["supervisor"]["pid"] == device.supervisor
    log = [json.loads(line) for line in read(f"/run/ublkd/{device.id}.log").splitlines()]
    died = next(event for event in log if event["event"] == "worker died")
    assert died["queue"] == 2 and "SIGKILL" in died["reason"]
    assert any(event["event"] == "recovered" for event in log)


def test_workers_end_with_their_supervisor(serve: Callable[..., Device]) -> None:
    device = serve("null", size=SIZE)
    workers = device.workers()
    device.kill_supervisor()
    wait_until(lambda: not any(os.path.exists(f"/proc/{pid}/exe") for pid in workers), "the workers die", 10)
    [entry] = json.loads(cli("list", "--json").out)
    assert (entry["state"], entry["served"], entry["supervisor"]) == ("quiesced", False, None)
    assert "quiesced, unserved" in cli("list").out
    done = cli("del", device.id)
    assert (done.status, done.err) == (0, "")
    device.gone = True


@pytest.mark.parametrize("target", ["loop", "memory", "python"])
def test_a_device_survives_its_supervisor(
    target: str, serve: Callable[..., Device], image: Callable[..., Path]
) -> None:
    contents = random.Random(3).randbytes(4 * MIB)
    if target == "loop":
        device = serve("loop", image(SIZE))
    else:
        device = serve(target, f"{HERE}/lib/targets.py:Disk" if target == "python" else None, size=SIZE)
    pwrite(device.path, contents, 8 * MIB)
    forget(device.path)
    device.kill_supervisor()
    # A read now waits until somebody serves the device again.
    reader = subprocess.Popen(
        ["dd", f"if={device.path}", "bs=4M", "skip=2", "count=1", "status=none"], stdout=subprocess.PIPE
    )
    time.sleep(0.3)
    assert reader.poll() is None
    assert supervisor.recover(device.id) == device.path
    device.supervisor = device.record["supervisor"]["pid"]
    assert reader.communicate(timeout=60)[0] == contents
    assert device.state == "live" and len(device.workers()) == 4
    pwrite(device.path, b"again", 0)
    forget(device.path)
    assert pread(device.path, 5, 0) == b"again"
    done = cli("recover", device.id)
    assert done.status == 1 and f"device {device.id} is served by process {device.supervisor}" in done.err


def test_a_request_in_flight_holds_no_takeover_up(serve: Callable[..., Device], tmp_path: Path) -> None:
    """The disk's scheduler can't be changed until it has ended, and that may take another worker."""
    gate = tmp_path / "gate"
    device = serve("python", f"{HERE}/lib/targets.py:Held", size=SIZE, queues=1, params={"gate": str(gate)})
    pwrite(device.path, b"precious" * 512, MIB)
    forget(device.path)
    scheduler = Path(f"/sys/block/{device.name}/queue/scheduler")
    scheduler.write_text("mq-deadline")
    reader = direct_reader(device.path, MIB)
    wait_until(device.under_way, "the read is held")
    device.kill_supervisor()
    assert supervisor.recover(device.id) == device.path
    device.supervisor = device.record["supervisor"]["pid"]
    [event] = device.said("the disk keeps its scheduler")
    assert "it comes when they have ended" in event["reason"]
    [worker] = device.workers()
    os.kill(worker, signal.SIGKILL)
    device.await_replacement([worker], worker)
    gate.touch()
    assert reader.communicate(timeout=60)[0] == b"precious" * 512
    wait_until(lambda: "[none]" in scheduler.read_text(), "the scheduler is changed")


def test_cleanup(serve: Callable[..., Device]) -> None:
    """What nobody serves goes, what somebody serves stays."""
    dead, alive = serve("memory", size=SIZE, queues=1), serve("memory", size=SIZE, queues=1)
    dead.kill_supervisor()
    Path("/run/ublkd/77.json").write_text("{ not a record")
    Path("/dev/shm/ublkd-78").write_text("left over")
    said = cli("cleanup", "--dry-run")
    assert said.status == 0 and f"{dead.path} (quiesced)" in said.out and alive.path not in said.out
    assert dead.state == "quiesced"
    assert cli("list").status == 0
    done = cli("cleanup")
    assert done.status == 0, done.err
    assert dead.path in done.out and "77.json" in done.out and "ublkd-78" in done.out
    dead.gone = True
    assert dead.state == "gone" and alive.state == "live"
    left = sorted(os.listdir("/run/ublkd")) + sorted(path.name for path in Path("/dev/shm").glob("ublkd-*"))
    assert all(name.startswith((f"{alive.id}.", f"ublkd-{alive.id}")) for name in left), left


@pytest.mark.parametrize(
    ("policy", "transport"), [("requeue", "auto"), ("requeue", "copy"), ("fail", "auto"), ("error", "auto")]
)
def test_what_a_dead_worker_held(policy: str, transport: str, serve: Callable[..., Device], tmp_path: Path) -> None:
    """Issued again, or failed; either way the device goes on."""
    gate = tmp_path / "gate"
    settings = {"size": SIZE, "on_crash": policy, "transport": transport, "params": {"gate": str(gate)}}
    if policy == "error" and not has("USER_RECOVERY_FAIL_IO"):
        with pytest.raises(UblkdError, match="--on-crash error needs a driver with USER_RECOVERY_FAIL_IO"):
            serve("python", f"{HERE}/lib/targets.py:Held", **settings)
        return
    device = serve("python", f"{HERE}/lib/targets.py:Held", **settings)
    assert device.record["on_crash"] == policy
    pwrite(device.path, b"precious" * 512, MIB)
    forget(device.path)
    reader = direct_reader(device.path, MIB)
    wait_until(device.under_way, "the read is held")
    [holder] = [
        pid
        for pid, queue in zip(device.workers(), device.snapshot()["queues"], strict=True)
        if queue["started"] > queue["completed"]
    ]
    os.kill(holder, signal.SIGKILL)
    wait_until(lambda: holder not in device.workers(), "the workers are replaced")
    if policy == "requeue":
        assert reader.poll() is None
        gate.touch()
        assert reader.communicate(timeout=60)[0] == b"precious" * 512
    else:
        assert b"Input/output error" in reader.communicate(timeout=60)[1]
        gate.touch()
    assert device.state == "live" and device.record["recoveries"] == 1
    assert pread(device.path, 8, MIB) == b"precious"


def crash_until_given_up(device: Device) -> None:
    """Kill its one worker again and again; returns when the supervisor has ended, with status 1."""

    def ended() -> bool:
        return not os.path.exists(f"/proc/{device.supervisor}/exe")

    for _ in range(8):
        if ended():
            break
        [pid] = device.workers()
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        wait_until(
            lambda pid=pid: ended() or device.workers() != [pid],  # type: ignore[misc]
            "the worker is replaced or the supervisor gives up",
        )
    assert reap(device.supervisor) == 1
    assert "workers died 3 times within 60 seconds" in read(f"/run/ublkd/{device.id}.log")


def test_a_device_that_crashes_all_the_time_fails(serve: Callable[..., Device], image: Callable[..., Path]) -> None:
    """Who uses it is told; what is left can be looked at, and makes way for a new start."""
    backing = image(SIZE)
    settings = {"queues": 1, "crash_limit": 2, "number": 7}
    device = serve("loop", backing, **settings)
    user = os.open(device.path, os.O_RDWR)
    crash_until_given_up(device)
    wait_until(lambda: device.state == "dead", "the device has failed")
    with pytest.raises(OSError):
        os.pwrite(user, bytes(4096), 16 * MIB)
    os.close(user)
    assert "workers died 3 times" in cli("list").out
    assert "workers died 3 times" in json.loads(cli("show", "7", "--json").out)["note"]
    done = cli("recover", 7)
    assert done.status == 1 and "device 7 failed: workers died 3 times" in done.err
    device.gone = True
    again = serve("loop", backing, **settings)
    assert again.id == 7 and again.state == "live"


def test_a_device_that_crashes_all_the_time_waits(serve: Callable[..., Device]) -> None:
    device = serve("null", size=SIZE, queues=1, crash_limit=2, give_up="wait")
    crash_until_given_up(device)
    # The driver sees its server gone a moment after it is.
    wait_until(lambda: device.state == "quiesced", "the device is quiesced")


def test_a_new_start_takes_the_device_over(serve: Callable[..., Device], image: Callable[..., Path]) -> None:
    """As a service manager restarts it, or a user: the same disk, by its file or by its number."""
    backing = image(SIZE)
    device = serve("loop", backing, queues=2, transport="auto", batch="off")  # as for the command
    with open(device.path, "rb"):
        device.kill_supervisor()
        done = cli("add", "loop", backing, "-q", 4)
        assert done.status == 2 and "has another queues: 2" in done.err, done.err
        done = cli("add", "loop", backing, "-q", 2, "-d", 64, "--log-level", "warning")
        assert (done.status, done.out) == (0, f"{device.path}\n"), done.err
    device.supervisor = device.record["supervisor"]["pid"]
    assert device.state == "live" and device.record["settings"]["log_level"] == "warning"
    named = serve("memory", size=SIZE, queues=1, number=9)
    pwrite(named.path, b"kept", 4096)
    named.kill_supervisor()
    other = serve("memory", size=SIZE, queues=1)
    assert other.id != 9
    again = serve("memory", size=SIZE, queues=1, number=9)
    named.gone = True
    forget(again.path)
    assert (again.id, pread(again.path, 4, 4096)) == (9, b"kept")


@pytest.mark.parametrize("kind", ["file", "disk"])
def test_a_backing_that_is_let_go_of_late(
    kind: str, serve: Callable[..., Device], request: pytest.FixtureRequest
) -> None:
    """The workers of a dead supervisor end after it, and hold their backing until then; here, the test does."""
    backing = request.getfixturevalue("image")(SIZE) if kind == "file" else request.getfixturevalue("raw_disk")
    device = serve("loop", backing, queues=1, start_timeout=8)
    pwrite(device.path, b"kept", MIB)
    [worker] = device.workers()
    device.kill_supervisor()
    wait_until(lambda: not os.path.exists(f"/proc/{worker}/exe"), "the worker is ended")
    recover = ["recover", device.id]
    holder = os.open(backing, os.O_RDWR | (os.O_EXCL if kind == "disk" else 0))
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        done = cli(*recover)
        assert done.status != 0 and done.err.count("\n") == 1, done.err
        assert (f"a worker of {device.path} or another program" if kind == "file" else "is in use") in done.err
        assert device.state == "quiesced"
        pid = os.fork()
        if pid == 0:  # a file is held until the last that has it open is gone
            time.sleep(0.5)
            os._exit(0)
    finally:
        os.close(holder)
    done = cli(*recover)
    os.waitpid(pid, 0)
    assert (done.status, done.out) == (0, f"{device.path}\n"), done.err
    device.supervisor = device.record["supervisor"]["pid"]
    forget(device.path)
    assert pread(device.path, 4, MIB) == b"kept"


@pytest.mark.parametrize("who", ["worker", "supervisor"])
def test_a_death_in_the_middle_of_a_recovery(who: str, serve: Callable[..., Device], tmp_path: Path) -> None:
    """When some queues are served again and one is not yet: the worst moment for some drivers."""
    device = serve("python", f"{HERE}/lib/targets.py:Frail", size=SIZE, params={"place": str(tmp_path)})
    pwrite(device.path, b"kept", MIB)
    (tmp_path / ("kill" if who == "worker" else "wait")).touch()
    old = device.workers()
    os.kill(old[1], signal.SIGKILL)
    if who == "worker":
        wait_until(lambda: device.record["recoveries"] and device.state == "live", "the device is served again")
        assert not (tmp_path / "kill").exists()
    else:
        ending = [old[1]] if has("SHARDS") else old
        wait_until(lambda: not any(os.path.exists(f"/proc/{pid}/exe") for pid in ending), "the workers are ended")
        time.sleep(2)
        os.kill(device.supervisor, signal.SIGKILL)
        reap(device.supervisor)
        (tmp_path / "wait").unlink()
        assert supervisor.recover(device.id) == device.path
        device.supervisor = device.record["supervisor"]["pid"]
    forget(device.path)
    assert pread(device.path, 4, MIB) == b"kept" and len(device.workers()) == 4


def abandon_recovery(device: Device, fetched: int) -> None:
    """Begin a recovery, map the command buffers, fetch so many queues, and die."""
    with Control() as ctl:
        ctl.start_recovery(device.id, timeout=30)
        info = ctl.get_info(device.id)
    cdev = open_char(device.id)
    pid = os.fork()
    if pid == 0:
        try:
            buffers = [native.CommandBuffer(cdev, qid, info.depth) for qid in range(info.queues)]
            for qid in range(fetched):
                native.Queue(
                    cdev_fd=cdev,
                    qid=qid,
                    depth=info.depth,
                    max_io_bytes=info.max_io_bytes,
                    transport=create.TRANSPORTS[create.transport_of(info.flags)],
                    dev_bytes=SIZE,
                    cmdbuf=buffers[qid],
                    shm=None,
                    target=native.null_target(zero_reads=True),
                ).fetch()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(cdev)
    os.waitpid(pid, 0)


@pytest.mark.parametrize("fetched", [0, 1, 4])
def test_a_recovery_that_was_given_up_half_way(fetched: int, serve: Callable[..., Device]) -> None:
    """Its process was killed after it had mapped, and the driver minds who maps; some queues may be fetched, too."""
    device = serve("memory", size=SIZE)
    pwrite(device.path, b"kept", MIB)
    forget(device.path)
    device.kill_supervisor()
    abandon_recovery(device, fetched)
    assert supervisor.recover(device.id) == device.path
    device.supervisor = device.record["supervisor"]["pid"]
    assert pread(device.path, 4, MIB) == b"kept" and device.state == "live"
    with verifying(device):
        os.kill(device.workers()[3], signal.SIGKILL)


@pytest.mark.parametrize("damage", ["truncated", "foreign", "stale"])
def test_a_record_that_is_not_to_be_trusted(damage: str, serve: Callable[..., Device]) -> None:
    device = serve("null", size=SIZE, queues=1, number=5)
    device.kill_supervisor()
    path = Path(f"/run/ublkd/{device.id}.json")
    good = path.read_text()
    record = json.loads(good)
    if damage == "truncated":
        path.write_text(good[: len(good) // 2])
    elif damage == "foreign":
        path.write_text(json.dumps({**record, "id": 6}))
    else:
        path.write_text(json.dumps({**record, "boot_id": "of another boot"}))
    for done in (cli("recover", 5), cli("add", "null", "--size", "64M", "-n", 5)):
        assert done.status in (1, 2) and done.err.count("\n") == 1, done.err
    assert device.state == "quiesced"
    path.write_text(good)


def test_resize(serve: Callable[..., Device], image: Callable[..., Path]) -> None:
    backing = image(SIZE)
    device = serve("loop", backing)
    with Control() as ctl:
        can = ctl.get_features().has("UPDATE_SIZE")
    os.truncate(backing, 2 * SIZE)
    done = cli("resize", device.id)
    if not can:
        assert done.status == 1 and "this driver can't resize a live device" in done.err
        assert device_bytes(device.path) == SIZE
        return
    assert (done.status, done.out) == (0, f"{2 * SIZE}\n"), done.err
    assert device_bytes(device.path) == 2 * SIZE
    pwrite(device.path, b"beyond" * 1000, 2 * SIZE - 6000)
    forget(backing)
    assert pread(backing, 6, 2 * SIZE - 6000) == b"beyond"
    done = cli("resize", device.id, "32M")
    assert (done.status, done.out) == (0, f"{32 * MIB}\n")
    assert device_bytes(device.path) == 32 * MIB
    done = cli("resize", device.id, "1G")
    assert done.status == 2 and f"{backing} has only {2 * SIZE} bytes" in done.err
    [entry] = json.loads(cli("list", "--json").out)
    assert entry["size"] == 32 * MIB
