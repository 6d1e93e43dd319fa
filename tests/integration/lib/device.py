# SPDX-License-Identifier: Apache-2.0
"""Devices served by ublkd, and its command line, without the price of a new interpreter for each."""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from lib.tools import read, wait_until
from ublkd import inventory, supervisor, targets
from ublkd.config.schema import DeviceSpec
from ublkd.control import uapi
from ublkd.shm import reader


def warm() -> None:
    """Import here what supervisors and commands import when they need it, so that children start with it."""
    from ublkd.cli import VERBS
    from ublkd.targets import TARGETS

    modules = {f"ublkd.cli.{module}" for module, _ in VERBS.values()} | {module for module, _, _ in TARGETS.values()}
    for name in sorted(
        modules | {"ublkd.config.loader", "ublkd.supervisor.supervisor", "structlog", "multiprocessing.shared_memory"}
    ):
        importlib.import_module(name)
    # A supervisor collects garbage before it forks: it need not look at all that pytest has.
    gc.collect()
    gc.freeze()


class Device:
    """A device that a supervisor forked from this process serves."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.id = int(path.removeprefix("/dev/ublkb"))
        self.name = os.path.basename(path)
        self.supervisor: int = self.record["supervisor"]["pid"]
        self.gone = False

    @property
    def record(self) -> dict[str, Any]:
        """The supervisor's record."""
        record = inventory.read_record(self.id)
        assert record is not None, f"{self.path} has no record"
        return record

    @property
    def state(self) -> str:
        """What the driver says."""
        entry = inventory.device(self.id)
        return "gone" if entry is None else str(entry["state"])

    def workers(self) -> list[int]:
        """Pids, by queue."""
        return [worker["pid"] for worker in sorted(self.record["workers"], key=lambda worker: worker["queue"])]

    def await_replacement(self, old: list[int], victim: int, timeout: float = 60) -> None:
        """The dead worker of these has a successor: it alone where queues have servers of their own, else all."""
        replaced = {victim} if self.record["flags"] & uapi.F_SHARDS else set(old)
        wait_until(lambda: not replaced & set(self.workers()), "the workers are replaced", timeout)
        assert set(old) - replaced <= set(self.workers()), "a worker was ended that nothing was wrong with"

    def snapshot(self) -> dict[str, Any]:
        """Counters."""
        return reader.snapshot(self.id)

    def said(self, event: str) -> list[dict[str, Any]]:
        """Events of that name in the supervisor's log."""
        lines = [json.loads(line) for line in read(f"/run/ublkd/{self.id}.log").splitlines()]
        return [line for line in lines if line["event"] == event]

    def word(self, name: str) -> int:
        """A counter word, over all queues."""
        return sum(queue[name] for queue in self.snapshot()["queues"])

    def under_way(self) -> int:
        """Requests that were begun and not answered."""
        return self.word("started") - self.word("completed")

    def ios(self, op: str) -> int:
        """Requests of one kind that were answered."""
        return int(reader.total(self.snapshot())[op]["ios"])

    def stop(self, force: bool = False) -> None:
        """Stop, remove, and see that the supervisor ended well."""
        self.gone = True
        supervisor.stop_device(self.id, force=force)
        status = reap(self.supervisor)
        assert status in (0, -signal.SIGKILL, None), f"the supervisor of {self.path} ended with {status}"

    def kill_supervisor(self) -> None:
        """SIGKILL; returns when the driver has noticed."""
        os.kill(self.supervisor, signal.SIGKILL)
        reap(self.supervisor)
        wait_until(lambda: self.state == "quiesced", "a device without a server is quiesced", 40)


def reap(pid: int) -> int | None:
    """Exit status of a child of ours (negative: a signal), None if it is none."""
    try:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return None


def _usual(target: str, settings: dict[str, Any]) -> dict[str, str]:
    """What UBLKD_TEST_SETTINGS (like transport=copy,batch=on) says that devices have, where they and the test can."""
    words = os.environ.get("UBLKD_TEST_SETTINGS", "").split(",")
    usual = dict(word.split("=", 1) for word in words if word)
    transport = usual.get("transport")
    if transport not in targets.get(target).transports or (transport == "copy" and settings.get("batch") == "on"):
        usual.pop("transport", None)
    unbatched = settings.get("transport") == "copy" or settings.get("on_crash", "requeue") != "requeue"
    if unbatched or "workers_per_queue" in settings:
        usual.pop("batch", None)
    return usual


def start(target: str, file: object = None, **settings: Any) -> Device:
    """Serve a device: four queues unless said otherwise."""
    values = {"queues": 4, "depth": 64, "log_level": "debug", **_usual(target, settings), **settings}
    if file is not None:
        values["file"] = str(file)
    return Device(supervisor.run_background(DeviceSpec(target=target, **values)))


class Result(NamedTuple):
    """What a command line left behind."""

    status: int
    out: str
    err: str


def fork(task: Callable[[], int | None], out: int, err: int) -> int:
    """Run task in a forked child, its output to these descriptors: its pid. It exits with task's result."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        null = os.open(os.devnull, os.O_RDONLY)
        for fd, to in ((null, 0), (out, 1), (err, 2)):
            os.dup2(fd, to)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        status = task() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def in_child(task: Callable[[], int | None]) -> Result:
    """Run task in a forked child, to its end."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = fork(task, out.fileno(), err.fileno())
        try:
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        out.seek(0)
        err.seek(0)
        return Result(status, out.read(), err.read())


def cli(*argv: object, before: Callable[[], object] = lambda: None) -> Result:
    """One ublkd command line, to its end; before() sets its process up."""
    from ublkd.cli import main

    def task() -> int:
        before()
        return main([str(word) for word in argv])

    return in_child(task)


class Foreground:
    """A command line that goes on, such as `ublkd run`."""

    def __init__(self, *argv: object) -> None:
        from ublkd.cli import main

        self._err = tempfile.TemporaryFile("w+")  # noqa: SIM115
        out_r, out_w = os.pipe()
        self.pid = fork(lambda: main([str(word) for word in argv]), out_w, self._err.fileno())
        os.close(out_w)
        self._out = open(out_r)  # noqa: SIM115
        self.status: int | None = None

    def first_line(self) -> str:
        """The first line of its output, once it is there."""
        ready, _, _ = select.select([self._out], [], [], 60)
        assert ready, "no output within a minute"
        return self._out.readline().strip()

    def running(self) -> bool:
        """It has not ended."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is None

    def end(self, number: int, timeout: float = 60) -> Result:
        """Send a signal, and wait for its end; out is what its output held after the first line."""
        if self.running():
            os.kill(self.pid, number)
        wait_until(lambda: not self.running(), "the command ends", timeout)
        assert self.status is not None
        self._err.seek(0)
        return Result(self.status, self._out.read(), self._err.read())

    def close(self) -> None:
        """Nothing of it is left."""
        if self.running():
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self._out.close()
        self._err.close()
