# SPDX-License-Identifier: Apache-2.0
"""Workers and supervisors that die, devices that change their size."""

from __future__ import annotations

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
from lib.tools import MIB, device_bytes, fio_command, fio_result, forget, pread, pwrite, read, wait_until

from ublkd import supervisor
from ublkd.control.commands import Control

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


@pytest.mark.parametrize("target", ["loop", "memory", "python"])
def test_a_killed_worker_is_replaced(target: str, serve: Callable[..., Device], image: Callable[..., Path]) -> None:
    """Nobody who uses the device notices."""
    if target == "loop":
        device = serve("loop", image(SIZE))
    else:
        device = serve(target, f"{HERE}/lib/targets.py:Disk" if target == "python" else None, size=SIZE)
    old = device.workers()
    with verifying(device):
        os.kill(old[2], signal.SIGKILL)
        wait_until(lambda: not set(old) & set(device.workers()), "the workers are replaced")
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
    assert reader.communicate(timeout=30)[0] == contents
    assert device.state == "live" and len(device.workers()) == 4
    pwrite(device.path, b"again", 0)
    forget(device.path)
    assert pread(device.path, 5, 0) == b"again"
    done = cli("recover", device.id)
    assert done.status == 1 and f"device {device.id} is served by process {device.supervisor}" in done.err


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


def test_a_device_that_crashes_all_the_time_is_given_up(serve: Callable[..., Device]) -> None:
    device = serve("null", size=SIZE, queues=1)
    for _ in range(8):
        if not os.path.exists(f"/proc/{device.supervisor}/exe"):
            break
        [pid] = device.workers()
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        wait_until(
            lambda pid=pid: device.workers() != [pid] or not os.path.exists(f"/proc/{device.supervisor}/exe"),  # type: ignore[misc]
            "the worker is replaced or the supervisor gives up",
        )
    assert reap(device.supervisor) == 1
    # The driver sees its server gone a moment after it is.
    wait_until(lambda: device.state == "quiesced", "the device is quiesced")
    assert "workers died 6 times within 60 seconds" in read(f"/run/ublkd/{device.id}.log")


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
