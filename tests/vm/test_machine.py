# SPDX-License-Identifier: Apache-2.0
"""What scripts/vm promises, on real kernels."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vm.outcome import CANNOT_START, DIRTY, HANG, LOST, PANIC

pytestmark = pytest.mark.vm

VM = str(Path(__file__).resolve().parents[2] / "scripts" / "vm")
PATIENCE = 200


def vm(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/vm to its end."""
    null = subprocess.DEVNULL
    return subprocess.run([VM, *arguments], stdin=null, capture_output=True, text=True, timeout=PATIENCE)


def started(*arguments: str) -> subprocess.Popen[str]:
    """Start scripts/vm with a command that prints a line first, and return once that has arrived."""
    process = subprocess.Popen(
        [VM, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background with the interrupt ignored, these tests included.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout and process.stdout.readline(), process.communicate()[1]
    return process


@contextlib.contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Leave no machine behind when a check fails."""
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def qemu_of(process: subprocess.Popen[str]) -> int:
    """The process id of the QEMU that a scripts/vm runs."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in map(int, children):
        if "qemu" in os.readlink(f"/proc/{child}/exe"):
            return child
    raise AssertionError(f"{process.pid} runs no QEMU")


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


EVERYTHING = r"""
set -e
echo "kernel $(uname -r) in $PWD as $(id -u)"
echo "to stderr" >/dev/stderr
set -- $UBLKD_VM_DISKS
for disk; do
    name=${disk#/dev/}
    discard=$(cat /sys/block/$name/queue/discard_max_bytes)
    echo "disk $(blockdev --getsize64 $disk) $(blockdev --getss $disk) $discard"
done
blkdiscard $2
echo kept >"$UBLKD_VM_SHARE/result"
echo gone >"$HOME/ublkd-vm-test-file"
test -c /dev/ublk-control
modprobe -a null_blk loop dm-mod xfs
udevadm settle
test -b /dev/nullb0 -a -d /sys/kernel/tracing/events -a -d /sys/fs/cgroup/ -a -d /sys/kernel/debug/block
echo "$GIVEN ${NOT_GIVEN-unset} $(sed -n 's/^SigIgn:[[:space:]]*//p' /proc/$$/status)"
sleep 1000 &
exit 3
"""


def test_command_runs_as_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOT_GIVEN", "seen")
    log = tmp_path / "log"
    disks = ["--disk", "64M", "--disk", "1G,sector=4096,discard"]
    options = ["--share", str(tmp_path), "--log", str(log), "--env", "GIVEN=here"]
    done = vm("6.12", *disks, *options, "--", "sh", "-c", EVERYTHING)
    assert done.returncode == 3, done.stderr
    first, plain, discarding, variables = done.stdout.splitlines()
    assert re.fullmatch(rf"kernel 6\.12\.\S+ in {re.escape(os.getcwd())} as 0", first)
    assert plain == f"disk {64 << 20} 512 0"
    assert re.fullmatch(rf"disk {1 << 30} 4096 [1-9]\d+", discarding)
    assert variables == "here unset 0000000000000000"
    assert "to stderr" in done.stderr and re.search(r"^vm: kernel 6\.12\.", done.stderr, re.MULTILINE)
    assert (tmp_path / "result").read_text() == "kept\n"
    assert "Linux version 6.12" in (tmp_path / "dmesg.txt").read_text()
    assert (tmp_path / "log.dmesg").read_text().rstrip().splitlines()[-1].startswith("[")
    assert not Path("~/ublkd-vm-test-file").expanduser().exists()


def test_newest_kernel_has_ublk() -> None:
    done = vm("newest", "--require-ublk", "--", "uname", "-r")
    assert done.returncode == 0, done.stderr
    assert tuple(map(int, done.stdout.split(".")[:2])) >= (7, 2)


def test_missing_driver_is_said_when_it_is_required() -> None:
    done = vm("6.12", "--no-ublk", "--require-ublk", "--", "true")
    assert done.returncode == CANNOT_START
    assert "has no ublk driver" in done.stderr


def test_output_is_complete_and_unchanged() -> None:
    script = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 20000)"
    command = [VM, "6.12", "--", "python3", "-c", script]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
    assert done.stdout == bytes(range(256)) * 20000


def test_panic_is_told_apart(tmp_path: Path) -> None:
    # What is still in the guest's pipe goes down with it, so the panic waits until the line is here.
    wait = "until ls $UBLKD_VM_SHARE | grep -q go; do sleep 0.1; done"
    script = f"echo before; {wait}; echo c >/proc/sysrq-trigger; sleep 60"
    process = started("6.12", "--share", str(tmp_path), "--", "sh", "-c", script)
    with ended(process):
        (tmp_path / "go").touch()
        _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == PANIC
    assert "vm: the guest kernel panicked" in error
    assert "sysrq triggered crash" in error


def test_hang_is_told_apart_and_shows_what_ran() -> None:
    done = vm("6.12", "--timeout", "3", "--", "sh", "-c", "echo before; sleep 1234")
    assert done.returncode == HANG
    assert done.stdout == "before\n"
    assert "still running after 3 s" in done.stderr
    assert "sleep 1234" in done.stderr


def test_lost_machine_is_told_apart() -> None:
    process = started("6.12", "--", "sh", "-c", "echo ready; sleep 1234")
    with ended(process):
        os.kill(qemu_of(process), signal.SIGKILL)
        _, error = process.communicate(timeout=60)
    assert process.returncode == LOST
    assert "vm: the VM ended without a status" in error


def test_dirty_kernel_log_fails_a_passing_command() -> None:
    fake = "WARNING: CPU: 0 PID: 1 at drivers/block/ublk_drv.c:1 ublk_fake+0x1/0x2"
    done = vm("6.12", "--", "sh", "-c", f"echo '{fake}' >/dev/kmsg")
    assert done.returncode == DIRTY
    assert fake in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_machine_ends_with_its_runner(number: signal.Signals) -> None:
    process = started("6.12", "--", "sh", "-c", "echo ready; sleep 1234")
    with ended(process):
        qemu = qemu_of(process)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert "Traceback" not in error
    wait_until_gone(qemu)


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


def read_until(descriptor: int, wanted: bytes) -> bytes:
    seen = b""
    deadline = time.monotonic() + PATIENCE
    while wanted not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([descriptor], [], [], 1)[0]:
            seen += os.read(descriptor, 4096)
    return seen


def test_shell_has_a_terminal(terminal: tuple[int, int]) -> None:
    master, slave = terminal
    process = subprocess.Popen([VM, "6.12"], stdin=slave, stdout=slave, stderr=slave)
    with ended(process):
        os.write(master, b"tty; sleep 1234\r")
        read_until(master, b"/dev/hvc0")
        deadline = time.monotonic() + PATIENCE
        # Ctrl-C also drops what follows it too closely: try until it took
        while process.poll() is None and time.monotonic() < deadline:
            os.write(master, b"\x03")
            time.sleep(1)
            os.write(master, b"exit $((4 + 3))\r")
            time.sleep(1)
        assert process.wait(1) == 7
