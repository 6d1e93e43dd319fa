# SPDX-License-Identifier: Apache-2.0
"""Many devices at once, run in a VM: made in parallel, verified, killed, recovered, removed in parallel."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib import disks, leaks

from faults import command, watch
from ublkd import inventory

MIB = 1 << 20
SIZE = 8 * MIB
QUEUES = 2
TARGETS = Path(__file__).with_name("targets.py")


class Pool:
    """Commands, some at a time, each forked from a process that has loaded them."""

    def __init__(self, width: int) -> None:
        self._warm = [command.Warm() for _ in range(width)]

    def run(self, commands: list[list[object]]) -> None:
        """All of them; AssertionError with what failed."""
        waiting, failed = list(enumerate(commands)), list[str]()

        def work(warm: command.Warm) -> None:
            while True:
                try:
                    _, words = waiting.pop(0)
                except IndexError:
                    return
                warm.start(*words)
                said = warm.wait()
                if said:
                    failed.append(f"{' '.join(map(str, words))}: {said}")

        threads = [threading.Thread(target=work, args=(warm,)) for warm in self._warm]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed, f"{len(failed)} of {len(commands)} failed: " + "; ".join(failed[:3])

    def close(self) -> None:
        """No more."""
        for warm in self._warm:
            warm.close()


def contents(dev_id: int, seed: int) -> bytes:
    """What a device holds at its start."""
    return random.Random(f"{seed} {dev_id}").randbytes(256 << 10)


def verify(dev_id: int, seed: int) -> None:
    """Its bytes, from the server and not from the page cache."""
    fd = os.open(f"/dev/ublkb{dev_id}", os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        data = os.pread(fd, 256 << 10, 0)
    finally:
        os.close(fd)
    assert hashlib.sha256(data).digest() == hashlib.sha256(contents(dev_id, seed)).digest(), f"device {dev_id} differs"


def fill(dev_id: int, seed: int) -> None:
    """Write them, durably."""
    fd = os.open(f"/dev/ublkb{dev_id}", os.O_WRONLY)
    try:
        os.pwrite(fd, contents(dev_id, seed), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def main() -> int:
    """Entry point."""
    parse = argparse.ArgumentParser(description=__doc__)
    parse.add_argument("--devices", type=int, default=16)
    parse.add_argument("--seed", type=int, default=1)
    parse.add_argument("--width", type=int, default=4, help="commands at a time")
    parse.add_argument("--out", type=Path)
    options = parse.parse_args()
    [disk, *_] = disks.names()
    directory = disks.Scratch(disk).directory()
    ids = list(range(options.devices))
    rng = random.Random(options.seed)
    report: dict[str, Any] = {
        "what": "many devices",
        "kernel": os.uname().release,
        "devices": options.devices,
        "queues": QUEUES,
        "seconds": {},
        "failure": "",
    }
    pool = Pool(options.width)

    def phase(name: str, task: Callable[[], object]) -> None:
        began = time.monotonic()
        task()
        report["seconds"][name] = round(time.monotonic() - began, 1)
        print(f"{name}: {report['seconds'][name]} s", flush=True)

    def add(dev_id: int) -> list[object]:
        common = ["-n", dev_id, "-q", QUEUES, "-d", 16, "--max-io-size", "64K"]
        if dev_id % 4 == 3:
            return ["add", "memory", "--size", SIZE, *common]
        image = directory / f"{dev_id}.img"
        with open(image, "wb") as file:
            file.truncate(SIZE)
        return ["add", "loop", image, *(["--buffered"] if dev_id % 4 == 1 else []), *common]

    def kill_workers() -> None:
        old = {dev_id: set(watch.tree(dev_id, _supervisor(dev_id))) for dev_id in ids}
        for dev_id, family in old.items():
            os.kill(rng.choice(sorted(family - {_supervisor(dev_id)})), signal.SIGKILL)
        for dev_id in ids:
            verify(dev_id, options.seed)

    def kill_supervisors() -> None:
        for dev_id in ids:
            os.kill(_supervisor(dev_id), signal.SIGKILL)
        pool.run([["recover", dev_id] for dev_id in ids])

    try:
        free = watch.meminfo("MemAvailable")["MemAvailable"]
        phase("start all in parallel", lambda: pool.run([add(dev_id) for dev_id in ids]))
        report["memory_kib_per_device"] = round((free - watch.meminfo("MemAvailable")["MemAvailable"]) / len(ids))
        report["per_device"] = watch.footprint(ids)
        phase("write", lambda: [fill(dev_id, options.seed) for dev_id in ids])
        phase("verify", lambda: [verify(dev_id, options.seed) for dev_id in ids])
        phase("kill a worker of each, verify", kill_workers)
        phase("kill each supervisor, recover all in parallel", kill_supervisors)
        phase("verify again", lambda: [verify(dev_id, options.seed) for dev_id in ids])
        states = {entry["state"] for entry in inventory.devices()}
        assert states == {"live"}, f"states: {states}"
        report["per_device_after"] = watch.footprint(ids)
        phase("stop all in parallel", lambda: pool.run([["del", dev_id] for dev_id in ids]))
        pool.close()
        left = leaks.find()
        assert not left, "left behind: " + ", ".join(left[:10])
    except AssertionError as e:
        report["failure"] = f"FAILED: {e}"
        leaks.clean()
    print(json.dumps(report, indent=1), flush=True)
    print(
        f"{options.devices} devices on kernel {report['kernel']}: "
        + (report["failure"] or "each served, verified, killed, recovered, removed; nothing left"),
        flush=True,
    )
    if options.out:
        options.out.write_text(json.dumps(report) + "\n")
    return 1 if report["failure"] else 0


def _supervisor(dev_id: int) -> int:
    record = inventory.read_record(dev_id)
    assert record is not None
    pid: int = record["supervisor"]["pid"]
    return pid


if __name__ == "__main__":
    sys.exit(main())
