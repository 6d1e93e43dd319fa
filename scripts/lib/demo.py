# SPDX-License-Identifier: Apache-2.0
"""The demonstration: a file becomes a disk, is used as one, is checked, and goes away. See scripts/demo.

Needs root. Every figure that it prints at the end was read from the run. The first thing that is not as it
should be ends it, with what that was and the log.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

from ublkd import __version__, inventory
from ublkd.shm import reader

UBLKD = str(Path(sys.executable).with_name("ublkd"))
IMAGE_BYTES = 256 << 20
QUEUES = 2
FIO_BYTES = 12 << 20  # per job; there is a job per queue
TREE = Path("/usr/include/linux")
MIB = 1 << 20


class Failure(Exception):
    """Something is not as it should be."""


def run(*command: object, limit: float = 300) -> str:
    """Standard output of a command that has to succeed."""
    words = [str(word) for word in command]
    name = os.path.basename(words[0])
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, errors = process.communicate(timeout=limit)
    except BaseException as error:
        end(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise Failure(f"{name} was still running after {limit:.0f} seconds") from None
        raise
    if process.returncode:
        text = (errors.strip() or output.strip())[-4000:]
        raise Failure(f"{name} ended with status {process.returncode}\n{text}".strip())
    return output


def end(process: subprocess.Popen[str]) -> None:
    """Interrupt a command, with time to undo what it has begun."""
    process.send_signal(signal.SIGINT)
    try:
        process.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def ublkd(*words: object) -> str:
    return run(UBLKD, *words)


def expect(true: object, otherwise: str) -> None:
    if not true:
        raise Failure(otherwise)


def step(what: str) -> None:
    print(f"\n\N{BULLET} {what}" if sys.stdout.encoding.lower() == "utf-8" else f"\n* {what}", flush=True)


def show(command: str) -> None:
    """A command as a user would type it in the directory of the image."""
    print(f"    $ {command}", flush=True)


def tell(output: str) -> None:
    for line in output.rstrip().splitlines():
        print(f"    {line}".rstrip(), flush=True)


def shown(*command: object, given: str = "") -> str:
    """run() with the command printed before and its output after; `given` is the command as it is printed."""
    show(given or " ".join(os.path.basename(str(word)) if word == UBLKD else str(word) for word in command))
    output = run(*command)
    tell(output)
    return output


def mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f} MiB"


def checksums(top: Path) -> dict[str, str]:
    """SHA-256 of every regular file below top, by relative path."""
    return {
        str(path.relative_to(top)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(top.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def blocks_bytes(path: Path) -> int:
    """What a file takes of its file system."""
    return path.stat().st_blocks * 512


class Demo:
    """One run. `with` cleans up, whatever happened."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.dir = Path(tempfile.mkdtemp(prefix="ublkd-demo-"))
        self.image = self.dir / "disk.img"
        self.mount = self.dir / "mnt"
        self.device: dict[str, Any] = {}
        self.account: list[tuple[str, str]] = []

    def __enter__(self) -> Demo:
        return self

    def __exit__(self, *_: object) -> None:
        # A second Ctrl-C must not leave half of it behind.
        for sig in (signal.SIGINT, signal.SIGTERM):
            signal.signal(sig, signal.SIG_IGN)
        if os.path.ismount(self.mount):
            subprocess.run(["umount", "--lazy", str(self.mount)], check=False)
        # By its backing: the device may have come after the interrupt.
        for device in self.find():
            with contextlib.suppress(Failure):
                ublkd("del", "--force", device["id"])
        shutil.rmtree(self.dir, ignore_errors=True)

    def find(self) -> list[dict[str, Any]]:
        """Our device as `ublkd list` has it; empty if there is none."""
        return [device for device in inventory.devices() if device["backing"] == str(self.image)]

    def note(self, what: str, text: str) -> None:
        self.account.append((what, text))

    def log(self) -> str:
        """The last lines of what ublkd logged of the device."""
        try:
            return "\n".join(Path(f"/run/ublkd/{self.device['id']}.log").read_text().splitlines()[-20:])
        except (KeyError, OSError):
            return ""

    # The steps

    def serve(self) -> None:
        step(f"A sparse file of {IMAGE_BYTES // MIB} MiB becomes a disk with {QUEUES} queues")
        show(f"truncate -s {IMAGE_BYTES // MIB}M disk.img")
        with open(self.image, "wb") as file:
            file.truncate(IMAGE_BYTES)
        words = ("add", "loop", self.image, "-q", QUEUES)
        path = shown(UBLKD, *words, given=f"ublkd add loop disk.img -q {QUEUES}").strip()
        shown(UBLKD, "list")
        self.device = device = self.find()[0]
        expect(device["path"] == path, f"the device is {device['path']}")
        expect(device["state"] == "live", f"the device is {device['state']}, not live")
        expect(device["size"] == IMAGE_BYTES, f"the device has {device['size']} bytes, not {IMAGE_BYTES}")
        wanted = min(QUEUES, os.cpu_count() or 1)
        expect(device["queues"] == wanted, f"the device has {device['queues']} queues, not {wanted}")
        record = inventory.read_record(device["id"]) or {}
        expect(record, "the device has no record")
        direct = "direct" if record["details"]["direct"] else "buffered"
        cpus = " and ".join(str(worker["cpu"]) for worker in device["workers"])
        self.note(
            "served",
            f"a file of {IMAGE_BYTES // MIB} MiB as {path}: {device['queues']} queues, "
            f"a worker process each on CPU {cpus}, {direct} I/O",
        )

    def verify(self) -> None:
        queues = self.device["queues"]
        step("Random writes of 4 to 64 KiB, a job per queue, read back and checked by crc32c")
        jobs = []
        for queue in range(queues):
            part = IMAGE_BYTES // queues
            jobs += [
                f"--name=queue{queue}",
                f"--offset={queue * part}",
                f"--size={FIO_BYTES}",
                f"--cpus_allowed={self.cpu_of_queue(queue)}",
            ]
        options = [f"--filename={self.device['path']}", "--rw=randwrite", "--bsrange=4k-64k", "--direct=1"]
        options += ["--ioengine=io_uring", "--iodepth=16", "--verify=crc32c"]
        show(f"fio {' '.join(options)} ...")
        options += [
            "--blockalign=4k",
            "--thread",
            "--verify_fatal=1",
            "--do_verify=1",
            "--output-format=json",
        ]
        output = run("fio", *options, *jobs)
        results = json.loads(output[output.index("{") :])["jobs"]
        written = sum(job["write"]["io_bytes"] for job in results)
        read = sum(job["read"]["io_bytes"] for job in results)
        errors = sum(job["error"] != 0 for job in results)
        expect(errors == 0, f"fio failed in {errors} of {queues} jobs")
        wanted = queues * FIO_BYTES
        expect(written == read == wanted, f"of {wanted} bytes {written} were written and {read} verified")
        served = [queue["completed"] for queue in self.counters()["queues"]]
        expect(all(served), f"not every queue was used: requests by queue {served}")
        tell(f"{mib(written)} written, {mib(read)} verified, {errors} errors")
        self.note(
            "verified", f"{mib(read)} of random writes read back and checked by crc32c: {errors} errors"
        )

    def cpu_of_queue(self, queue: int) -> str:
        """A CPU whose I/O goes to this queue."""
        with open(f"/sys/block/{os.path.basename(self.device['path'])}/mq/{queue}/cpu_list") as file:
            cpus = {int(cpu) for cpu in file.read().replace(",", " ").split()}
        usable = sorted(cpus & os.sched_getaffinity(0))
        expect(usable, f"no CPU that may be used here submits to queue {queue}")
        return str(usable[0])

    def counters(self) -> dict[str, Any]:
        return reader.snapshot(self.device["id"])

    def use_as_disk(self) -> None:
        path = self.device["path"]
        step(f"ext4 on it, and a tree of files ({TREE})")
        wanted = checksums(TREE)
        size = sum((TREE / name).stat().st_size for name in wanted)
        expect(wanted, f"there is nothing in {TREE}")
        self.mount.mkdir()
        shown("mkfs.ext4", "-q", "-F", path)
        shown("mount", path, self.mount, given=f"mount {path} mnt")
        shown("cp", "-a", TREE, self.mount / "tree", given=f"cp -a {TREE} mnt/tree")
        shown("umount", self.mount, given="umount mnt")
        shown("e2fsck", "-f", "-n", path)
        shown("mount", path, self.mount, given=f"mount {path} mnt")
        found = checksums(self.mount / "tree")
        differ = [name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)]
        expect(not differ, f"{len(differ)} of {len(wanted)} files came back different, such as {differ[:3]}")
        tell(f"{len(found)} files, {mib(size)}: all SHA-256 sums equal")
        self.note(
            "files", f"{len(found)}, {mib(size)}, on ext4: fsck clean, all checksums equal after a remount"
        )
        self.give_back(size)

    def give_back(self, size: int) -> None:
        step("Deleted files give their blocks back to the file behind the disk")
        run("sync", "-f", self.mount)
        show("du disk.img")
        before = blocks_bytes(self.image)
        tell(f"{before >> 10} KiB")
        show("rm -r mnt/tree; sync; fstrim mnt")
        shutil.rmtree(self.mount / "tree")
        # Blocks are free for the trim once the deletion is in the journal.
        run("sync", "-f", self.mount)
        run("fstrim", self.mount)
        shown("umount", self.mount, given="umount mnt")
        show("du disk.img")
        after = blocks_bytes(self.image)
        tell(f"{after >> 10} KiB")
        expect(
            before - after >= size * 9 // 10,
            f"{before - after} bytes were given back after deleting {size}"
            f" (is {self.dir} on a file system with holes, such as ext4, xfs or tmpfs? TMPDIR says where)",
        )
        given = mib(before - after)
        self.note("discard", f"{given} given back: the file went from {mib(before)} to {mib(after)} on disk")

    def count(self) -> None:
        step("What went through it")
        shown(UBLKD, "stat", self.device["id"])
        snapshot = self.counters()
        total = reader.total(snapshot)
        errors = sum(each["errors"] for each in total.values())
        moved = total["read"]["bytes"] + total["write"]["bytes"]
        expect(errors == 0, f"{errors} requests failed")
        expect(not any(queue["in_flight"] for queue in snapshot["queues"]), "not all requests were answered")
        expect(total["discard"]["ios"], "no discard came through")
        queues = snapshot["queues"]
        count = sum(queue["completed"] for queue in queues)
        by_queue = ", ".join(f"{queue['completed']} by queue {queue['queue']}" for queue in queues)
        self.note("requests", f"{count} ({by_queue}), {mib(moved)} read and written: {errors} failed")

    def remove(self) -> None:
        step("And it goes away")
        number, pids = self.device["id"], [self.device["supervisor"]]
        pids += [worker["pid"] for worker in self.device["workers"]]
        shown(UBLKD, "del", number)
        left = [path for path in (f"/dev/ublkb{number}", f"/dev/ublkc{number}") if os.path.exists(path)]
        left += glob.glob(f"/run/ublkd/{number}.*") + glob.glob(f"/dev/shm/ublkd-{number}*")
        left += [f"process {pid}" for pid in pids if os.path.exists(f"/proc/{pid}")]
        left += [f"{device['path']} in the list" for device in self.find()]
        expect(not left, f"left behind: {', '.join(left)}")
        with open(self.image, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError if somebody still has it
        tell(f"nothing of device {number} in /dev, /run/ublkd, /dev/shm and among the processes")
        self.note("removed", f"{self.device['path']}: no node, process, record or shared memory left")

    def all(self) -> None:
        self.serve()
        self.verify()
        self.use_as_disk()
        self.count()
        self.remove()


def interrupted(number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> int:
    signal.signal(signal.SIGTERM, interrupted)
    signal.signal(signal.SIGHUP, interrupted)
    release = os.uname().release
    print(f"ublkd {__version__} on Linux {release}", flush=True)
    try:
        with Demo() as demo:
            try:
                demo.all()
            except (Failure, OSError, KeyError, ValueError) as error:
                text = error if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
                print(f"\ndemo: FAILED: {text}", file=sys.stderr)
                if log := demo.log():
                    print(f"demo: the log of {demo.device['path']}:\n{log}", file=sys.stderr)
                return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; cleaned up", file=sys.stderr)
        return 130
    print(f"\nDone in {time.monotonic() - demo.began:.0f} seconds on Linux {release}, nothing failed:")
    for what, text in demo.account:
        print(f"  {what:<9} {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
