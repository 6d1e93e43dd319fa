# SPDX-License-Identifier: Apache-2.0
"""What can be measured. A new one is a class with setup() and a place in SUBJECTS."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from .system import BenchError, Lab, block, module_exists, run, wait_for, write

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[1]
DEPTH = 128


class Subject:
    """A disk that is measured. One instance serves one run."""

    name = ""
    title = ""
    against: tuple[str, ...] = ()  # what the report compares it with
    stores = True  # whether it keeps what is written

    def missing(self) -> str:
        """Why it can't be had here, or nothing."""
        return ""

    def setup(self, lab: Lab) -> str:
        """The device's path. Whatever it takes to undo this goes to lab.later()."""
        raise NotImplementedError

    def pids(self) -> list[int]:
        """The processes that serve it."""
        return []


def ublkd() -> Path:
    """The command of this checkout, or the one that is installed."""
    places = [str(TOP / ".venv" / "bin"), os.environ.get("PATH", "")]
    found = shutil.which("ublkd", path=os.pathsep.join(places))
    if found is None:
        raise BenchError("ublkd is not built: run scripts/setup bench")
    return Path(found)


def add_device(lab: Lab, *arguments: str | Path) -> dict[str, Any]:
    """A device of ublkd, as `ublkd show` has it, for as long as the lab is open."""
    path = run(ublkd(), "add", *arguments, "--depth", str(DEPTH), "--no-partscan").strip()
    lab.later(run, ublkd(), "del", "--force", path)
    shown: dict[str, Any] = json.loads(run(ublkd(), "show", path, "--json"))
    return shown


class Ublkd(Subject):
    """One of ublkd's targets with one queue."""

    shown: dict[str, Any]

    def arguments(self, lab: Lab) -> list[str | Path]:
        """For `ublkd add`."""
        raise NotImplementedError

    def missing(self) -> str:
        return "" if Path("/dev/ublk-control").exists() else "there is no ublk driver: modprobe ublk_drv"

    def setup(self, lab: Lab) -> str:
        self.shown = add_device(lab, *self.arguments(lab), "--queues", "1")
        path: str = self.shown["path"]
        return path

    def pids(self) -> list[int]:
        return [self.shown["supervisor"], *(worker["pid"] for worker in self.shown["workers"])]


class Null(Ublkd):
    name = "null"
    title = "ublkd null (reads give zeroes)"
    against = ("null_blk",)
    stores = False

    def arguments(self, lab: Lab) -> list[str | Path]:
        return ["null", "--size", str(lab.span)]


class NullNoZero(Null):
    name = "null-no-zero"
    title = "ublkd null --no-zero (as null_blk does it)"

    def arguments(self, lab: Lab) -> list[str | Path]:
        return [*super().arguments(lab), "--no-zero"]


class Memory(Ublkd):
    name = "memory"
    title = "ublkd memory"
    against = ("brd",)

    def arguments(self, lab: Lab) -> list[str | Path]:
        return ["memory", "--size", str(lab.span)]


class Loop(Ublkd):
    name = "loop"
    title = "ublkd loop, direct, on ext4 on brd"
    against = ("kernel-loop",)

    def arguments(self, lab: Lab) -> list[str | Path]:
        return ["loop", lab.backing_file("ublkd.img"), "--direct"]


class NullBatched(NullNoZero):
    name = "null-batched"
    title = "ublkd null --no-zero --batch on"

    def arguments(self, lab: Lab) -> list[str | Path]:
        return [*super().arguments(lab), "--batch", "on"]


class MemoryBatched(Memory):
    name = "memory-batched"
    title = "ublkd memory --batch on"

    def arguments(self, lab: Lab) -> list[str | Path]:
        return [*super().arguments(lab), "--batch", "on"]


class LoopBatched(Loop):
    name = "loop-batched"
    title = "ublkd loop --batch on, direct, on ext4 on brd"

    def arguments(self, lab: Lab) -> list[str | Path]:
        return ["loop", lab.backing_file("batched.img"), "--direct", "--batch", "on"]


class PythonRam(Ublkd):
    name = "python"
    title = "ublkd python, configs/examples/ram_disk.py"
    against = ("memory", "nbdkit-python")

    def arguments(self, lab: Lab) -> list[str | Path]:
        return ["python", f"{TOP / 'configs' / 'examples' / 'ram_disk.py'}:RamDisk", "--size", str(lab.span)]


class NullBlk(Subject):
    name = "null_blk"
    title = "kernel null_blk"
    stores = False

    def missing(self) -> str:
        return "" if module_exists("null_blk") else "this kernel has no null_blk"

    def setup(self, lab: Lab) -> str:
        lab.module("null_blk", "nr_devices=0")
        directory = Path("/sys/kernel/config/nullb")
        if not directory.exists():
            run("mount", "-t", "configfs", "none", directory.parent)
            lab.later(run, "umount", directory.parent)
        device = directory / "ublkdbench"
        device.mkdir()
        lab.later(device.rmdir)
        settings = {"size": lab.span >> 20, "submit_queues": 1, "hw_queue_depth": DEPTH, "queue_mode": 2}
        for name, value in (*settings.items(), ("power", 1)):
            write(device / name, str(value))
        # newer kernels take the name from the directory
        names = (device.name, f"nullb{(device / 'index').read_text().strip()}")
        return next(f"/dev/{name}" for name in names if block(name).exists())


class Brd(Subject):
    name = "brd"
    title = "kernel brd (RAM disk, no queue, no server)"

    def missing(self) -> str:
        return "" if module_exists("brd") else "this kernel has no brd"

    def setup(self, lab: Lab) -> str:
        return lab.ram_disk(0)


class KernelLoop(Subject):
    name = "kernel-loop"
    title = "kernel loop, direct, on ext4 on brd"

    def missing(self) -> str:
        return "" if module_exists("loop") and module_exists("brd") else "this kernel has no loop or no brd"

    def setup(self, lab: Lab) -> str:
        image = lab.backing_file("kernel.img")
        lab.module("loop", "max_loop=0")
        device = run("losetup", "--find", "--show", "--direct-io=on", image).strip()
        lab.later(run, "losetup", "--detach", device)
        if (block(device) / "loop" / "dio").read_text().strip() != "1":
            raise BenchError(f"{device} took no direct I/O on {image}")
        return device


class NbdkitPython(Subject):
    name = "nbdkit-python"
    title = "nbdkit's Python plugin over a Unix socket and nbd"

    def missing(self) -> str:
        if not (shutil.which("nbdkit") and shutil.which("nbd-client")):
            return "nbdkit is missing: apt-get install nbdkit nbdkit-plugin-python nbd-client"
        if subprocess.run(["nbdkit", "--dump-plugin", "python"], capture_output=True).returncode:
            return "nbdkit has no Python plugin: apt-get install nbdkit-plugin-python"
        return "" if module_exists("nbd") else "this kernel has no nbd"

    def setup(self, lab: Lab) -> str:
        socket = lab.directory / "nbdkit"
        script = HERE / "nbdkit_ram_disk.py"
        command = ["nbdkit", "-f", "--exit-with-parent", "-U", str(socket), "python", str(script)]
        self.server = subprocess.Popen([*command, f"size={lab.span}"], stdin=subprocess.DEVNULL)
        lab.later(self.server.wait)
        lab.later(self.server.terminate)
        wait_for("the start of nbdkit", lambda: socket.exists() or self.server.poll() is not None)
        lab.module("nbd", "nbds_max=1", "max_part=0")
        device = self._free_device()
        run("nbd-client", "-unix", socket, device, "-b", "512")
        lab.later(wait_for, f"the end of {device}", lambda: not (block(device) / "pid").exists())
        lab.later(run, "nbd-client", "-d", device)
        size = block(device) / "size"
        wait_for(f"the start of {device}", lambda: int(size.read_text()) == lab.span // 512)
        return device

    @staticmethod
    def _free_device() -> str:
        for path in sorted(Path("/sys/block").glob("nbd*")):
            if not (path / "pid").exists():
                return f"/dev/{path.name}"
        raise BenchError("all nbd devices are in use: free one (nbd-client -d)")

    def pids(self) -> list[int]:
        return [self.server.pid]


SUBJECTS: dict[str, type[Subject]] = {
    subject.name: subject
    for subject in (
        Null,
        NullNoZero,
        NullBatched,
        NullBlk,
        Memory,
        MemoryBatched,
        Brd,
        Loop,
        LoopBatched,
        KernelLoop,
        PythonRam,
        NbdkitPython,
    )
}
