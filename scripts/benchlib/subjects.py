# SPDX-License-Identifier: Apache-2.0
"""What can be measured. A new one is a class with setup() and a place in SUBJECTS."""

from __future__ import annotations

import fnmatch
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from . import kublk
from .system import BenchError, Lab, block, drop_caches, module_exists, run, wait_for, write

HERE = Path(__file__).resolve().parent
TOP = HERE.parents[1]
DEPTH = 128


class Subject:
    """A disk that is measured. One instance serves one run."""

    name = ""
    title = ""
    # what the report compares it with; NAME* is the best of several, cell by cell
    against: tuple[str, ...] = ()
    stores = True  # whether it keeps what is written
    queues = 1
    image: Path | None = None  # the file behind it
    caches = False  # whether that is to be in the page cache

    def missing(self) -> str:
        """Why it can't be had here, or nothing."""
        return ""

    def setup(self, lab: Lab) -> str:
        """The device's path. Whatever it takes to undo this goes to lab.later()."""
        raise NotImplementedError

    def pids(self) -> list[int]:
        """The processes that serve it."""
        return []

    def last_words(self) -> str:
        """What its server said before it failed, if that is known."""
        return ""

    def make_image(self, lab: Lab) -> Path:
        """The file behind it, filled."""
        self.image = lab.backing_file(f"{self.name}-{self.queues}.img")
        return self.image

    def reset_page_cache(self) -> None:
        """Nothing in it but the backing file, where that is to be: its folios are then those of a read, for all alike.

        What was written through a disk has them as large as its requests.
        """
        drop_caches()
        if self.caches and self.image:
            run("dd", f"if={self.image}", "of=/dev/null", "bs=1M", "status=none")


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
        self.shown = add_device(lab, *self.arguments(lab), "--queues", str(self.queues))
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
    against = ("null_blk", "kublk-null*", "ublksrv-null*", "rublk-null*")

    def arguments(self, lab: Lab) -> list[str | Path]:
        return [*super().arguments(lab), "--no-zero"]


class Memory(Ublkd):
    name = "memory"
    title = "ublkd memory"
    against = ("brd", "nbdkit-memory")

    def arguments(self, lab: Lab) -> list[str | Path]:
        return ["memory", "--size", str(lab.span)]


class Loop(Ublkd):
    name = "loop"
    title = "ublkd loop, direct, on ext4 on brd"
    against = ("kernel-loop", "kublk-loop*", "ublksrv-loop*", "rublk-loop*", "qemu-nbd")

    def arguments(self, lab: Lab) -> list[str | Path]:
        return ["loop", self.make_image(lab), "--direct"]


class LoopBuffered(Ublkd):
    name = "loop-buffered"
    title = "ublkd loop through the page cache, on ext4 on brd"
    against = ("kernel-loop-buffered",)
    caches = True

    def arguments(self, lab: Lab) -> list[str | Path]:
        return ["loop", self.make_image(lab), "--buffered"]


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
        return [*super().arguments(lab), "--batch", "on"]


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
        device = directory / f"ublkdbench{self.queues}"
        device.mkdir()
        lab.later(device.rmdir)
        settings = {"size": lab.span >> 20, "hw_queue_depth": DEPTH, "queue_mode": 2, "submit_queues": self.queues}
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
    direct = True

    def missing(self) -> str:
        return "" if module_exists("loop") and module_exists("brd") else "this kernel has no loop or no brd"

    def setup(self, lab: Lab) -> str:
        image = self.make_image(lab)
        lab.module("loop", "max_loop=0")
        wanted = "on" if self.direct else "off"
        device = run("losetup", "--find", "--show", f"--direct-io={wanted}", image).strip()
        lab.later(run, "losetup", "--detach", device)
        if (block(device) / "loop" / "dio").read_text().strip() != str(int(self.direct)):
            raise BenchError(f"{device} has direct I/O on {image} other than {wanted}")
        return device


class KernelLoopBuffered(KernelLoop):
    name = "kernel-loop-buffered"
    title = "kernel loop through the page cache, on ext4 on brd"
    direct = False
    caches = True


class Peer(Subject):
    """Another ublk server: their command lines differ little, and what they print even less."""

    program = ""
    words: tuple[str, ...] = ()  # after "add", without the number of queues
    on_file = False
    pid = 0

    def path(self) -> str:
        """Of its program; BenchError if it is missing."""
        found = shutil.which(self.program)
        if not found:
            raise BenchError(f"there is no {self.program} on PATH")
        return found

    def missing(self) -> str:
        if not Path("/dev/ublk-control").exists():
            return "there is no ublk driver: modprobe ublk_drv"
        try:
            self.path()
        except BenchError as error:
            return str(error)
        return ""

    def setup(self, lab: Lab) -> str:
        number, self.pid = added(self.add(lab))
        lab.later(run, self.path(), "del", "-n", str(number))
        device = f"/dev/ublkb{number}"
        wait_for(f"the start of {device}", Path(device).exists)
        return device

    def add(self, lab: Lab) -> str:
        """What it prints once the device is there."""
        return run(self.path(), "add", *self.arguments(lab))

    def arguments(self, lab: Lab) -> list[str | Path]:
        """After "add"."""
        return [*self.words, "-q", str(self.queues), "-d", str(DEPTH), *self.file(lab)]

    def file(self, lab: Lab) -> list[str | Path]:
        """How the file is named."""
        return ["-f", self.make_image(lab)] if self.on_file else []

    def pids(self) -> list[int]:
        return [self.pid]


def added(text: str) -> tuple[int, int]:
    """Number of the device and pid of its server, as these servers print them."""
    number, pid = re.search(r"dev id (\d+)", text), re.search(r"daemon pid (\d+)", text)
    if not number or not pid:
        raise BenchError(f"it added no device but said: {' '.join(text.split())[:200] or 'nothing'}")
    return int(number[1]), int(pid[1])


class Kublk(Peer):
    program = "kublk"
    server: subprocess.Popen[bytes] | None = None

    def path(self) -> str:
        found, reason = kublk.find(platform.release())
        if not found:
            raise BenchError(reason)
        return found

    def add(self, lab: Lab) -> str:
        # in the background it closes stdout and goes on writing to whatever file gets that number next
        self.log = log = lab.directory / f"{self.name}-{self.queues}.log"
        command = [self.path(), "add", "--foreground", *map(str, self.arguments(lab))]
        with log.open("w") as output:
            # a session of its own, as all the others that go to the background by themselves have
            self.server = server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        lab.later(server.wait)
        wait_for("the start of kublk", lambda: "daemon pid" in log.read_text() or server.poll() is not None)
        return log.read_text()

    def last_words(self) -> str:
        if self.server is None or self.server.poll() is None:
            return ""
        lines = self.log.read_text().strip().splitlines()
        return f"kublk ended with status {self.server.poll()}: {lines[-1] if lines else 'nothing said'}"

    def file(self, lab: Lab) -> list[str | Path]:
        return [self.make_image(lab)] if self.on_file else []


class KublkNull(Kublk):
    name = "kublk-null"
    title = "the kernel selftest's server, null, per tag, the kernel copies"
    words = ("-t", "null")
    stores = False


class KublkNullZeroCopy(KublkNull):
    name = "kublk-null-zc"
    title = "the kernel selftest's server, null --auto_zc"
    words = ("-t", "null", "--auto_zc")


class KublkNullBatch(KublkNull):
    name = "kublk-null-batch"
    title = "the kernel selftest's server, null --batch, the kernel copies"
    words = ("-t", "null", "--batch")


class KublkNullBatchZeroCopy(KublkNull):
    name = "kublk-null-batch-zc"
    title = "the kernel selftest's server, null --batch --auto_zc"
    words = ("-t", "null", "--batch", "--auto_zc")


class KublkLoop(Kublk):
    name = "kublk-loop-zc"
    title = "the kernel selftest's server, loop --auto_zc, direct, on ext4 on brd"
    words = ("-t", "loop", "--auto_zc")
    on_file = True


class KublkLoopBatch(KublkLoop):
    name = "kublk-loop-batch"
    title = "the kernel selftest's server, loop --batch, the kernel copies, direct, on ext4 on brd"
    words = ("-t", "loop", "--batch")


class KublkLoopBatchZeroCopy(KublkLoop):
    name = "kublk-loop-batch-zc"
    title = "the kernel selftest's server, loop --batch --auto_zc, direct, on ext4 on brd"
    words = ("-t", "loop", "--batch", "--auto_zc")


class UblksrvNull(Peer):
    name = "ublksrv-null"
    title = "ublksrv null, the kernel copies"
    program = "ublk"
    words = ("-t", "null")
    stores = False


class UblksrvNullZeroCopy(UblksrvNull):
    name = "ublksrv-null-zc"
    title = "ublksrv null, zero copy"
    words = ("-t", "null", "-z")


class UblksrvLoop(UblksrvNull):
    name = "ublksrv-loop-zc"
    title = "ublksrv loop, zero copy, direct, on ext4 on brd"
    words = ("-t", "loop", "-z")
    stores = True
    on_file = True


class RublkNull(Peer):
    name = "rublk-null"
    title = "rublk null, the kernel copies"
    program = "rublk"
    words = ("null",)
    stores = False


class RublkNullZeroCopy(RublkNull):
    name = "rublk-null-zc"
    title = "rublk null, zero copy"
    words = ("null", "-z")


class RublkLoop(RublkNull):
    name = "rublk-loop-zc"
    title = "rublk loop, zero copy, direct, on ext4 on brd"
    words = ("loop", "-z")
    stores = True
    on_file = True


class Nbd(Subject):
    """A server that the kernel's nbd client talks to over a Unix socket."""

    programs: tuple[str, ...] = ()

    def command(self, lab: Lab, socket: Path) -> list[str | Path]:
        """What serves it, in the foreground."""
        raise NotImplementedError

    def missing(self) -> str:
        for program in (*self.programs, "nbd-client"):
            if not shutil.which(program):
                return f"{program} is missing: run scripts/setup bench"
        return "" if module_exists("nbd") else "this kernel has no nbd"

    def setup(self, lab: Lab) -> str:
        socket = lab.directory / f"{self.name}.socket"
        command = self.command(lab, socket)
        self.server = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL)
        lab.later(self.server.wait)
        lab.later(self.server.terminate)
        wait_for(f"the start of {self.programs[0]}", lambda: socket.exists() or self.server.poll() is not None)
        lab.module("nbd", "nbds_max=8", "max_part=0")
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


class NbdkitPython(Nbd):
    name = "nbdkit-python"
    title = "nbdkit's Python plugin over a Unix socket and nbd"
    programs = ("nbdkit",)

    def missing(self) -> str:
        reason = super().missing()
        if not reason and subprocess.run(["nbdkit", "--dump-plugin", "python"], capture_output=True).returncode:
            return "nbdkit has no Python plugin: run scripts/setup bench"
        return reason

    def command(self, lab: Lab, socket: Path) -> list[str | Path]:
        plugin = ["python", HERE / "nbdkit_ram_disk.py", f"size={lab.span}"]
        return ["nbdkit", "-f", "--exit-with-parent", "-U", socket, *plugin]


class NbdkitMemory(Nbd):
    name = "nbdkit-memory"
    title = "nbdkit's memory plugin over a Unix socket and nbd"
    programs = ("nbdkit",)

    def command(self, lab: Lab, socket: Path) -> list[str | Path]:
        return ["nbdkit", "-f", "--exit-with-parent", "-U", socket, "memory", f"size={lab.span}"]


class QemuNbd(Nbd):
    name = "qemu-nbd"
    title = "qemu-nbd (direct, io_uring) over a Unix socket and nbd, on ext4 on brd"
    programs = ("qemu-nbd",)

    def command(self, lab: Lab, socket: Path) -> list[str | Path]:
        how = ["--persistent", "--format=raw", "--cache=none", "--aio=io_uring"]
        return ["qemu-nbd", *how, f"--socket={socket}", self.make_image(lab)]


SUBJECTS: dict[str, type[Subject]] = {
    subject.name: subject
    for subject in (
        Null,
        NullNoZero,
        NullBatched,
        NullBlk,
        KublkNull,
        KublkNullZeroCopy,
        KublkNullBatch,
        KublkNullBatchZeroCopy,
        UblksrvNull,
        UblksrvNullZeroCopy,
        RublkNull,
        RublkNullZeroCopy,
        Memory,
        MemoryBatched,
        Brd,
        NbdkitMemory,
        Loop,
        LoopBatched,
        KernelLoop,
        KublkLoop,
        KublkLoopBatch,
        KublkLoopBatchZeroCopy,
        UblksrvLoop,
        RublkLoop,
        QemuNbd,
        LoopBuffered,
        KernelLoopBuffered,
        PythonRam,
        NbdkitPython,
    )
}


def expand(pattern: str) -> list[str]:
    """The subjects that a name of Subject.against stands for."""
    return fnmatch.filter(SUBJECTS, pattern)
