# SPDX-License-Identifier: Apache-2.0
"""Kill storm, run in a VM: processes of a device die at random moments, and whoever uses the disk never knows.

Kills workers and supervisors while fio writes and verifies on all queues. Exit status 0 means: no I/O error, no
mismatch, nothing left behind, memory flat. Prints a report, and writes it as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib import disks, leaks
from lib.tools import MIB, fio_command, fio_result

from faults import command, watch
from faults.report import Failure, KernelErrors, Report, arguments
from ublkd import inventory

TARGETS = Path(__file__).with_name("targets.py")
SIZE = 64 * MIB
STILL = 4 * MIB  # of the disk that nobody writes to once it is filled
QUEUES = 4
PATIENCE_S = 120.0
PLAIN = 0.85  # of the kills come when the device is served; the others shortly after another kill

SUBJECTS: dict[str, list[str]] = {
    "loop-direct": ["loop", "{image}", "--direct"],
    "loop-buffered": ["loop", "{image}", "--buffered"],
    "memory": ["memory", "--size", str(SIZE)],
    "python": ["python", f"{TARGETS}:Disk", "--size", str(SIZE)],
}
# Breaks its word: shows that this program would notice.
BROKEN = {"forgetful": ["python", f"{TARGETS}:Forgetful", "--size", str(SIZE)]}


class Load:
    """fio that writes and verifies on every queue, over and over, in a thread."""

    def __init__(self, path: str, rate_iops: int, job_bytes: int) -> None:
        cpus = sorted(os.sched_getaffinity(0))
        share = (SIZE - STILL) // QUEUES
        self._job_bytes = job_bytes
        jobs = [
            {
                "rw": "randwrite",
                "bsrange": "4k-32k",
                "iodepth": 8,
                "offset": STILL + number * share,
                "size": job_bytes,
                "rate_iops": rate_iops,
                "fsync": 64,
                "cpus_allowed": cpus[number % len(cpus)],
                "randseed": number + 1,
            }
            for number in range(QUEUES)
        ]
        self._argv = fio_command(path, *jobs)
        self._stop = threading.Event()
        self.passes = 0
        self.verified_bytes = 0
        self.stalls_ms: list[float] = []
        self.error = ""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set() and not self.error:
            done = subprocess.run(self._argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            try:
                assert done.returncode == 0, f"fio ended with {done.returncode}: {done.stdout[:1500]}"
                found = fio_result(done.stdout)
                assert all(job["write"]["io_bytes"] == job["read"]["io_bytes"] == self._job_bytes for job in found), (
                    "fio did not read all that it wrote"
                )
                self.verified_bytes += sum(job["read"]["io_bytes"] for job in found)
                latencies = [job[way]["clat_ns"]["max"] for job in found for way in ("read", "write")]
                self.stalls_ms.append(max(latencies) / 1e6)
                self.passes += 1
            except Exception as e:
                self.error = f"{type(e).__name__}: {e}"

    def finish(self, scene: Callable[[], str]) -> None:
        """Let the pass under way come to its end; Failure if any failed, or if it does not end."""
        self._stop.set()
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            raise Failure(f"fio did not end within {PATIENCE_S:.0f} seconds\n{scene()}")
        self.check()

    def check(self) -> None:
        """Failure if fio complained so far."""
        if self.error:
            raise Failure(self.error)


class Storm:
    """One device under fire."""

    def __init__(self, name: str, words: list[str], rng: random.Random, options: argparse.Namespace) -> None:
        self.name = name
        self._rng = rng
        path = command.ublkd("add", *words, "-q", QUEUES, "-d", 64, *command.LIMITLESS)
        self.path = path
        self.id = int(path.removeprefix("/dev/ublkb"))
        self.counters = watch.Counters(self.id)
        self._contents = rng.randbytes(STILL)
        _store(path, self._contents)
        self._warm = command.Warm()
        self._recovering = False
        self._cold: subprocess.Popen[bytes] | None = None
        self._turn = 0
        self.complaints: list[str] = []
        self.kills: dict[str, int] = {"supervisor": 0, "worker": 0}
        self.recoveries: dict[str, int] = {"supervisor": 0, "worker": 0}
        self.times: dict[str, list[float]] = {"worker": [], "supervisor": [], "during recovery": [], "everything": []}
        self.samples: list[dict[str, int]] = []
        self._survived = 0
        self.load = Load(path, options.rate, options.job_mib * MIB)

    # What systemd would do

    def _keep_supervised(self) -> None:
        """Start `ublkd recover` whenever there is no supervisor; call it often."""
        if self._cold is not None and self._cold.poll() is None:
            return
        if self._recovering:
            answer = self._warm.done()
            if answer is None:
                return
            self._recovering = False
            if answer:
                self.complaints.append(answer)
                time.sleep(0.05)
        if not inventory.alive(self.counters.supervisor(), None) and "supervisor" not in self._tree().values():
            self._warm.start("recover", self.id)
            self._recovering = True
            self.recoveries["supervisor"] += 1

    def _tree(self) -> dict[int, str]:
        return watch.tree(self.id, self.counters.supervisor())

    def _await_first_request(self, old: set[int], since: float) -> float:
        """Seconds from then to the first request that a new worker answered."""
        first = watch.FirstRequest(self.counters, old)
        check = 0.0
        while not first.seen():
            now = watch.now()
            if now >= check:
                self._keep_supervised()
                self.load.check()
                check = now + 0.05
            if now - since > PATIENCE_S:
                raise Failure(f"no request was answered within {PATIENCE_S:.0f} seconds of a kill\n{self._scene()}")
            time.sleep(0.001)
        return watch.now() - since

    # Killing

    def _settled(self) -> dict[int, str]:
        """The whole tree, once it is there."""
        deadline = watch.now() + PATIENCE_S
        while True:
            found = self._tree()
            if sorted(found.values()) == [*(f"q{n}" for n in range(QUEUES)), "supervisor"]:
                return found
            self._keep_supervised()
            self.load.check()
            if watch.now() > deadline:
                raise Failure(f"the device is not served again; there is {found}\n{self._scene()}")
            time.sleep(0.01)

    def _shoot(self, found: dict[int, str], workers_only: bool) -> tuple[str, float] | None:
        victims = sorted(pid for pid, what in found.items() if not workers_only or what != "supervisor")
        if not victims:
            return None
        pid = self._rng.choice(victims)
        what = "supervisor" if found[pid] == "supervisor" else "worker"
        at = watch.now()
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return None
        self.kills[what] += 1
        self._survived = 0 if what == "supervisor" else self._survived + 1
        return what, at

    def kill(self, workers_only: bool = False) -> int:
        """One or two kills, and the recovery after them: how many."""
        found = self._settled()
        self._turn += 1
        if self._turn % 4 == 1 or workers_only:
            self._sample(found)
        old = set(found)
        time.sleep(self._rng.uniform(0, 0.3))
        shot = self._shoot(self._tree(), workers_only)
        if shot is None:
            return 0
        count, label = 1, shot[0]
        if not workers_only and self._rng.random() > PLAIN:
            # again, somewhere within the recovery
            until = watch.now() + self._rng.uniform(0, 0.6)
            while watch.now() < until:
                self._keep_supervised()
                time.sleep(0.005)
            alive = self._tree()
            again = self._shoot(alive, False)
            if again:
                old |= set(alive)
                count, label, shot = 2, "during recovery", again
        self.times[label].append(self._await_first_request(old, shot[1]))
        if label == "worker":
            self.recoveries["worker"] += 1
        return count

    def restart_everything(self) -> None:
        """What a server of one process has for a crash: all of it dies, a new one is started."""
        found = self._settled()
        time.sleep(self._rng.uniform(0, 0.3))
        at = watch.now()
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        # a new program, as a service manager starts it
        self._cold = subprocess.Popen(
            command.argv("recover", self.id), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.times["everything"].append(self._await_first_request(set(found), at))

    def _scene(self) -> str:
        """What there is to see of a device that does not go on."""
        sys_dir = Path(f"/sys/block/ublkb{self.id}")
        facts = {name: (sys_dir / name).read_text().split() for name in ("inflight", "stat")}
        facts |= {"queues": self.counters.queues(), "entry": inventory.device(self.id), "said": self.complaints}
        for path in sorted(Path(f"/sys/kernel/debug/block/ublkb{self.id}").glob("**/*")):
            if path.name in ("state", "busy", "dispatch", "requeue_list", "pm_only"):
                facts[str(path)] = path.read_text().split("\n")[:20]
        return "\n".join([*(f"{name}: {value}" for name, value in facts.items()), leaks.stacks()])

    # Accounts

    def _sample(self, found: dict[int, str]) -> None:
        supervisor = next(pid for pid, what in found.items() if what == "supervisor")
        self.samples.append(
            {
                "survived": self._survived,
                "supervisor_pss_kib": watch.pss_kib(supervisor, huge=False),
                "workers_pss_kib": sum(
                    watch.pss_kib(pid, huge=False) for pid, what in found.items() if what != "supervisor"
                ),
                "supervisor_files": watch.open_files(supervisor),
                "slab_unreclaimable_kib": watch.meminfo("SUnreclaim")["SUnreclaim"],
            }
        )

    def end(self) -> dict[str, Any]:
        """Let fio finish, look at the disk once more, remove the device: the account. Failure if anything is wrong."""
        self._settled()
        self.load.finish(self._scene)
        if hashlib.sha256(_fetch(self.path)).digest() != hashlib.sha256(self._contents).digest():
            raise Failure("bytes changed that nobody wrote to")
        if self._recovering:
            self._warm.wait()
        self._warm.close()
        if self._cold is not None:
            self._cold.wait()
        command.ublkd("del", self.id)
        left = leaks.find()
        if left:
            raise Failure("left behind: " + ", ".join(left))
        return {
            "subject": self.name,
            "kills": sum(self.kills.values()),
            "killed": self.kills,
            "recoveries": self.recoveries,
            "refused_recoveries": sorted(set(self.complaints)),
            "fio_passes": self.load.passes,
            "verified_bytes": self.load.verified_bytes,
            "longest_request_ms": round(max(self.load.stalls_ms, default=0), 1),
            "seconds_to_first_request": {what: spread(found) for what, found in self.times.items() if found},
            "times": {what: [round(value, 4) for value in found] for what, found in self.times.items()},
            "memory": memory(self.samples),
            "samples": self.samples,
        }


def _store(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, data, 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def _fetch(path: str) -> bytes:
    done = subprocess.run(
        ["dd", f"if={path}", "bs=1M", f"count={STILL // MIB}", "iflag=direct", "status=none"],
        stdout=subprocess.PIPE,
        check=True,
    )
    return done.stdout


def spread(values: list[float]) -> dict[str, float]:
    """Least, quantiles, most."""
    ordered = sorted(values)

    def at(part: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(part * len(ordered)))], 4)

    return {"n": len(ordered), "min": at(0), "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1)}


def memory(samples: list[dict[str, int]]) -> dict[str, dict[str, float]]:
    """Each account's median in the first and the last quarter."""
    quarter = max(1, len(samples) // 4)
    found = {}
    for what in samples[0] if samples else ():
        if what != "survived":
            first = statistics.median(sample[what] for sample in samples[:quarter])
            last = statistics.median(sample[what] for sample in samples[-quarter:])
            found[what] = {"first": first, "last": last}
    return found


# By how much a median may be above what it was: noise, or a leak. KiB; descriptors.
ALLOWED = {
    "supervisor_pss_kib": (0.08, 768),
    "workers_pss_kib": (0.25, 8192),
    "supervisor_files": (0.0, 2),
    "slab_unreclaimable_kib": (0.05, 3072),
}


def growth(accounts: dict[str, dict[str, float]]) -> list[str]:
    """What has grown, in words."""
    found = []
    for what, (part, more) in ALLOWED.items():
        account = accounts.get(what, {"first": 0, "last": 0})
        if account["last"] > account["first"] * (1 + part) + more:
            found.append(f"{what} grew from {account['first']:.0f} to {account['last']:.0f}")
    return found


def storm(name: str, words: list[str], options: argparse.Namespace, image: Path, share: int) -> dict[str, Any]:
    """All that happens to one subject."""
    seconds = options.minutes * 60 / len(options.subjects.split(","))
    rng = random.Random(f"{options.seed} {name}")
    image.unlink(missing_ok=True)
    with open(image, "wb") as file:
        file.truncate(SIZE)
    storm = Storm(name, [word.format(image=image) for word in words], rng, options)
    began = watch.now()
    killed = said = 0
    try:
        if share == 0:
            time.sleep(8)  # no kills: only what fio finds
        while killed < share and watch.now() < began + seconds:
            killed += storm.kill()
            if killed // 20 > said:
                said = killed // 20
                print(f"{name}: {killed} of {share} kills, {watch.now() - began:.0f} s", flush=True)
        if name == options.subjects.split(",")[0] and share:
            # One supervisor through many deaths, where what it might lose each time adds up; and the comparison.
            before = len(storm.samples)
            for _ in range(options.steady):
                if watch.now() > began + seconds * 1.25:
                    break
                storm.kill(workers_only=True)
            steady = storm.samples[before + 1 :]
            print(f"{name}: {len(steady)} kills under one supervisor, {watch.now() - began:.0f} s", flush=True)
            for _ in range(options.restarts):
                storm.restart_everything()
                print(f"{name}: a restart of everything, {watch.now() - began:.0f} s", flush=True)
            print(f"{name}: {options.restarts} restarts of everything, {watch.now() - began:.0f} s", flush=True)
        else:
            steady = []
        account = storm.end()
    except BaseException:
        storm.load._stop.set()
        leaks.clean()
        raise
    account["steady_memory"] = memory(steady)
    account["seconds"] = round(watch.now() - began, 1)
    if share >= 40 and (found := growth(account["memory"])):
        raise Failure(f"{name}: {', '.join(found)}")
    if len(steady) >= 40 and (found := growth(account["steady_memory"])):
        raise Failure(f"{name}, one supervisor: {', '.join(found)}")
    return account


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"kernel {report['kernel']}, seed {report['seed']}: {report['kills']} kills in {report['seconds']:.0f} s, "
        f"{report['verified_bytes'] / MIB:.0f} MiB verified, "
        + (report["failure"] or "no I/O error, no mismatch, nothing left"),
        "",
        f"{'subject':14} {'killed':16} {'n':>5} {'min':>7} {'p50':>7} {'p90':>7} {'p99':>7} {'max':>7}   "
        "(seconds from a kill to the first request answered)",
    ]
    for account in report["subjects"]:
        for what, found in account["seconds_to_first_request"].items():
            numbers = " ".join(f"{found[key]:7.3f}" for key in ("min", "p50", "p90", "p99", "max"))
            lines.append(f"{account['subject']:14} {what:16} {found['n']:5} {numbers}")
    lines += ["", f"{'subject':14} {'account':24} {'first quarter':>14} {'last quarter':>14}   (medians)"]
    for account in report["subjects"]:
        for title in ("memory", "steady_memory"):
            for what, found in account[title].items():
                which = what if title == "memory" else f"{what}, one supervisor"
                lines.append(f"{account['subject']:14} {which:40} {found['first']:10.0f} {found['last']:10.0f}")
    return "\n".join(lines)


def main() -> int:
    """Entry point."""
    parse = arguments(__doc__)
    parse.add_argument("--kills", type=int, default=15)
    parse.add_argument("--rate", type=int, default=40, help="fio's requests per second and queue")
    parse.add_argument("--job-mib", type=int, default=1, help="what fio writes on a queue before it verifies")
    parse.add_argument("--steady", type=int, default=0, help="more kills, of one supervisor's workers")
    parse.add_argument("--restarts", type=int, default=2, help="plain restarts of everything, to compare with")
    parse.add_argument("--self-check", action="store_true", help="see first that a bad server is caught")
    parse.add_argument("--minutes", type=float, default=600, help="kill for at most this long")
    parse.add_argument("--subjects", default=",".join(SUBJECTS))
    options = parse.parse_args()
    [disk, *_] = disks.names()
    image = disks.Scratch(disk).directory() / "disk.img"
    subjects = {name: {**SUBJECTS, **BROKEN}[name] for name in options.subjects.split(",")}
    report = Report("kill storm", options, queues=QUEUES, subjects=[])
    errors = KernelErrors()
    left = options.kills
    with report.failing_on(Failure, AssertionError):
        if options.self_check:
            see_the_liar(options, image)
            errors.forget()
        for number, (name, words) in enumerate(subjects.items()):
            share = left // (len(subjects) - number)
            left -= share
            report["subjects"].append(storm(name, words, options, image, share))
            errors.check()
    report["kills"] = sum(account["kills"] for account in report["subjects"])
    report["verified_bytes"] = sum(account["verified_bytes"] for account in report["subjects"])
    return report.finish(table)


def see_the_liar(options: argparse.Namespace, image: Path) -> None:
    """Failure unless a server that forgets writes is caught."""
    caught = ""
    try:
        storm("forgetful", BROKEN["forgetful"], options, image, 0)
    except Failure as e:
        caught = str(e)
    if "fio ended with" not in caught:
        raise Failure(f"a server that forgets writes was not caught: {caught}")
    print("self-check: a server that forgets writes is caught", flush=True)


if __name__ == "__main__":
    sys.exit(main())
