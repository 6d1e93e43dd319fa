# SPDX-License-Identifier: Apache-2.0
"""Every write ordering, run in a VM: dm-log-writes below a loop device, and the file system at each flush point.

An application appends records to a file system on the device, and puts a mark into the log of the disk below whenever
one is durable. Replayed to any flush, FUA write or mark, the disk must hold a file system that needs nothing but its
journal, and every record of the marks before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lib import disks, leaks
from lib.mapped import Mapped, sectors
from lib.tools import sh

from faults import append, command
from faults.writelog import WriteLog

MIB = 1 << 20
TARGETS = Path(__file__).with_name("targets.py")
PLACE = Path("/run/ublkd-orderings")
# subject: (file system, MiB, how it is served). The last one does not flush: it must be caught.
SUBJECTS: dict[str, tuple[str, int, list[str]]] = {
    "ext4-direct": ("ext4", 32, ["loop", "{disk}", "--direct"]),
    "xfs-direct": ("xfs", 304, ["loop", "{disk}", "--direct"]),
    "ext4-buffered": ("ext4", 32, ["loop", "{disk}", "--buffered"]),
    "xfs-buffered": ("xfs", 304, ["loop", "{disk}", "--buffered"]),
    "ext4-hasty": ("ext4", 32, ["python", f"{TARGETS}:Hasty", "--param", "file={disk}"]),
}


def record(name: str, records: int, data: str, log: str) -> None:
    """Make a file system, append records, and take all of it away again; the log has what happened."""
    kind, _, words = SUBJECTS[name]
    for disk in (data, log):
        sh("blkdiscard", "-f", disk)
    below = Mapped("recorded", f"0 {sectors(data)} log-writes {data} {log}")
    try:
        more = [] if words[0] == "python" else ["-q", 2, "--size-limit", f"{SUBJECTS[name][1]}M"]
        path = command.ublkd("add", *[word.format(disk=below.path) for word in words], *more)
        append.make(kind, path)
        mark("mkfs")
        PLACE.mkdir(exist_ok=True)
        append.run("mount", "-t", kind, path, PLACE)
        application = append.FileLog(name, PLACE)
        for number in range(records):
            application.append(number)
            mark(f"record-{number}")
            noise(number)
        application.close()
        append.run("umount", PLACE)
        command.ublkd("del", path)
    except BaseException as e:
        print(f"{name}: {e}", flush=True)
        os.system(f"umount {PLACE} 2>/dev/null")
        leaks.clean()
        raise
    finally:
        below.remove()


def mark(text: str) -> None:
    """Into the log of the disk below."""
    sh("dmsetup", "message", "recorded", "0", "mark", text)


def noise(number: int) -> None:
    """What applications do besides, and nobody waits for."""
    (PLACE / f"noise-{number}").write_bytes(bytes([number % 256]) * 3000 * (number % 7))
    if number > 2:
        (PLACE / f"noise-{number - 2}").rename(PLACE / f"noise-{number - 2}-old")
    if number > 5 and number % 2:
        (PLACE / f"noise-{number - 4}-old").unlink(missing_ok=True)
    if number % 9 == 5:
        os.sync()


def copy_sparse(source: int, target: Path, size: int) -> None:
    """A copy that takes no more room."""
    with open(target, "wb") as file:
        file.truncate(size)
        at = 0
        while True:
            try:
                at = os.lseek(source, at, os.SEEK_DATA)
            except OSError:
                return
            end = os.lseek(source, at, os.SEEK_HOLE)
            while at < end:
                at += os.pwrite(file.fileno(), os.pread(source, min(1 << 20, end - at), at), at)


def check(name: str, image: Path, acknowledged: int) -> str:
    """What is wrong with a replayed disk, "" if nothing is."""
    kind = SUBJECTS[name][0]
    loop = sh("losetup", "--find", "--show", image).strip()
    try:
        try:
            append.run("mount", "-t", kind, loop, PLACE)
        except RuntimeError as e:
            return str(e)
        try:
            first, last = append.FileLog(name, PLACE).found()
        except (RuntimeError, OSError) as e:
            return str(e)
        finally:
            append.run("umount", PLACE)
        if last < acknowledged:
            return f"record {acknowledged} was durable, the last one there is {last} (from {first})"
        fsck = ("e2fsck", "-fn") if kind == "ext4" else ("xfs_repair", "-n")
        try:
            append.run(*fsck, loop)
        except RuntimeError as e:
            return str(e)
        return ""
    finally:
        sh("losetup", "-d", loop)


def replay(name: str, log_path: str, sample: int, rng: random.Random, until_wrong: bool) -> dict[str, Any]:
    """Replay the log, and check at each durable point from mkfs on, or at so many of them."""
    size = SUBJECTS[name][1] * MIB
    log = WriteLog(log_path)
    entries = list(log.read())
    start = next(entry.number for entry in entries if entry.mark == "mkfs")
    points = [entry.number for entry in entries[start:] if entry.durable or entry.mark.startswith("record")]
    chosen = set(points if not sample else rng.sample(points, min(sample, len(points))))
    if until_wrong:
        # the last ones: there something had to be durable for certain
        chosen = {entry.number for entry in entries if entry.mark.startswith("record")}
    acknowledged, wrong, checked = -1, [], 0
    whole, copy = Path("/dev/shm/replayed.img"), Path("/dev/shm/checked.img")
    with open(whole, "wb+") as image:
        image.truncate(size)
        for entry in entries:
            log.replay(entry, image.fileno())
            if entry.mark.startswith("record"):
                acknowledged = int(entry.mark.split("-")[1])
            if entry.number in chosen:
                copy_sparse(image.fileno(), copy, size)
                checked += 1
                complaint = check(name, copy, acknowledged)
                if complaint:
                    wrong.append(f"{name}, entry {entry.number} of {len(entries)}: {complaint}")
                    if until_wrong or len(wrong) > 10:
                        break
    log.close()
    whole.unlink()
    copy.unlink(missing_ok=True)
    return {
        "subject": name,
        "entries": len(entries),
        "durable_points": len(points),
        "flushes": sum(bool(entry.flags & 1) for entry in entries),
        "fua_writes": sum(bool(entry.flags & 2) for entry in entries),
        "checked": checked,
        "records": acknowledged + 1,
        "wrong": wrong,
    }


def main() -> int:
    """Entry point."""
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--records", type=int, default=30)
    parse.add_argument("--sample", type=int, default=0, help="check at so many points; all unless given")
    parse.add_argument("--seed", type=int, default=1)
    parse.add_argument("--subjects", default=",".join(SUBJECTS))
    parse.add_argument("--out", type=Path)
    options = parse.parse_args()
    data, log, *_ = disks.names()
    sh("modprobe", "-a", "dm-log-writes", "loop", "xfs")
    report: dict[str, Any] = {
        "what": "write orderings",
        "kernel": os.uname().release,
        "seed": options.seed,
        "subjects": [],
        "failures": [],
    }
    began, lines = time.monotonic(), list[str]()
    for name in options.subjects.split(","):
        rng = random.Random(f"{options.seed} {name}")
        liar = name.endswith("hasty")
        try:
            record(name, min(options.records, 8) if liar else options.records, data, log)
            found = replay(name, log, options.sample, rng, liar)
        except (AssertionError, RuntimeError, subprocess.SubprocessError, StopIteration) as e:
            leaks.clean()
            report["failures"].append(f"{name}: {type(e).__name__}: {e}")
            continue
        report["subjects"].append(found)
        if liar and not found["wrong"]:
            report["failures"].append(f"{name}: a server that does not flush was not caught")
        if not liar:
            report["failures"] += found["wrong"]
        verdict = f"{len(found['wrong'])} wrong" + " (as it must be)" * liar if found["wrong"] else "all well"
        lines.append(
            f"{name}: {found['entries']} entries, {found['flushes']} flushes, {found['fua_writes']} FUA writes, "
            f"{found['records']} records; checked at {found['checked']} of {found['durable_points']} points: {verdict}"
        )
        print(lines[-1], flush=True)
    report["failures"] += [f"left behind: {each}" for each in leaks.find()]
    report["seconds"] = round(time.monotonic() - began, 1)
    verdict = "FAILED: " + "; ".join(report["failures"])[:3000] if report["failures"] else "consistent at every point"
    lines.append(f"write orderings on kernel {report['kernel']}, {report['seconds']:.0f} s: {verdict}")
    print(lines[-1], flush=True)
    if options.out:
        options.out.with_suffix(".txt").write_text("\n".join(lines) + "\n")
        options.out.write_text(json.dumps(report) + "\n")
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
