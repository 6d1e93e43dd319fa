# SPDX-License-Identifier: Apache-2.0
"""scripts/bench: what it tells fio, what it reads from fio and /proc, and its tables."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benchlib import cli, fio, measure, processes, report, system
from benchlib.subjects import SUBJECTS, NbdkitPython, Subject, Ublkd

# One job as fio 3.33 prints it, without what is not read.
JOB: dict[str, Any] = {
    "jobname": "read-4k-1",
    "error": 0,
    "read": {
        "iops": 9614.25,
        "bw_bytes": 39379968,
        "total_ios": 3846,
        "runtime": 400,
        "clat_ns": {"percentile": {"50.000000": 101888, "99.000000": 120320, "99.900000": 150528}},
    },
    "write": {"iops": 0.0, "bw_bytes": 0, "total_ios": 0, "runtime": 0, "clat_ns": {}},
}


def fio_output(*jobs: dict[str, Any]) -> str:
    return json.dumps({"fio version": "fio-3.33", "jobs": list(jobs)})


def job(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(JOB) | changes


class TestFio:
    def test_sample(self) -> None:
        assert fio.parse(fio_output(job())) == {
            "read-4k-1": {
                "iops": 9614.25,
                "bytes_per_s": 39379968,
                "ios": 3846,
                "seconds": 0.4,
                "p50_us": 101.888,
                "p99_us": 120.32,
                "p999_us": 150.528,
            }
        }

    def test_write_job(self) -> None:
        swapped = job(jobname="write-4k-32", read=JOB["write"], write=JOB["read"])
        assert fio.parse(fio_output(swapped))["write-4k-32"]["iops"] == 9614.25

    def test_warm_up_is_no_cell(self) -> None:
        assert list(fio.parse(fio_output(job(jobname=fio.WARM_UP), job()))) == ["read-4k-1"]

    def test_warnings_before_the_json(self) -> None:
        assert fio.parse("note: both iodepth >= 1 and synchronous\n" + fio_output(job()))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("fio: failed parsing size=x", "fio printed no result but: fio: failed parsing size=x"),
            ("", "fio printed no result but: nothing"),
            ('{"jobs": [', "fio printed no result"),
            (fio_output(job(error=5)), "job read-4k-1 failed with error 5"),
            (fio_output(job(read=JOB["write"])), "did no I/O"),
        ],
    )
    def test_failures(self, text: str, message: str) -> None:
        with pytest.raises(system.BenchError, match=message):
            fio.parse(text)

    def test_job_file(self) -> None:
        text = fio.job_file("/dev/ublkb0", 1 << 27, 400, [10, 11])
        assert "filename=/dev/ublkb0\nsize=134217728\n" in text
        assert text.count("runtime=400ms") == len(fio.CELLS)
        assert text.count("exec_prerun=grep -H . /proc/10/task/*/schedstat /proc/11/task/") == len(fio.CELLS)
        assert text.count("exec_postrun=") == len(fio.CELLS)

    def test_a_disk_without_a_server(self) -> None:
        assert "exec_" not in fio.job_file("/dev/ram0", 1 << 27, 400, [])


class TestProcesses:
    def test_cpu_time_of_all_threads(self) -> None:
        before = "/proc/10/task/10/schedstat:1000 50 3\n/proc/11/task/11/schedstat:5000 0 1\n"
        after = (
            "/proc/10/task/10/schedstat:1500 50 4\n"
            "/proc/11/task/11/schedstat:9000 0 2\n"
            "/proc/11/task/12/schedstat:200 0 1\n"
        )
        assert processes.cpu_ns(before, after) == 500 + 4000 + 200

    def test_a_thread_that_ended_counts_nothing(self) -> None:
        before = "/proc/10/task/10/schedstat:1000 50 3\n/proc/10/task/12/schedstat:700 0 1\n"
        assert processes.cpu_ns(before, "/proc/10/task/10/schedstat:1500 50 4\n") == 500

    def test_smaps_rollup(self) -> None:
        text = (
            "55a0-7ffd ---p 00000000 00:00 0    [rollup]\n"
            "Rss:               20000 kB\nPss:               11001 kB\nPss_Dirty:          9000 kB\n"
            "Pss_Anon:           9634 kB\nPss_File:           1361 kB\nPss_Shmem:             6 kB\n"
            "Private_Dirty:      2920 kB\n"
        )
        assert processes.parse_memory(text) == {
            "rss": 20000,
            "pss": 11001,
            "pss_anon": 9634,
            "pss_file": 1361,
            "pss_shmem": 6,
            "private_dirty": 2920,
        }


def result_of(**subjects: list[float]) -> dict[str, Any]:
    """A result with one cell and these IOPS; all but kernel disks have a server that takes 10 us."""
    cells = [fio.CELLS[0]._asdict()]
    samples = {}
    for name, values in subjects.items():
        server = {"server_us": 10.0} if name in ("null", "loop") else {}
        samples[name] = {cells[0]["key"]: [{"iops": iops} | server for iops in values]}
    memory = {field: 100 for field in ("pss", "pss_anon", "pss_file", "pss_shmem", "private_dirty")}
    workers = [{**memory, "pss": pss} for pss in (100, 300)]
    return {
        "kernel": "7.2.12",
        "cpus": 1,
        "clock": "instructions",
        "command": "scripts/bench",
        "date": "2026-01-01",
        "commit": "0123abc",
        "versions": {"fio": "3.33"},
        "span": 1 << 27,
        "milliseconds": 400,
        "repeats": 3,
        "cells": cells,
        "subjects": {name: {"title": name, "against": SUBJECTS[name].against} for name in subjects},
        "skipped": {"brd": "this kernel has no brd"},
        "samples": samples,
        "memory": [{"when": "fresh", "subject": "null", "supervisor": memory, "workers": workers}],
    }


class TestReport:
    def test_ratio_of_medians(self) -> None:
        result = result_of(null=[1000, 3000, 2000], null_blk=[4000, 4000, 9000])
        assert report.ratio(result, "null", "null_blk", "read-4k-1") == 0.5
        assert report.ratio_table(result).splitlines() == [
            "| IOPS ratio      | 4k read, depth 1 |",
            "| --------------- | ---------------: |",
            "| null / null_blk |             0.50 |",
        ]

    def test_only_what_was_measured_is_compared(self) -> None:
        assert report.pairs(result_of(null=[1.0], loop=[1.0], null_blk=[1.0])) == [("null", "null_blk")]

    def test_figures(self) -> None:
        result = result_of(null=[1000, 3000, 2000], null_blk=[4000, 4000, 9000])
        lines = report.figures_table(result).splitlines()
        assert lines[2].split("|")[2].strip() == "2000 [1000-3000] 10.0"
        assert lines[3].split("|")[2].strip() == "4000 [4000-9000] -"

    def test_memory_per_worker_is_the_mean(self) -> None:
        line = report.memory_table(result_of(null=[1.0])).splitlines()[-1]
        what, who, pss = (cell.strip() for cell in line.split("|")[1:4])
        assert (what, who, pss) == ("null, fresh, 2 workers", "per worker", "200")

    def test_markdown(self) -> None:
        text = report.markdown(result_of(null=[1.0], null_blk=[2.0]), "vm-7.2.12")
        assert "![ratios and server time](vm-7.2.12.png)" in text
        assert "Scheduler `none` for all" in text
        assert "* brd was not measured: this kernel has no brd" in text


class TestChoose:
    def test_a_target_brings_what_it_is_compared_with(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.have_all(monkeypatch)
        chosen, skipped = measure.choose(["python"])
        assert (sorted(chosen), skipped) == (["memory", "nbdkit-python", "python"], {})

    def test_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.have_all(monkeypatch)
        assert list(measure.choose([])[0]) == list(SUBJECTS)

    def test_a_peer_may_be_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.have_all(monkeypatch)
        monkeypatch.setattr(NbdkitPython, "missing", lambda self: "no nbd")
        chosen, skipped = measure.choose([])
        assert "nbdkit-python" not in chosen and skipped == {"nbdkit-python": "no nbd"}

    def test_one_that_was_named_may_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.have_all(monkeypatch)
        monkeypatch.setattr(NbdkitPython, "missing", lambda self: "no nbd")
        with pytest.raises(system.BenchError, match="nbdkit-python can't be measured: no nbd"):
            measure.choose(["nbdkit-python"])

    @staticmethod
    def have_all(monkeypatch: pytest.MonkeyPatch) -> None:
        for kind in (*SUBJECTS.values(), Subject, Ublkd):
            monkeypatch.setattr(kind, "missing", lambda self: "")

    def test_every_comparison_exists(self) -> None:
        assert {other for kind in SUBJECTS.values() for other in kind.against} <= set(SUBJECTS)


class TestLab:
    def test_undoes_everything_last_first(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(system.tempfile, "mkdtemp", lambda **_: str(tmp_path / "lab"))
        (tmp_path / "lab").mkdir()
        undone: list[int] = []

        def fail() -> None:
            raise system.BenchError("rmmod failed: in use")

        left = pytest.raises(system.BenchError, match="something is left behind: rmmod failed: in use")
        with left, system.Lab(1 << 20) as lab:
            lab.later(undone.append, 1)
            lab.later(fail)
            lab.later(undone.append, 2)
        assert undone == [2, 1] and not (tmp_path / "lab").exists()

    def test_the_first_failure_is_the_one_to_tell(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(system.tempfile, "mkdtemp", lambda **_: str(tmp_path / "lab"))
        # its directory isn't there, so it can't be removed
        with pytest.raises(system.BenchError, match="fio failed"), system.Lab(1 << 20):
            raise system.BenchError("fio failed")
        assert "something is left behind" in capsys.readouterr().err


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--targets", "nul"], "there is no 'nul'; there are null,"),
            (["--repeats", "0"], "'0' is not a number of at least 1"),
            (["--native", "--kernel", "6.12"], "not allowed with"),
            (["fast"], "unrecognized arguments: fast"),
        ],
    )
    def test_bad_usage(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        err = capsys.readouterr().err
        assert ended.value.code == 2 and err.count("\n") == 1 and message in err

    def test_bad_out(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["--out", str(tmp_path)]) == 1
        assert cli.main(["--out", str(tmp_path / "none" / "x")]) == 1
        first, second = capsys.readouterr().err.splitlines()
        assert "is a directory" in first and "there is no directory" in second

    def test_a_command_that_fails_is_one_line(self) -> None:
        with pytest.raises(system.BenchError, match=r"^sh failed: second$"):
            system.run("sh", "-c", "echo first >&2; echo second >&2; exit 3")
        with pytest.raises(system.BenchError, match="no-such-program is missing"):
            system.run("no-such-program")
