# SPDX-License-Identifier: Apache-2.0
"""scripts/bench: what it tells fio, what it reads from fio and /proc, and its tables."""

from __future__ import annotations

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from benchlib import cli, fio, kublk, measure, plot, processes, report, scaling, subjects, system
from benchlib.subjects import SUBJECTS, NbdkitPython, Subject, Ublkd, added, expand

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

    def test_a_job_on_each_cpu(self) -> None:
        text = fio.job_file("/dev/ram0", 1 << 27, 400, [], fio.CELLS[:1], [0, 2], warm_up=False)
        assert "numjobs=2\ncpus_allowed=0,2\ncpus_allowed_policy=split\n" in text
        assert fio.WARM_UP not in text

    def test_reads_and_writes_are_one_figure(self) -> None:
        mixed = {key: value for key, value in job().items() if key not in ("read", "write")}
        assert fio.parse(fio_output(mixed | {"mixed": JOB["read"]}))["read-4k-1"]["iops"] == 9614.25

    def test_which_cells_write(self) -> None:
        assert {cell.key for cell in fio.CELLS if not cell.writes} == {
            "read-4k-1",
            "read-4k-32",
            "read-4k-128",
            "read-128k-8",
            "read-1m-4",
        }


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

    def test_all_cpu_time_of_a_process(self) -> None:
        assert processes.total_cpu_ns(os.getpid()) > 0

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


RUN = {
    "command": "scripts/bench",
    "date": "2026-01-01",
    "commit": "0123abc",
    "span": 1 << 27,
    "milliseconds": 400,
    "repeats": 3,
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
        "format": 2,
        "kernel": "7.2.12",
        "cpus": 1,
        "clock": "instructions",
        "runs": dict.fromkeys(("speed", "queues", "devices"), RUN),
        "versions": {"fio": "3.33"},
        "cells": cells,
        "subjects": {name: {"title": name, "against": SUBJECTS[name].against} for name in subjects},
        "skipped": {"brd": "this kernel has no brd"},
        "samples": samples,
        "memory": [{"when": "fresh", "subject": "null", "supervisor": memory, "workers": workers}],
        "queues": {
            "counts": [1, 2],
            "cells": cells,
            "samples": {"null": {"1": {"read-4k-1": [25000.0] * 3}, "2": {"read-4k-1": [20000.0] * 3}}},
        },
        "devices": [
            {
                "devices": 1,
                "start_ms": 500.0,
                "slowest_start_ms": 600.0,
                "start_cpu_ms": 450.0,
                "supervisor_pss_kib": 9000.0,
                "workers_pss_kib": 8000.0,
                "machine_kib": 20000,
                "counters_kib": 16.0,
            }
        ],
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

    def test_the_best_of_several(self) -> None:
        result = result_of(**{"null-no-zero": [3000.0], "kublk-null": [2000.0], "kublk-null-batch": [4000.0]})
        assert report.pairs(result) == [("null-no-zero", "kublk-null*")]
        assert report.ratio_table(result).splitlines()[2] == "| null-no-zero / best kublk-null |             0.75 |"

    def test_figures(self) -> None:
        result = result_of(null=[1000, 3000, 2000], null_blk=[4000, 4000, 9000])
        iops, server = report.iops_table(result).splitlines(), report.server_table(result).splitlines()
        assert iops[2].split("|")[2].strip() == "2000 ±50.0 %"
        assert iops[3].split("|")[2].strip() == "4000 ±62.5 %"
        assert server[2].split("|")[2].strip() == "10.0"
        assert len(server) == 3  # a kernel disk has no server

    def test_latency(self) -> None:
        result = result_of(null=[1.0])
        result["samples"]["null"]["read-4k-1"] = [{"iops": 1.0, "p50_us": 9.6, "p99_us": 20.0, "p999_us": 31.0}]
        assert report.latency_table(result).splitlines()[2].split("|")[2].strip() == "10 / 20 / 31"

    def test_queues(self) -> None:
        result = result_of(null=[1.0])
        row = report.queues_table(result).splitlines()[2]
        assert [cell.strip() for cell in row.split("|")[1:-1]] == ["null", "10000 (1.00)", "12500 (1.25)"]
        result["clock"] = "wall"
        assert "20000 (0.80)" in report.queues_table(result)

    def test_only_the_parts_that_were_measured(self) -> None:
        result = result_of(null=[1.0])
        assert list(report.tables(result)) == ["ratios", "iops", "server", "latency", "queues", "devices", "memory"]
        for part in ("samples", "memory"):
            del result[part]
        assert list(report.tables(result)) == ["queues", "devices"]
        text = report.markdown(result, "vm-7.2.12", ["vm-7.2.12-devices.png"])
        assert "![More devices](vm-7.2.12-devices.png)" in text and "What was measured" not in text

    def test_memory_per_worker_is_the_mean(self) -> None:
        line = report.memory_table(result_of(null=[1.0])).splitlines()[-1]
        what, who, pss = (cell.strip() for cell in line.split("|")[1:4])
        assert (what, who, pss) == ("null, fresh, 2 workers", "per worker", "200")

    def test_markdown(self) -> None:
        result = result_of(null=[1.0], null_blk=[2.0])
        text = report.markdown(result, "vm-7.2.12", ["vm-7.2.12-ratios.png"])
        assert "![Ratios](vm-7.2.12-ratios.png)" in text
        assert "Scheduler `none` for all" in text
        assert "* brd was not measured: this kernel has no brd" in text
        assert "* `scripts/bench`, 2026-01-01, commit 0123abc (speed, queues, devices): 400 ms per cell" in text

    def test_parts_of_an_earlier_run_stay(self) -> None:
        earlier, later = result_of(null=[1.0]), result_of(null=[2.0])
        later["runs"] = {"speed": RUN | {"command": "scripts/bench --parts speed"}}
        later["memory"] = [later["memory"][0] | {"when": "after the run"}]
        del later["queues"], later["devices"]
        joined = report.join(later, earlier)
        assert joined["samples"] == later["samples"] and joined["queues"] == earlier["queues"]
        assert [entry["when"] for entry in joined["memory"]] == ["after the run", "fresh"]
        assert "commit 0123abc (queues, devices)" in report.markdown(joined, "x", [])
        assert report.join(later, earlier | {"kernel": "6.12"}) == later
        assert report.join(later, {}) == later


class TestPlot:
    def test_a_picture_per_part(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        result = result_of(null=[1.0, 2.0], null_blk=[2.0, 4.0])
        for samples in result["samples"].values():
            for sample in samples["read-4k-1"]:
                sample |= {"p50_us": 10.0, "p99_us": 20.0, "p999_us": 30.0}
        names = [path.name for path in plot.plot(result, tmp_path / "vm-7.2")]
        assert names == [f"vm-7.2-{what}.png" for what in ("ratios", "server", "latency", "queues", "devices")]
        del result["samples"], result["devices"]
        assert [path.name for path in plot.plot(result, tmp_path / "x")] == ["x-queues.png"]


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
        assert all(expand(other) for kind in SUBJECTS.values() for other in kind.against)


class TestPeers:
    # as kublk, ublksrv and rublk print a device
    ADDED = (
        "dev id 3: nr_hw_queues 1 queue_depth 128 block size 512 dev_capacity 524288000\n"
        "\tmax rq size 1048576 daemon pid 4711 flags 0x42 state LIVE\n"
    )

    def test_what_they_print(self) -> None:
        assert added(self.ADDED) == (3, 4711)

    def test_what_they_print_when_they_fail(self) -> None:
        with pytest.raises(system.BenchError, match="it added no device but said: dev id 3: gone"):
            added("dev id 3:\n gone")
        with pytest.raises(system.BenchError, match="nothing"):
            added("")

    def test_one_on_path(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        ran: list[tuple[str, ...]] = []

        def run(*words: str) -> str:
            ran.append(words)
            return self.ADDED

        program = tmp_path / "rublk"
        program.touch(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(subjects, "run", run)
        monkeypatch.setattr(subjects, "wait_for", lambda *_: None)
        subject = SUBJECTS["rublk-null-zc"]()
        lab = system.Lab(1 << 20)
        assert subject.setup(lab) == "/dev/ublkb3" and subject.pids() == [4711]
        assert ran == [(str(program), "add", "null", "-z", "-q", "1", "-d", "128")]
        assert "ublkd-bench" not in "".join(map(str, ran))

    def test_the_reason_that_one_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setattr(subjects.Path, "exists", lambda path: True)
        assert SUBJECTS["ublksrv-null"]().missing() == "there is no ublk on PATH"


class TestKublk:
    def test_package_of_a_kernel(self) -> None:
        assert kublk.package("7.2.12+deb14-amd64") == "linux-source-7.2"
        assert kublk.package("6.1.0-56-amd64") == "linux-source-6.1"
        with pytest.raises(system.BenchError, match=r"7\.1\.3 is no kernel of Debian's"):
            kublk.package("7.1.3")

    def test_where_it_is(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert kublk.find("7.2.12") == ("", "it is not built: run scripts/bench --fetch")
        directory = tmp_path / "ublkd" / "kublk" / "7.2.12"
        directory.mkdir(parents=True)
        (directory / "absent").write_text("linux-source-7.2: it has no ublk selftest\n")
        assert kublk.find("7.2.12") == ("", "linux-source-7.2: it has no ublk selftest")
        (directory / "kublk").touch(0o755)
        assert kublk.find("7.2.12") == (str(directory / "kublk"), "")


class TestScaling:
    def test_jobs_run_where_workers_do(self) -> None:
        subject = SUBJECTS["memory"]()
        assert isinstance(subject, Ublkd)
        subject.queues, subject.shown = 2, {"workers": [{"cpu": 0}, {"cpu": 2}]}
        assert scaling.job_cpus(subject, "/dev/ublkb0") == [0, 2]

    def test_jobs_run_where_queues_are_fed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for queue, cpus in (("0", "0, 1"), ("1", "2, 3"), ("2", "0, 1, 2, 3")):
            (tmp_path / "mq" / queue).mkdir(parents=True)
            (tmp_path / "mq" / queue / "cpu_list").write_text(f"{cpus}\n")
        monkeypatch.setattr(scaling, "block", lambda device: tmp_path)
        subject = SUBJECTS["null_blk"]()
        subject.queues = 2
        assert scaling.job_cpus(subject, "/dev/nullb0") == [0, 2]
        # one queue, whatever was asked for
        for queue in ("1", "2"):
            (tmp_path / "mq" / queue / "cpu_list").unlink()
            (tmp_path / "mq" / queue).rmdir()
        assert scaling.job_cpus(subject, "/dev/loop0") == [0, 1]


class TestProgress:
    def test_time_that_is_left(self) -> None:
        times = iter([100.0, 220.0, 221.0])
        clock = system.Clock(lambda: next(times))
        assert clock.stamp("bench: turn 1 of 4: null") == "bench: turn 1 of 4: null"
        assert clock.stamp("bench: turn 2 of 4: null") == "bench: turn 2 of 4: null (6 min left)"
        assert clock.stamp("vm: kernel 7.2") == "vm: kernel 7.2"
        assert clock.stamp("bench: queues 1 of 9: null") == "bench: queues 1 of 9: null"


class TestFailingPeer:
    def test_is_left_out_with_the_reason(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        done: list[str] = []

        def take(device: str, *_: object) -> dict[str, Any]:
            done.append(device)
            if device == "brd" and len(done) > 2:
                raise system.BenchError("fio failed: EIO")
            return {"read-4k-1": {"iops": 1.0}}

        monkeypatch.setattr(measure.fio, "measure", take)
        monkeypatch.setattr(Subject, "reset_page_cache", lambda self: None)
        chosen: dict[str, Subject] = {name: SUBJECTS[name]() for name in ("null_blk", "brd")}
        devices = {name: name for name in chosen}
        skipped: dict[str, str] = {}
        lab = system.Lab(1 << 20)
        lab.directory = tmp_path
        rounds = (chosen, devices, lab, fio.CELLS[:1], 3, 10)
        samples = measure._rounds(*rounds, [], skipped, lambda: False)
        assert list(samples) == list(chosen) == ["null_blk"] and len(samples["null_blk"]["read-4k-1"]) == 3
        assert skipped == {"brd": "it failed in round 2: fio failed: EIO"}

    def test_one_that_was_named_ends_it(self) -> None:
        with pytest.raises(system.BenchError, match="brd: gone"):
            measure._drop(SUBJECTS["brd"](), system.BenchError("gone"), named=True)

    def test_no_round_is_begun_too_late(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(measure.fio, "measure", lambda *_: {"read-4k-1": {"iops": 1.0}})
        monkeypatch.setattr(Subject, "reset_page_cache", lambda self: None)
        lab = system.Lab(1 << 20)
        lab.directory = tmp_path
        chosen: dict[str, Subject] = {"brd": SUBJECTS["brd"]()}
        rounds = (chosen, {"brd": "brd"}, lab, fio.CELLS[:1], 3, 10)
        assert len(measure._rounds(*rounds, [], {}, lambda: True)["brd"]["read-4k-1"]) == 1


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
            (["--targets", "nul"], "there is no target 'nul'; there are null,"),
            (["--cells", "read-4k-1,read"], "there is no cell 'read'; there are read-4k-1,"),
            (["--parts", "all"], "there is no part 'all'; there are speed,"),
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

    def test_render_needs_what_was_measured(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("matplotlib")
        assert cli.main(["--render", "--out", str(tmp_path / "x")]) == 1
        assert "there must be a NAME.json" in capsys.readouterr().err
        (tmp_path / "x.json").write_text(json.dumps(result_of(null=[1.0], null_blk=[2.0])))
        assert cli.main(["--render", "--out", str(tmp_path / "x")]) == 0
        assert "0.50" in (tmp_path / "x.md").read_text()

    def test_no_rounds_after_the_minutes(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        now = [0.0]
        monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
        late = cli._late(cli.parser().parse_args(["--minutes", "2"]))
        always = cli._late(cli.parser().parse_args([]))
        now[0] = 119.0
        assert not late()
        now[0] = 121.0
        assert late() and not always()
        monkeypatch.setenv("UBLKD_VM_SHARE", str(tmp_path))
        inside = cli._late(cli.parser().parse_args(["--inside", "--minutes", "2"]))
        assert not inside()
        (tmp_path / "late").touch()
        assert inside()

    def test_list(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["--list"]) == 0
        listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
        assert {*SUBJECTS, *cli.PARTS, *(cell.key for cell in fio.CELLS)} <= listed

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
