# SPDX-License-Identifier: Apache-2.0
"""What a test may not leave behind: found, named, and removed so that the next test starts fresh."""

from __future__ import annotations

import glob
import os
import signal
import time
from pathlib import Path

from ublkd import inventory
from ublkd.control.commands import Control
from ublkd.errors import DriverError
from vm import dmesg

SETTLE_S = 30.0


class KernelLog:
    """The kernel's messages from the creation of this object on."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)

    def news(self) -> list[str]:
        """The lines since the last call."""
        lines: list[str] = []
        while True:
            try:
                lines += dmesg.format_records(os.read(self._fd, 16384).decode(errors="replace"))
            except BlockingIOError:
                return lines
            except BrokenPipeError:
                continue  # the log overtook us; the next read goes on with what is left

    def close(self) -> None:
        """No more news."""
        os.close(self._fd)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def processes() -> dict[int, str]:
    """Living processes of ublkd, and children of this one: pid -> name."""
    found = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        pid = int(entry)
        try:
            state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state not in "ZX" and (int(parent) == os.getpid() or _name(pid).startswith("ublkd-")):
            found[pid] = _name(pid)
    return found


def _mounts() -> list[str]:
    lines = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return [fields[1] for fields in lines if fields[0].startswith(("/dev/ublkb", "/dev/loop"))]


def _loops() -> list[str]:
    return [f"/dev/{path.split('/')[3]}" for path in glob.glob("/sys/block/loop*/loop/backing_file")]


def _nodes() -> list[str]:
    return sorted(glob.glob("/dev/ublkb*") + glob.glob("/dev/ublkc*"))


def _files() -> list[str]:
    return sorted(glob.glob("/dev/shm/ublkd-*") + glob.glob("/run/ublkd/*"))


def _present() -> list[str]:
    return [
        *(f"process {pid} ({name})" for pid, name in processes().items()),
        *(f"mount {path}" for path in _mounts()),
        *_loops(),
        *_nodes(),
        *_files(),
    ]


def find() -> list[str]:
    """What is still there after a moment's grace: the end of a process may take one."""
    deadline = time.monotonic() + SETTLE_S
    while (left := _present()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def clean() -> None:
    """Remove it all, by force."""
    for path in _mounts():
        os.system(f"umount -l {path}")
    for pid in processes():
        os.kill(pid, signal.SIGKILL)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass
    for path in _loops():
        os.system(f"losetup -d {path}")
    try:
        with Control(timeout=10) as ctl:
            for dev_id in sorted(inventory._kernel_ids()):
                for command in (ctl.stop_dev, ctl.del_dev):
                    try:
                        command(dev_id)
                    except DriverError as e:
                        print(f"cleaning up: {e}")
    except DriverError as e:
        print(f"cleaning up: {e}")
    for path in _files():
        os.unlink(path)


def stacks() -> str:
    """Where every process of ublkd, and every child of ours, is in the kernel."""
    lines = []
    for pid, name in processes().items():
        for task in sorted(glob.glob(f"/proc/{pid}/task/*")):
            try:
                state = Path(f"{task}/stat").read_text().rpartition(")")[2].split()[0]
                where = Path(f"{task}/wchan").read_text()
                stack = Path(f"{task}/stack").read_text()
            except OSError:
                continue
            lines += [f"{name} pid {pid} task {task.rpartition('/')[2]} state {state} in {where}"]
            lines += [f"    {line}" for line in stack.splitlines()]
    for path in glob.glob("/run/ublkd/*.log"):
        lines += [f"{path}:", *(f"    {line}" for line in Path(path).read_text().splitlines()[-20:])]
    return "\n".join(lines)
