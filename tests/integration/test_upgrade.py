# SPDX-License-Identifier: Apache-2.0
"""A live device gets a new server: an edge of the handover's state machine each."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lib.device import Device, cli
from lib.tools import MIB, direct_reader, fio_command, forget, has, pread, pwrite, read, wait_until

from ublkd.errors import UblkdError
from ublkd.supervisor import endpoint

SIZE = 64 * MIB
HERE = Path(__file__).resolve().parent


@contextmanager
def verifying(device: Device) -> Iterator[None]:
    """fio writes and verifies, over and over, to the end of the block; without an error, or the test fails."""
    enough, faults = threading.Event(), list[str]()

    def again_and_again() -> None:
        job = {"rw": "randwrite", "bs": "4k-64k", "iodepth": 16, "size": 8 * MIB, "rate": 4 * MIB}
        while not enough.is_set() and not faults:
            done = subprocess.run(fio_command(device.path, job), stdout=-1, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                faults.append(done.stdout[:2000])

    thread = threading.Thread(target=again_and_again)
    thread.start()
    try:
        wait_until(lambda: device.ios("write") > 20, "fio writes")
        yield
    finally:
        enough.set()
        thread.join()
    assert not faults, faults


def alive(pid: int) -> bool:
    """Whether there is such a process, and no zombie."""
    return os.path.exists(f"/proc/{pid}/exe")


def upgrade(device: Device, *options: object) -> dict[str, Any]:
    """`ublkd upgrade`, which must succeed: what it printed. The device then has another supervisor."""
    done = cli("upgrade", device.id, "--json", *options)
    assert done.status == 0, done.err
    [result] = json.loads(done.out)
    old, device.supervisor = device.supervisor, device.record["supervisor"]["pid"]
    assert result["pid"] == device.supervisor != old and result["version"] == device.record["version"]
    assert result["pause_ms"] > 0
    wait_until(lambda: not alive(old), "the old supervisor ends")
    return dict(result)


@contextmanager
def upgrading(device: Device, python: Path, script: str) -> Iterator[socket.socket]:
    """An upgrade to what this script of a shell does, asked for and not answered yet: where the answer comes."""
    python.write_text("#!/bin/bash\n" + script)
    python.chmod(0o755)
    with connected(device) as s:
        s.send(json.dumps({"protocol": endpoint.PROTOCOL, "op": "upgrade", "python": str(python)}).encode())
        yield s


@contextmanager
def connected(device: Device) -> Iterator[socket.socket]:
    """The supervisor's socket; no answer is waited for longer than 20 seconds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        s.settimeout(20)
        s.connect(endpoint.path_of(device.id))
        yield s


def make(target: str, serve: Callable[..., Device], image: Callable[..., Path], **settings: Any) -> Device:
    settings.setdefault("start_timeout", 120)  # a new version is a new Python, with fio beside it
    if target == "loop":
        return serve("loop", image(SIZE), **settings)
    file = f"{HERE}/lib/targets.py:Disk" if target == "python" else None
    return serve(target, file, size=SIZE, **settings)


@pytest.mark.parametrize(
    ("policy", "target"),
    [("requeue", "loop"), ("requeue", "memory"), ("requeue", "python"), ("fail", "memory"), ("fail", "loop")],
)
def test_users_notice_nothing(
    policy: str, target: str, serve: Callable[..., Device], image: Callable[..., Path]
) -> None:
    device = make(target, serve, image, on_crash=policy, hang_timeout=30)
    with verifying(device):
        before, workers = device.ios("write"), device.workers()
        upgrade(device)
        assert not set(workers) & set(device.workers())
        assert device.ios("write") >= before, "the counters go on"
        upgrade(device, "--hang-timeout", "7", "--log-level", "debug", "--cpus", "1,0")
    record = device.record
    assert (record["settings"]["hang_timeout"], record["settings"]["cpus"]) == (7, [1, 0])
    assert {worker["cpu"] for worker in record["workers"]} == {0, 1}
    assert record["recoveries"] == 0 and device.state == "live"
    assert read(f"/run/ublkd/{device.id}.log").count('"upgraded"') == 2


def test_what_can_not_change(serve: Callable[..., Device]) -> None:
    device = serve("memory", size=SIZE, queues=1)
    with pytest.raises(UblkdError, match="depth can't change while the device is live"):
        endpoint.ask(device.id, 30, op="upgrade", settings={"depth": 32})
    with pytest.raises(UblkdError, match="unknown setting 'dept'"):
        endpoint.ask(device.id, 30, op="upgrade", settings={"dept": 32})
    with pytest.raises(UblkdError, match="can't be run"):
        endpoint.ask(device.id, 30, op="upgrade", python="/no\0thing")
    for settings in ([1], {"hang_timeout": "soon"}, {"cpus": {}}, {"params": 5}):
        with pytest.raises(UblkdError):
            endpoint.ask(device.id, 30, op="upgrade", settings=settings)
    done = cli("upgrade", device.id, "--cpus", "4095")
    assert done.status == 2 and "CPU 4095" in done.err
    done = cli("upgrade", 77)
    assert done.status == 1 and "device 77 is not one of ublkd's" in done.err
    assert alive(device.supervisor) and device.record["supervisor"]["pid"] == device.supervisor
    if has("USER_RECOVERY_FAIL_IO"):
        done = cli("upgrade", serve("null", size=SIZE, queues=1, on_crash="error").id)
        assert done.status == 1 and "its users would get I/O errors" in done.err


READY, LIVE = "say(ready=1, version='9'); hear(); ", "time.sleep(60)"
BROKEN = {
    "not there": (None, "can't be run: No such file"),
    "ends at once": ("sys.exit(3)", "exited with 3 before it was ready"),
    "refuses": ("say(error='I do not like it', hint=''); time.sleep(60)", "can't serve: I do not like it"),
    "never ready": ("time.sleep(60)", "was not ready within 8 seconds"),
    "killed when it should serve": (READY + "os.kill(os.getpid(), 9)", "was killed by SIGKILL before it was live"),
    "fails to serve": (READY + "say(error='no'); time.sleep(60)", "can't serve: no"),
    "never live": (READY + "time.sleep(60)", "was not live within 8 seconds"),
    "takes half of it": (
        READY + "from ublkd.control.commands import Control; Control().start_recovery(DEV_ID, 5); "
        "f = open('/dev/ublkcDEV_ID'); time.sleep(60)",
        "was not live within 8 seconds",
    ),
}
FAKE = """#!{python} -B
import json, os, socket, sys, time
channel = socket.socket(fileno=int(sys.argv[3]))
def hear(): channel.recv(65536)
def say(**words): channel.send(json.dumps(words).encode())
hear()
{body}
"""


@pytest.mark.parametrize("how", BROKEN)
def test_a_new_version_that_is_broken(how: str, serve: Callable[..., Device], tmp_path: Path) -> None:
    """The old one goes on, or serves again; whoever uses the device sees nothing of it."""
    body, reason = BROKEN[how]
    device = serve("memory", size=SIZE, queues=2, start_timeout=8)
    python = tmp_path / "python"
    if body is not None:
        python.write_text(FAKE.format(python=sys.executable, body=body.replace("DEV_ID", str(device.id))))
        python.chmod(0o755)
    with verifying(device):
        with pytest.raises(UblkdError, match=reason):
            endpoint.ask(device.id, 60, op="upgrade", python=str(python))
        assert alive(device.supervisor) and device.record["supervisor"]["pid"] == device.supervisor
        assert len(device.workers()) == 2 and all(alive(pid) for pid in device.workers())
    if how == "takes half of it":
        upgrade(device, "--start-timeout", "120")


def test_a_roll_back_waits_for_the_file(
    serve: Callable[..., Device], image: Callable[..., Path], tmp_path: Path
) -> None:
    """The workers of a new version that dies end after it, and hold its file until then."""
    backing = image(SIZE)
    device = serve("loop", backing, queues=1, start_timeout=8)
    python = tmp_path / "python"
    lock = f"import fcntl; f = open('{backing}'); fcntl.flock(f, fcntl.LOCK_EX); "
    body = READY + lock + "os.fork() and os._exit(3); channel.close(); time.sleep(1)"
    python.write_text(FAKE.format(python=sys.executable, body=body))
    python.chmod(0o755)
    with pytest.raises(UblkdError, match="exited with 3 before it was live"):
        endpoint.ask(device.id, 60, op="upgrade", python=str(python))
    assert device.state == "live" and device.record["supervisor"]["pid"] == device.supervisor
    pwrite(device.path, b"on", MIB)


def test_a_worker_dies_before_the_new_version_is_ready(serve: Callable[..., Device], tmp_path: Path) -> None:
    device = serve("memory", size=SIZE, queues=2, start_timeout=120)
    with upgrading(device, tmp_path / "python", "sleep 60\n") as s:
        wait_until(lambda: "upgrade asked for" in read(f"/run/ublkd/{device.id}.log"), "it begins")
        os.kill(device.workers()[0], signal.SIGKILL)
        assert "a worker died" in json.loads(s.recv(65536))["error"]
    wait_until(lambda: device.record["recoveries"] == 1, "the worker is replaced")
    assert device.state == "live"


def test_the_old_supervisor_is_killed_meanwhile(serve: Callable[..., Device], tmp_path: Path) -> None:
    """The new version, not handed the device yet, ends too; what is left can be recovered."""
    device = serve("memory", size=SIZE, queues=1, start_timeout=120)
    pwrite(device.path, b"kept", MIB)
    started = tmp_path / "started"
    script = f"touch {started}\nsleep 1\nexec {sys.executable} \"$@\"\n"
    with upgrading(device, tmp_path / "python", script):
        wait_until(started.exists, "the new version starts")
        device.kill_supervisor()
    time.sleep(4)
    assert device.state == "quiesced"
    assert cli("recover", device.id).status == 0
    device.supervisor = device.record["supervisor"]["pid"]
    forget(device.path)
    assert pread(device.path, 4, MIB) == b"kept"


def test_hangup_reads_the_configuration_again(serve: Callable[..., Device], tmp_path: Path) -> None:
    """In the foreground, where the process that was started stays until the device is gone."""
    config = tmp_path / "disk.toml"
    text = '[device]\ntarget = "memory"\nsize = "64M"\nnumber = 11\n[recovery]\nhang_timeout = 30\n'
    config.write_text(text)
    first = subprocess.Popen(
        [sys.executable, "-B", "-m", "ublkd", "run", "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert first.stdout and first.stdout.readline() == b"/dev/ublkb11\n"
        device = Device("/dev/ublkb11")
        assert device.supervisor == first.pid
        pwrite(device.path, b"kept", MIB)
        config.write_text(text.replace("64M", "32M"))
        os.kill(first.pid, signal.SIGHUP)
        time.sleep(2)
        assert device.record["supervisor"]["pid"] == first.pid, "a size is no live setting"
        config.write_text(text.replace("= 30", "= 9"))
        for pid in (first.pid, None):
            old = pid or device.record["supervisor"]["pid"]
            os.kill(old, signal.SIGHUP)
            wait_until(lambda old=old: device.record["supervisor"]["pid"] != old, "another one serves")  # type: ignore[misc]
        assert device.record["settings"]["hang_timeout"] == 9 and first.poll() is None
        wait_until(lambda: device.state == "live", "it is live")
        forget(device.path)
        assert pread(device.path, 4, MIB) == b"kept"
        first.send_signal(signal.SIGTERM)
        assert first.wait(timeout=60) == 0
        assert not os.path.exists(device.path) and not os.path.exists("/run/ublkd/11.json")
    finally:
        first.kill()
        said = first.communicate()[1].decode()
    assert "size can't change while the device is live" in said, said


def test_stop_during_an_upgrade(serve: Callable[..., Device], tmp_path: Path) -> None:
    device = serve("memory", size=SIZE, queues=1)
    started = tmp_path / "started"
    with upgrading(device, tmp_path / "python", f"touch {started}\nsleep 60\n"):
        wait_until(started.exists, "the new version starts")
        device.stop()
    assert device.state == "gone"


def test_nonsense_on_the_socket(serve: Callable[..., Device]) -> None:
    """It is refused, and who says nothing keeps nobody waiting."""
    device = serve("null", size=SIZE, queues=1)
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(12)]
    for s in silent:
        s.connect(endpoint.path_of(device.id))
        time.sleep(0.02)
    nonsense = [b"{", b"[]", b'{"protocol": 99}', b'{"protocol": 1}', b'{"protocol": 1, "op": []}', b"[" * 9000]
    for message in nonsense:
        with connected(device) as s:
            s.send(message)
            assert "error" in json.loads(s.recv(65536)), message
    for s in silent:
        s.close()
    assert oct(os.stat(endpoint.path_of(device.id)).st_mode & 0o777) == "0o600"
    upgrade(device)


def test_requests_in_flight_are_waited_for(serve: Callable[..., Device], tmp_path: Path) -> None:
    """And no longer: a worker that has answered what it had ends, whatever the driver still has of its tags."""
    gate = tmp_path / "gate"
    settings = {"queues": 2, "size": SIZE, "on_crash": "fail", "start_timeout": 60, "params": {"gate": str(gate)}}
    device = serve("python", f"{HERE}/lib/targets.py:Held", **settings)
    if not has("QUIESCE"):
        pytest.skip("this driver has no QUIESCE")
    pwrite(device.path, b"precious" * 512, MIB)
    forget(device.path)
    reader = direct_reader(device.path, MIB)
    wait_until(device.under_way, "the read is held")
    with connected(device) as s:
        s.settimeout(180)
        s.send(json.dumps({"protocol": endpoint.PROTOCOL, "op": "upgrade"}).encode())
        wait_until(lambda: device.said("quiesced"), "the device is quiesced", 60)
        assert reader.poll() is None
        gate.touch()
        assert "error" not in json.loads(s.recv(65536))
    assert reader.communicate(timeout=60)[0] == b"precious" * 512
    device.supervisor = device.record["supervisor"]["pid"]
    assert not device.said("worker killed")


def test_too_busy_without_quiesce(serve: Callable[..., Device], tmp_path: Path) -> None:
    """Where requests in flight would fail, the old server goes on; so it does where they can be waited for."""
    gate = tmp_path / "gate"
    settings = {"queues": 1, "size": SIZE, "on_crash": "fail", "start_timeout": 8, "params": {"gate": str(gate)}}
    device = serve("python", f"{HERE}/lib/targets.py:Held", **settings)
    pwrite(device.path, b"precious" * 512, MIB)
    forget(device.path)
    reader = direct_reader(device.path, MIB)
    wait_until(device.under_way, "the read is held")
    if not has("QUIESCE"):
        done = cli("upgrade", device.id)
        assert done.status == 1 and "no queue was without a request for 8 seconds" in done.err
        assert device.record["supervisor"]["pid"] == device.supervisor and reader.poll() is None
    gate.touch()
    assert reader.communicate(timeout=60)[0] == b"precious" * 512
    upgrade(device, "--start-timeout", "120")
