# SPDX-License-Identifier: Apache-2.0
"""Programs run, conditions waited for, files read."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ublkd.control.commands import Control

MIB = 1 << 20
GIB = 1 << 30


def sh(*argv: object, status: int | None = 0, **options: Any) -> str:
    """Run a program to its end: what it printed, stderr included. status None: any exit will do."""
    words = [str(word) for word in argv]
    done: subprocess.CompletedProcess[str] = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if status is not None and done.returncode != status:
        # The start, since fio goes on to print all its zeroes.
        raise AssertionError(f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout[:2000]}")
    return done.stdout


def has(feature: str) -> bool:
    """Whether this driver can do it."""
    with Control() as ctl:
        return ctl.get_features().has(feature)


def wait_until(condition: Callable[[], Any], what: str, timeout: float = 60.0) -> Any:
    """The first true value of condition; an assertion fails if there is none in time."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what}: not within {timeout:.0f} seconds"
        time.sleep(0.05)


def fio_command(path: str, *jobs: dict[str, object], **common: object) -> list[str]:
    """The fio call that writes to path with verification; a dict of fio's options for each job."""
    options: dict[str, object] = {
        "filename": path,
        "ioengine": "io_uring",
        "direct": 1,
        "verify": "crc32c",
        "verify_fatal": 1,
        # Writes in flight to the same blocks have no order that could be verified.
        "serialize_overlap": 1,
        "verify_state_save": 0,
        "exitall_on_error": 1,
        "thread": 1,
        **common,
    }
    argv = ["fio", "--output-format=json", *(f"--{name}={value}" for name, value in options.items())]
    for number, job in enumerate(jobs):
        argv += [f"--name=job{number}", *(f"--{name}={value}" for name, value in job.items())]
    return argv


def fio_result(output: str) -> list[dict[str, Any]]:
    """fio's account of its jobs; each must have ended without an error."""
    at = output.find("{")
    assert at >= 0, output
    jobs: list[dict[str, Any]] = json.JSONDecoder().raw_decode(output[at:])[0]["jobs"]
    assert all(job["error"] == 0 for job in jobs), output[:4000]
    return jobs


def fio(path: str, *jobs: dict[str, object], **common: object) -> list[dict[str, Any]]:
    """Write and verify; an assertion fails on any error or mismatch."""
    return fio_result(sh(*fio_command(path, *jobs, **common)))


def read(path: str | Path) -> str:
    """A sysfs or procfs file, stripped."""
    return Path(path).read_text().strip()


def queue_attribute(path: str, name: str) -> int:
    """A number out of a disk's /sys/block/.../queue."""
    return int(read(f"/sys/block/{os.path.basename(path)}/queue/{name}"))


def device_bytes(path: str) -> int:
    """Size of a block device."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def allocated(path: str | Path) -> int:
    """Bytes of disk that a file takes; what is still in the cache is written out first."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        return os.fstat(fd).st_blocks * 512
    finally:
        os.close(fd)


def pread(path: str | Path, length: int, offset: int, flags: int = 0) -> bytes:
    """Bytes of a file or device."""
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def direct_reader(path: str, offset: int) -> subprocess.Popen[bytes]:
    """A program that reads 4096 bytes past the page cache, and prints them when it gets them."""
    words = ["dd", f"if={path}", "bs=4096", f"skip={offset // 4096}", "count=1", "iflag=direct", "status=none"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def pwrite(path: str | Path, data: bytes, offset: int) -> None:
    """Write to a file or device, and sync."""
    fd = os.open(path, os.O_WRONLY)
    try:
        view = memoryview(data)
        while view:
            done = os.pwrite(fd, view, offset)
            view, offset = view[done:], offset + done
        os.fsync(fd)
    finally:
        os.close(fd)


BLKFLSBUF = 0x1261
BLKDISCARD = 0x1277
BLKZEROOUT = 0x127F


def over_range(path: str, ioctl: int, offset: int, length: int) -> None:
    """BLKDISCARD or BLKZEROOUT on part of a block device."""
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.ioctl(fd, ioctl, struct.pack("=QQ", offset, length))
    finally:
        os.close(fd)


def forget(*paths: str | Path) -> None:
    """What is read of these files and devices next comes from below.

    The whole machine's cache would have been shorter, but its programs would have to be read again too.
    """
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            if stat.S_ISBLK(os.fstat(fd).st_mode):
                fcntl.ioctl(fd, BLKFLSBUF)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def digest_tree(top: str | Path) -> dict[str, str]:
    """Path -> digest of contents (or target of the link) for all files below top."""
    lines = sh("find", ".", "-type", "f", "-exec", "sha256sum", "--zero", "{}", "+", cwd=top).split("\0")
    found = {line[66:]: line[:64] for line in lines if line}
    links = sh("find", ".", "-type", "l", "-printf", "%p\\0%l\\0", cwd=top).split("\0")
    return found | dict(zip(links[0:-1:2], links[1::2], strict=True))


@contextlib.contextmanager
def room_in_shm(nbytes: int) -> Iterator[None]:
    """A /dev/shm that takes so much more and is full then."""
    now = os.statvfs("/dev/shm")
    used = (now.f_blocks - now.f_bfree) * now.f_frsize
    sh("mount", "-o", f"remount,size={used + nbytes}", "/dev/shm")
    try:
        yield
    finally:
        sh("mount", "-o", f"remount,size={now.f_blocks * now.f_frsize}", "/dev/shm")
