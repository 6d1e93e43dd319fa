# SPDX-License-Identifier: Apache-2.0
"""Workers that don't come round, told from those that have nothing to do or wait for the backing."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lib.device import Device
from lib.tools import MIB, pread, sh, wait_until

SIZE = 64 * MIB
HERE = Path(__file__).resolve().parent


@contextmanager
def waiting(*argv: object) -> Iterator[subprocess.Popen[bytes]]:
    """A program that waits for the disk."""
    process = subprocess.Popen([str(word) for word in argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("policy", ["log", "recover"])
def test_python_code_that_does_not_return(policy: str, serve: Callable[..., Device], tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    device = serve(
        "python",
        f"{HERE}/lib/targets.py:Stuck",
        size=SIZE,
        queues=1,
        params={"gate": str(gate)},
        hang_timeout=1,
        on_hang=policy,
    )
    [worker] = device.workers()
    with waiting("dd", f"if={device.path}", "bs=4096", "skip=256", "count=1", "iflag=direct") as reader:
        [hang] = wait_until(lambda: device.said("worker hangs"), "the hang is seen")
        assert (hang["queue"], hang["pid"], hang["where"]) == (0, worker, "Python code")
        gate.touch()
        assert reader.wait(timeout=60) == 0
    if policy == "log":
        assert device.workers() == [worker]
        wait_until(lambda: device.said("worker came round again"), "its end is seen")
    else:
        wait_until(lambda: device.record["recoveries"], "the worker is replaced")
        [died] = device.said("worker died")
        assert died["reason"] == "worker of queue 0: hung in Python code, killed"


def test_a_stopped_worker(serve: Callable[..., Device]) -> None:
    device = serve("memory", size=SIZE, queues=2, hang_timeout=1, on_hang="log")
    worker = device.workers()[1]
    os.kill(worker, signal.SIGSTOP)
    [hang] = wait_until(lambda: device.said("worker hangs"), "the hang is seen")
    assert (hang["queue"], hang["pid"], hang["where"]) == (1, worker, "a stop signal")
    os.kill(worker, signal.SIGCONT)
    wait_until(lambda: device.said("worker came round again"), "its end is seen")
    assert pread(device.path, 4096, MIB) == bytes(4096) and worker in device.workers()


def test_an_idle_worker_does_not_hang(serve: Callable[..., Device]) -> None:
    """Nor one that is never looked at."""
    watched = serve("null", size=SIZE, queues=2, hang_timeout=1, on_hang="recover")
    alone = serve("null", size=SIZE, queues=1, hang_timeout=0)
    workers, passes = watched.workers(), alone.word("passes")
    before = watched.word("passes")
    time.sleep(4)
    assert watched.word("passes") > before and watched.workers() == workers
    assert not watched.said("worker hangs") and not watched.said("worker died")
    assert alone.word("passes") == passes


@pytest.mark.parametrize("direct", ["on", "off"])
def test_a_backing_that_does_not_answer(direct: str, serve: Callable[..., Device], image: Callable[..., Path]) -> None:
    """It is said once, and nobody is killed for it."""
    backing = image(SIZE)
    device = serve("loop", backing, direct=direct, queues=1, hang_timeout=1, on_hang="recover")
    workers = device.workers()
    mount = sh("findmnt", "-no", "TARGET", "--target", backing).strip()
    frozen = False
    try:
        sh("fsfreeze", "--freeze", mount)
        frozen = True
        with waiting("dd", "if=/dev/zero", f"of={device.path}", "bs=4096", "count=1", "oflag=direct") as writer:
            [said] = wait_until(lambda: device.said("the backing does not answer"), "it is seen")
            assert said["requests"] == 1
            time.sleep(3)
            assert len(device.said("the backing does not answer")) == 1
            assert device.workers() == workers and writer.poll() is None
            sh("fsfreeze", "--unfreeze", mount)
            frozen = False
            assert writer.wait(timeout=60) == 0
        wait_until(lambda: device.said("the backing answers again"), "its end is seen")
    finally:
        if frozen:
            sh("fsfreeze", "--unfreeze", mount)
    assert not device.said("worker hangs") and device.workers() == workers
