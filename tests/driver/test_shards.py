# SPDX-License-Identifier: Apache-2.0
"""A worker that dies stalls its own queue, and a new one takes it over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import Any

import pytest
from conftest import CLIENTS

KILLS = int(os.environ.get("UBLKD_SHARD_KILLS", "60"))
FIO_INTERRUPTED = 128


class Shards:
    """The C server, asked line by line."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [CLIENTS / "shards"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        self.path = self.process.stdout.readline().strip()

    def ask(self, line: str) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, self.process.stderr.read()
        return dict(json.loads(answer))


@pytest.mark.usefixtures("ours")
def test_killed_workers_lose_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shards = Shards()
    assert shards.path.startswith("/dev/ublkb"), shards.process.communicate()
    fio = subprocess.Popen(
        [
            "fio", "--name=shard", f"--filename={shards.path}", "--numjobs=4", "--group_reporting",
            "--cpus_allowed=0-3", "--cpus_allowed_policy=split", "--ioengine=io_uring", "--direct=1",
            "--rw=randrw", "--bs=4k", "--iodepth=8", "--size=4M", "--offset_increment=16M",
            "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--loops=100000", "--time_based",
            "--runtime=1d", "--output-format=json",
        ],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        while not shards.ask("quiet 500")["done"]:  # fio begins
            assert fio.poll() is None, fio.communicate()[0][-2000:]
        quiet = shards.ask("quiet 3000")["gap_us"]
        killed = shards.ask(f"kill {KILLS}")
        still_running = fio.poll() is None
        fio.send_signal(signal.SIGINT)
        output = fio.communicate(timeout=1200)[0]
    finally:
        fio.kill()
    assert still_running, "fio ended before the kills did: " + output[-2000:]
    assert fio.returncode in (0, FIO_INTERRUPTED), output[-3000:]
    assert json.loads(output[output.index("{") :])["jobs"][0]["error"] == 0
    assert shards.ask("quit")["end"] == 0
    assert shards.process.wait(60) == 0
    assert shards.process.stderr
    assert shards.process.stderr.read() == ""
    with capsys.disabled():
        print(
            f"\n{KILLS} kills: longest gap on a surviving queue {killed['gap_us']} us, without kills {quiet} us; "
            f"takeover {killed['takeover_us']} us, at most {killed['worst_takeover_us']} us"
        )
