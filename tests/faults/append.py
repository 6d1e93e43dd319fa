# SPDX-License-Identifier: Apache-2.0
"""The application of the power cut proof, run in a VM until that loses its power.

First it looks at what the last cut left: file systems must check clean once their journals have been replayed, and
says which records there are. Then it appends more, and reports each once the kernel says that it is durable.

    UP                          the program runs
    FOUND subject first last    the records there, without a gap
    BAD subject what            what may not be
    READY                       from here on it appends
    A subject number            this record is durable
"""

from __future__ import annotations

import argparse
import mmap
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lib import device

from faults.subjects import MIB, SUBJECTS
from ublkd import supervisor
from ublkd.config.schema import DeviceSpec

RECORD = 4096
PER_FILE = 128
FILES = 3
RING = 1024
TARGETS = Path(__file__).with_name("targets.py")
PLACE = Path("/run/ublkd-cut")
HEADER = struct.Struct("<8sIQ")

def record(subject: str, number: int) -> bytes:
    """The record of that number."""
    body = HEADER.pack(b"ublkdREC", zlib.crc32(subject.encode()), number)
    filler = zlib.crc32(body)
    body += b"".join(((filler + step * 2654435761) & 0xFFFFFFFF).to_bytes(4, "little") for step in range(64)) * 15
    body += bytes(RECORD - 4 - len(body))
    return body + zlib.crc32(body).to_bytes(4, "little")


def number_of(subject: str, data: bytes) -> int | None:
    """Which record this is, None if it is none or damaged."""
    if len(data) != RECORD or zlib.crc32(data[:-4]).to_bytes(4, "little") != data[-4:]:
        return None
    magic, owner, number = HEADER.unpack_from(data)
    return number if magic == b"ublkdREC" and owner == zlib.crc32(subject.encode()) else None


def say(text: str) -> None:
    """One line to the host, in one write."""
    os.write(1, text.encode() + b"\n")


def run(*argv: object) -> None:
    """A program that must succeed."""
    done = subprocess.run([str(word) for word in argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, argv))}: status {done.returncode}: {done.stdout[-600:]}")


class Log:
    """Records of one subject: found(), then append() for ever."""

    def __init__(self, subject: str) -> None:
        self.subject = subject

    def found(self) -> tuple[int, int]:
        """(first, last) of an unbroken row; RuntimeError if it has gaps."""
        raise NotImplementedError

    def append(self, number: int) -> None:
        """Returns when that record is durable."""
        raise NotImplementedError


class FileLog(Log):
    """In files that are appended to; old ones are removed."""

    def __init__(self, subject: str, directory: Path) -> None:
        super().__init__(subject)
        self._directory = directory
        self._fds: tuple[int, int] | None = None

    def _path(self, number: int) -> Path:
        return self._directory / f"log-{number // PER_FILE:08}"

    def found(self) -> tuple[int, int]:
        paths = sorted(self._directory.glob("log-*"))
        first = last = None
        for path in paths:
            base = int(path.name[4:]) * PER_FILE
            data = path.read_bytes()
            for place in range(PER_FILE):
                number = number_of(self.subject, data[place * RECORD : (place + 1) * RECORD])
                if number is None:
                    break
                if number != base + place:
                    raise RuntimeError(f"{path.name} has record {number} where {base + place} belongs")
                if last is not None and number != last + 1:
                    raise RuntimeError(f"after record {last} comes {number}")
                first = number if first is None else first
                last = number
        return (0, -1) if first is None or last is None else (first, last)

    def append(self, number: int) -> None:
        path, place = self._path(number), number % PER_FILE
        if self._fds is None or place == 0:
            self.close()
            plain = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            # what follows the last good record was never acknowledged
            os.ftruncate(plain, place * RECORD)
            self._fds = plain, os.open(path, os.O_WRONLY | os.O_DSYNC)
            if place == 0:
                os.fsync(plain)
                directory = os.open(self._directory, os.O_RDONLY)
                os.fsync(directory)
                os.close(directory)
                # All of them: this may have been cut short here the last time.
                for old in self._directory.glob("log-*"):
                    if old < self._path(number - (FILES - 1) * PER_FILE):
                        old.unlink()
        plain, synced = self._fds
        data = record(self.subject, number)
        os.pwrite(synced if number % 3 == 1 else plain, data, place * RECORD)
        if number % 3 == 0:
            os.fdatasync(plain)
        elif number % 3 == 2:
            os.fsync(plain)

    def close(self) -> None:
        """Let go of the file."""
        for fd in self._fds or ():
            os.close(fd)
        self._fds = None


class RingLog(Log):
    """On the bare device, round and round."""

    def __init__(self, subject: str, path: str) -> None:
        super().__init__(subject)
        self._plain = os.open(path, os.O_RDWR)
        self._synced = os.open(path, os.O_WRONLY | os.O_DSYNC)
        self._direct = os.open(path, os.O_WRONLY | os.O_DSYNC | os.O_DIRECT)
        self._aligned = mmap.mmap(-1, RECORD)

    def found(self) -> tuple[int, int]:
        data = b""
        while len(data) < RING * RECORD:
            data += os.pread(self._plain, RING * RECORD - len(data), len(data))
        numbers = {}
        for place in range(RING):
            number = number_of(self.subject, data[place * RECORD : (place + 1) * RECORD])
            if number is not None and number % RING == place:
                numbers[place] = number
        if not numbers:
            return 0, -1
        last = max(numbers.values())
        # the slot after the last one may have been in the middle of being overwritten
        first = max(0, last - RING + 2)
        gaps = [number for number in range(first, last + 1) if numbers.get(number % RING) != number]
        if gaps:
            raise RuntimeError(f"of the records {first} to {last}, {len(gaps)} are not there: {gaps[:5]}")
        return first, last

    def append(self, number: int) -> None:
        data, at, how = record(self.subject, number), number % RING * RECORD, number % 4
        if how == 3:
            self._aligned[:] = data
            os.pwritev(self._direct, [self._aligned], at)
            return
        os.pwrite(self._synced if how == 1 else self._plain, data, at)
        if how == 0:
            os.fdatasync(self._plain)
        elif how == 2:
            os.fsync(self._plain)


def check_clean(kind: str, path: str, place: Path) -> None:
    """Replay the journal by mounting; then there may be nothing to repair."""
    run("mount", "-t", kind, path, place)
    run("umount", place)
    run(*(("e2fsck", "-fn") if kind == "ext4" else ("xfs_repair", "-n")), path)


def make(kind: str, path: str) -> None:
    """A file system that is quick to check."""
    if kind == "ext4":
        run("mkfs.ext4", "-qF", "-b", 4096, "-E", "lazy_itable_init=0,lazy_journal_init=0", path)
    else:
        run("mkfs.xfs", "-qf", path)


def serve(server: str, image: Path, direct: bool) -> str:
    """A block device of the image."""
    if server == "loop":
        argv = ["losetup", "--find", "--show", f"--direct-io={'on' if direct else 'off'}", str(image)]
        return subprocess.run(argv, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    if server == "hasty":
        spec = DeviceSpec(target="python", file=f"{TARGETS}:Hasty", params={"file": str(image)})
    else:
        spec = DeviceSpec(target="loop", file=str(image), direct="on" if direct else "off")
    return supervisor.run_background(spec)


def below(subject: str) -> Path:
    """Where the file system with its backing file is mounted."""
    return PLACE / f"{subject}.below"


def prepare_image(subject: str, disk: str, first_time: bool) -> None:
    """The file system that its backing file is on: checked, or made; mounted."""
    server, _, mib = SUBJECTS[subject]
    place = below(subject)
    place.mkdir(parents=True, exist_ok=True)
    if first_time:
        make("ext4", disk)
    elif server != "hasty":
        check_clean("ext4", disk, place)
    # what the liar leaves in the page cache stays there
    options = ("-o", "commit=900") if server == "hasty" else ()
    run("mount", "-t", "ext4", *options, disk, place)
    if first_time:
        with open(place / "disk.img", "wb") as file:
            file.truncate(mib * MIB)
            os.fsync(file.fileno())


def prepare_log(subject: str, path: str, first_time: bool) -> Log:
    """The same for what is on the served device."""
    kind, place = SUBJECTS[subject][1], PLACE / subject
    if kind == "raw":
        return RingLog(subject, path)
    place.mkdir(parents=True, exist_ok=True)
    if first_time:
        make(kind, path)
    else:
        check_clean(kind, path, place)
    run("mount", "-t", kind, path, place)
    return FileLog(subject, place)


def work(log: Log, number: int) -> None:
    """Append until the power goes."""
    while True:
        log.append(number)
        say(f"A {log.subject} {number}")
        number += 1


def guarded(subject: str, task: Callable[[], object]) -> None:
    """Run it, and tell of what goes wrong."""
    try:
        task()
    except Exception as e:
        say(f"BAD {subject} {type(e).__name__}: {' '.join(str(e).split())[:600]}")


def together(task: Callable[[str], object]) -> None:
    """For all subjects, a few at a time."""
    with ThreadPoolExecutor(3) as pool:
        for subject in SUBJECTS:
            pool.submit(guarded, subject, lambda subject=subject: task(subject))  # type: ignore[misc]


def main() -> int:
    """Entry point; never returns of itself once it appends."""
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--first-time", action="store_true")
    parse.add_argument("--direct", action="store_true")
    options = parse.parse_args()
    say("UP")
    run("modprobe", "-a", "loop", "xfs")
    device.warm()
    disks = dict(zip(SUBJECTS, os.environ["UBLKD_VM_DISKS"].split(), strict=True))
    logs: dict[str, tuple[Log, int]] = {}

    paths: dict[str, str] = {}

    def image(subject: str) -> None:
        prepare_image(subject, disks[subject], options.first_time)

    def start(subject: str) -> None:
        paths[subject] = serve(SUBJECTS[subject][0], below(subject) / "disk.img", options.direct)

    def ready(subject: str) -> None:
        log = prepare_log(subject, paths[subject], options.first_time)
        first, last = log.found()
        say(f"FOUND {subject} {first} {last}")
        logs[subject] = log, last + 1

    together(image)
    for subject in SUBJECTS:
        # with no other thread around: supervisors are forked
        guarded(subject, lambda subject=subject: start(subject))  # type: ignore[misc]
    together(ready)
    say("READY")
    for subject, (log, number) in logs.items():
        task = lambda log=log, number=number: work(log, number)  # noqa: E731
        threading.Thread(target=guarded, args=(subject, task), daemon=True).start()
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    sys.exit(main())
