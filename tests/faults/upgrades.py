# SPDX-License-Identifier: Apache-2.0
"""Upgrades under load, run in a VM: live devices get new servers again and again, and whoever uses them never knows.

One loop device has fio on it, which writes and verifies on all queues; one memory device, with commands for many
requests at once where the driver has them, an ext4 with an SQLite data base that is written to, a transaction after the
other. Exit status 0 means: no I/O error, no mismatch, no
transaction lost, nothing left behind. Prints the pauses, and writes them as JSON.
"""

from __future__ import annotations

import hashlib
import random
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from lib import disks, leaks
from lib.tools import MIB, has

from faults import command, watch
from faults.report import Failure, KernelErrors, Report, arguments
from faults.storm import QUEUES, SIZE, Load, spread
from ublkd import inventory, supervisor

# A new Python takes its time on an emulated CPU that the load has to itself.
PATIENT = ("--start-timeout", "120")

# Rows that the data base has at most: it must not fill its disk, however long it is written to.
KEPT = 1000
PAUSE_S = 0.02


class Transactions:
    """An SQLite data base in a thread; each committed row can be told to be right by itself."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stop = threading.Event()
        self.committed = 0
        self.longest_s = 0.0
        self.error = ""
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            base = sqlite3.connect(self._path, timeout=120)
            base.execute("PRAGMA journal_mode = WAL")
            base.execute("PRAGMA synchronous = FULL")
            base.execute("CREATE TABLE entry (number INTEGER PRIMARY KEY, text BLOB, digest BLOB)")
            rng = random.Random(1)
            while not self._stop.is_set():
                text = rng.randbytes(rng.randrange(100, 3000))
                began = watch.now()
                with base:
                    base.execute("INSERT INTO entry VALUES (?, ?, ?)", (self.committed, text, digest(text)))
                    for number in without(self.committed):
                        base.execute("DELETE FROM entry WHERE number = ?", (number,))
                self.committed += 1
                self.longest_s = max(self.longest_s, watch.now() - began)
                # the new servers have to start on these CPUs, too
                time.sleep(PAUSE_S)
            base.close()
        except Exception as e:
            self.error = f"SQLite: {type(e).__name__}: {e}"

    def check(self) -> None:
        """Failure if it complained so far."""
        if self.error:
            raise Failure(self.error)

    def finish(self) -> None:
        """No more; Failure unless all that was committed is there."""
        self._stop.set()
        self._thread.join()
        self.check()
        base = sqlite3.connect(self._path)
        [(said,)] = base.execute("PRAGMA integrity_check").fetchall()
        rows = dict(base.execute("SELECT number, digest FROM entry").fetchall())
        for number, text in base.execute("SELECT number, text FROM entry"):
            if digest(text) != rows[number]:
                raise Failure(f"SQLite: row {number} is not what was written")
        base.close()
        expected = set(range(self.committed)).difference(*map(without, range(self.committed)))
        if said != "ok" or set(rows) != expected:
            raise Failure(f"SQLite: integrity {said}; {len(rows)} rows of {len(expected)}")


def without(number: int) -> set[int]:
    """The rows that are deleted by the transaction that adds this one."""
    return {number - KEPT} | ({number - 3} if number % 7 == 6 else set())


def digest(text: bytes) -> bytes:
    """What a row should have beside its text."""
    return hashlib.sha256(text).digest()


def sh(*words: object) -> None:
    """Run a program that must succeed."""
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def prove(count: int, rng: random.Random, image: Path) -> dict[str, Any]:
    """All of it: the account. Failure if anything is wrong."""
    with open(image, "wb") as file:
        file.truncate(SIZE)
    verified = command.ublkd("add", "loop", image, "-q", QUEUES, "-d", 64, "--direct", *PATIENT)
    batch = "on" if has("BATCH_IO") else "off"
    mounted = command.ublkd("add", "memory", "--size", "128M", "-q", 2, "-d", 64, "--batch", batch, *PATIENT)
    mount = Path("/tmp/upgrades")
    mount.mkdir(exist_ok=True)
    sh("mkfs.ext4", "-qF", mounted)
    sh("mount", mounted, mount)
    load = Load(verified, 40, 1 * MIB)
    base = Transactions(mount / "data.db")
    pauses: dict[str, list[float]] = {"loop, fio": [], "memory, ext4, SQLite": []}
    try:
        for number in range(count):
            path, pause = list(zip((verified, mounted), pauses.values(), strict=True))[number % 2]
            dev_id = int(path.removeprefix("/dev/ublkb"))
            before = inventory.read_record(dev_id)
            done = supervisor.upgrade(dev_id)
            after = inventory.read_record(dev_id)
            assert before and after
            if after["supervisor"]["pid"] != done["pid"] or done["pid"] == before["supervisor"]["pid"]:
                raise Failure(f"upgrade {number} of {path} left it with the old server")
            pause.append(done["pause_ms"] / 1000)
            load.check()
            base.check()
            if number % 10 == 9:
                print(f"{number + 1} of {count} upgrades", flush=True)
            time.sleep(rng.uniform(0, 0.5))
        load.finish(leaks.stacks)
        base.finish()
    finally:
        load._stop.set()
        base._stop.set()
        load._thread.join()
        base._thread.join()
        # lazily: should a thread have failed with a file open, that is what is to be told of
        sh("umount", "-l", mount)
    sh("fsck.ext4", "-fn", mounted)
    for path in (verified, mounted):
        command.ublkd("del", path)
    left = leaks.find()
    if left:
        raise Failure("left behind: " + ", ".join(left))
    return {
        "upgrades": count,
        "batch": {"loop": "off", "memory": batch},
        "verified_bytes": load.verified_bytes,
        "transactions": base.committed,
        "longest_request_ms": round(max(load.stalls_ms, default=0), 1),
        "longest_transaction_ms": round(base.longest_s * 1000, 1),
        "pause_seconds": {what: spread(found) for what, found in pauses.items() if found},
        "pauses": pauses,
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    if report["failure"]:
        return f"upgrades on kernel {report['kernel']}: {report['failure']}"
    lines = [
        f"kernel {report['kernel']}, seed {report['seed']}: {report['upgrades']} upgrades in "
        f"{report['seconds']:.0f} s, "
        f"{report['verified_bytes'] / MIB:.0f} MiB verified, {report['transactions']} transactions, no error",
        f"longest request {report['longest_request_ms']:.0f} ms, longest transaction "
        f"{report['longest_transaction_ms']:.0f} ms",
        "",
        f"{'device':22} {'n':>5} {'min':>7} {'p50':>7} {'p90':>7} {'p99':>7} {'max':>7}   (seconds of pause)",
    ]
    for what, found in report["pause_seconds"].items():
        numbers = " ".join(f"{found[key]:7.3f}" for key in ("min", "p50", "p90", "p99", "max"))
        lines.append(f"{what:22} {found['n']:5} {numbers}")
    return "\n".join(lines)


def main() -> int:
    """Entry point."""
    parse = arguments(__doc__)
    parse.add_argument("--upgrades", type=int, default=6)
    options = parse.parse_args()
    [disk, *_] = disks.names()
    report = Report("upgrades under load", options)
    errors = KernelErrors()
    with report.failing_on(Exception):
        image = disks.Scratch(disk).directory() / "disk.img"
        report |= prove(options.upgrades, random.Random(options.seed), image)
        errors.check()
    return report.finish(table)


if __name__ == "__main__":
    sys.exit(main())
