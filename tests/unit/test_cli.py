# SPDX-License-Identifier: Apache-2.0
"""The command line, with what lies below it replaced; whole processes where that is the point."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest

import ublkd
from ublkd import cli, inventory
from ublkd.cli import main
from ublkd.config import loader
from ublkd.config.schema import SETTINGS, DeviceSpec
from ublkd.errors import UblkdError
from ublkd.shm import layout, reader

TOP = Path(__file__).parents[2]
# What the installed command does.
START = "import sys; sys.argv[0] = 'ublkd'; from ublkd.__main__ import main; main()"
COMMAND = [sys.executable, "-c", START]
Output = pytest.CaptureFixture[str]


def device(dev_id: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": dev_id,
        "path": f"/dev/ublkb{dev_id}",
        "state": "live",
        "served": True,
        "target": "loop",
        "backing": "/srv/disk.img",
        "size": 4 << 30,
        "queues": 1,
        "depth": 128,
        "block_size": 512,
        "read_only": False,
        "transport": "copy",
        "flags": 0,
        "supervisor": 100,
        "workers": [{"queue": 0, "pid": 101, "cpu": 3}],
        "details": {"direct": True},
        "owner": "ublkd",
        "note": None,
        **changes,
    }


class Supervisor(ModuleType):
    """Keeps what it is asked for."""

    def __init__(self) -> None:
        super().__init__("ublkd.supervisor")
        self.calls: list[tuple[Any, ...]] = []

    @property
    def spec(self) -> DeviceSpec:
        spec = self.calls[-1][1]
        assert isinstance(spec, DeviceSpec)
        return spec

    def run_foreground(self, spec: DeviceSpec, origin: dict[str, Any]) -> int:
        self.calls.append(("run", spec))
        return 0

    def run_background(self, spec: DeviceSpec, origin: dict[str, Any]) -> str:
        self.calls.append(("add", spec))
        return "/dev/ublkb5"

    def plan(self, spec: DeviceSpec) -> dict[str, Any]:
        self.calls.append(("plan", spec))
        return {
            "target": spec.target,
            "size": spec.size,
            "cpus": [{"queue": 0, "cpu": 1}],
            "read_only": False,
        }

    def stop_device(self, dev_id: int, force: bool = False, lazy: bool = False, say: object = None) -> None:
        self.calls.append(("stop", dev_id, force))

    def recover(self, dev_id: int, background: bool = True) -> str:
        self.calls.append(("recover", dev_id, background))
        return f"/dev/ublkb{dev_id}"

    def resize(self, dev_id: int, size: int | None) -> int:
        self.calls.append(("resize", dev_id, size))
        return size or 4096


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Supervisor:
    fake = Supervisor()
    monkeypatch.setitem(sys.modules, "ublkd.supervisor", fake)
    monkeypatch.setattr(ublkd, "supervisor", fake, raising=False)
    monkeypatch.setattr(loader, "DEFAULT_FILE", str(tmp_path / "etc.toml"))
    return fake


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, Any]]:
    """What inventory knows; tests change it."""
    known: dict[int, dict[str, Any]] = {}
    monkeypatch.setattr(inventory, "devices", lambda: list(known.values()))
    monkeypatch.setattr(inventory, "device", known.get)
    monkeypatch.setattr(inventory, "records", lambda: [{"id": dev_id} for dev_id in known])
    monkeypatch.setattr(inventory, "cleanup", list)
    monkeypatch.setattr(inventory, "holders_of", lambda dev_id: [])
    monkeypatch.setattr(
        inventory, "remove_device", lambda dev_id, timeout=30.0, force=False: known.pop(dev_id)
    )
    return known


def error_of(capsys: Output, status: int, *args: str) -> str:
    """The one line that a failing command line prints."""
    assert main(list(args)) == status
    out, err = capsys.readouterr()
    assert out == ""
    line, end, rest = err.partition("\n")
    assert (end, rest) == ("\n", "") and line.startswith("ublkd: error: ")
    return line.removeprefix("ublkd: error: ")


class TestShortForms:
    @pytest.mark.parametrize(
        ("short", "long"),
        [
            ("", "--help"),
            ("-q 8 --cpus 0-7 ./disk", "run loop -q 8 --cpus 0-7 ./disk"),
            ("./disk -q 8", "run loop ./disk -q 8"),
            ("-q8 ./disk", "run loop -q8 ./disk"),
            ("-rq 8 ./disk", "run loop -rq 8 ./disk"),
            ("-rq8 ./disk", "run loop -rq8 ./disk"),
            ("--queues=8 ./disk", "run loop --queues=8 ./disk"),
            ("--direct ./disk", "run loop --direct ./disk"),
            ("-r -- ./disk", "run loop -r -- ./disk"),
            ("-q 8 --cpus 0-7", "run -q 8 --cpus 0-7"),
            ("--config list", "run --config list"),
            ("--json list", "list --json"),
            ("-q 2 add null -d 3", "add -q 2 null -d 3"),
            ("list", "list"),
            ("--version", "--version"),
            ("missing.img", "run loop missing.img"),
        ],
    )
    def test_expansion(self, short: str, long: str) -> None:
        assert cli.expand(short.split()) == long.split()

    def test_existing_file_is_served(
        self, supervisor: Supervisor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "stats").touch()
        cpu = sorted(os.sched_getaffinity(0))[0]
        assert main(["-q", "8", "--cpus", f"{cpu}", "stats"]) == 0
        long = main(["run", "loop", "stats", "-q", "8", "--cpus", f"{cpu}"])
        assert long == 0 and supervisor.calls[0] == supervisor.calls[1]
        assert supervisor.calls[0][0] == "run"
        spec = supervisor.spec
        assert (spec.target, spec.file, spec.queues, spec.cpus) == ("loop", f"{tmp_path}/stats", 8, [cpu])

    @pytest.mark.parametrize(
        ("word", "text"),
        [
            ("lst", "'lst' is neither a verb nor a file (did you mean 'list'?)"),
            ("stats", "'stats' is neither a verb nor a file (did you mean 'stat' or "),
            ("null", "did you mean 'ublkd run null'?"),
            ("xyzzy", "'xyzzy' is neither a verb nor a file (see ublkd --help)"),
        ],
    )
    def test_mistyped_verb_gets_the_nearest(self, capsys: Output, word: str, text: str) -> None:
        assert text in error_of(capsys, 2, word, "-q", "3")

    def test_without_a_word_the_configuration_is_served(self, supervisor: Supervisor, capsys: Output) -> None:
        Path(loader.DEFAULT_FILE).write_text('[device]\ntarget = "null"\ndepth = 7\n')
        assert main(["-q", "2"]) == 0
        assert (supervisor.spec.target, supervisor.spec.queues, supervisor.spec.depth) == ("null", 2, 7)
        assert capsys.readouterr().err == ""

    def test_without_a_configuration_it_is_a_memory_device_and_says_so(
        self, supervisor: Supervisor, capsys: Output
    ) -> None:
        assert main(["-q", "2"]) == 0
        assert (supervisor.spec.target, supervisor.spec.size, supervisor.spec.queues) == (
            "memory",
            1 << 30,
            2,
        )
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and "serving a memory device of 1 GiB" in err

    def test_size_of_the_memory_device_can_be_given(self, supervisor: Supervisor, capsys: Output) -> None:
        assert main(["--size", "2G"]) == 0
        assert supervisor.spec.size == 2 << 30
        assert "memory device of 2 GiB" in capsys.readouterr().err


class TestServe:
    def test_every_option_reaches_its_setting(self, supervisor: Supervisor) -> None:
        cpu = sorted(os.sched_getaffinity(0))[0]
        line = (
            f"run python a.py:B -q 3 -d 64 --cpus {cpu} -n 9 --size 64M -r -b 4K --physical-block-size 8K "
            "--no-partscan --transport copy --param a=1 --param b=x=y --max-io-size 1M --scheduler keep "
            "--start-timeout 5 --log-level debug --log-format json"
        )
        assert main(line.split()) == 0
        spec = supervisor.spec
        assert (spec.queues, spec.depth, spec.cpus, spec.number, spec.size) == (3, 64, [cpu], 9, 64 << 20)
        assert (spec.read_only, spec.block_size, spec.physical_block_size) == (True, 4096, 8192)
        assert (spec.partscan, spec.transport, spec.params) == (False, "copy", {"a": "1", "b": "x=y"})
        assert (spec.max_io_size, spec.scheduler, spec.start_timeout) == (1 << 20, "keep", 5)
        assert (spec.log_level, spec.log_format) == ("debug", "json")
        assert spec.file == os.path.abspath("a.py:B")
        assert (
            main(["run", "loop", "f", "-o", "1M", "--size-limit", "2M", "--buffered", "--force", "-P"]) == 0
        )
        spec = supervisor.spec
        assert (spec.offset, spec.size_limit, spec.direct, spec.force) == (1 << 20, 2 << 20, "off", True)
        assert spec.partscan
        assert main(["run", "null", "--no-zero"]) == 0
        assert not supervisor.spec.zero

    def test_last_of_two_opposites_wins(self, supervisor: Supervisor) -> None:
        assert main(["run", "loop", "f", "--buffered", "--direct", "--no-partscan", "-P"]) == 0
        assert supervisor.spec.direct == "on" and supervisor.spec.partscan
        assert main(["run", "loop", "f", "--direct", "--buffered", "-P", "--no-partscan"]) == 0
        assert supervisor.spec.direct == "off" and not supervisor.spec.partscan

    def test_option_that_was_not_given_does_not_override_the_file(
        self, supervisor: Supervisor, tmp_path: Path
    ) -> None:
        (tmp_path / "a.toml").write_text(
            '[device]\ntarget="loop"\nfile="d"\ndirect="on"\npartscan=false\nread_only=true\n'
        )
        assert main(["run", "--config", str(tmp_path / "a.toml")]) == 0
        spec = supervisor.spec
        assert (spec.direct, spec.partscan, spec.read_only, spec.file) == ("on", False, True, f"{tmp_path}/d")

    def test_default_file_is_not_read_when_a_target_is_named(self, supervisor: Supervisor) -> None:
        Path(loader.DEFAULT_FILE).write_text('[device]\ntarget = "null"\ndepth = 7\n')
        assert main(["run", "null"]) == 0
        assert supervisor.spec.depth == 128

    def test_add_prints_the_path_alone(self, supervisor: Supervisor, capsys: Output) -> None:
        assert main(["add", "null"]) == 0
        assert capsys.readouterr() == ("/dev/ublkb5\n", "")

    def test_add_json_prints_the_device(
        self, supervisor: Supervisor, devices: dict[int, Any], capsys: Output
    ) -> None:
        devices[5] = device(5)
        assert main(["add", "null", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == device(5)

    @pytest.mark.parametrize("verb", ["run", "add"])
    def test_dry_run_prints_the_plan_and_starts_nothing(
        self, supervisor: Supervisor, capsys: Output, verb: str
    ) -> None:
        assert main([verb, "null", "--dry-run"]) == 0
        assert [call[0] for call in supervisor.calls] == ["plan"]
        out = capsys.readouterr().out
        assert re.search(r"^target +null$", out, re.M) and re.search(r"^  queue 0  cpu 1$", out, re.M)
        assert main([verb, "null", "--dry-run", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["target"] == "null"

    def test_exit_status_of_the_supervisor_is_passed_on(
        self, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(supervisor, "run_foreground", lambda spec, origin: 1)
        assert main(["run", "null"]) == 1

    @pytest.mark.parametrize(
        ("line", "text"),
        [
            ("run nul", "'nul' is no target (did you mean 'null'?)"),
            ("run zzz", "the targets are loop, memory, null, python"),
            ("run /", "'/' is no target (to serve a file: ublkd run loop /)"),
            ("run loop", "the loop target needs a backing file (ublkd run loop FILE)"),
            ("run loop a b", "one file too many: 'b'"),
            ("run null a", "the null target takes no file: 'a'"),
            ("run python", "needs FILE:CLASS"),
            ("run python a.py", "needs FILE:CLASS"),
            ("run loop f --no-zero", "--no-zero is for the null target"),
            ("run loop f --zero", "--zero is for the null target"),
            ("run null --direct", "--direct is for the loop target"),
            ("run memory --buffered", "--buffered is for the loop target"),
            ("run memory -o 512", "--offset is for the loop target"),
            ("run null --param a=b", "--param is for the python target"),
            ("run loop f --size 1G", "--size is for the null, memory and python targets"),
            ("--buffered -q 2", "--buffered is for the loop target"),
            ("run null -q 0", "--queues: 0 is not accepted; give 1 to 4096"),
            ("run null -q many", "--queues: many is not accepted; give 1 to 4096"),
            ("run null -d 5000", "--depth: 5000 is not accepted; give 1 to 4096"),
            ("run null -n x", "--number: x is not accepted; give auto or 0 to 1048575"),
            (
                "run null --cpus 0,x",
                "--cpus: '0,x' is not a list of CPUs; give CPU numbers and ranges: 0-3,8",
            ),
            ("run null --cpus 65000", "CPU 65000 does not exist (usable here: "),
            ("run null --size 1q", "--size: '1q' is not a size; give bytes"),
            ("run null --size 1000", "the size 1000 is no multiple of the block size 512"),
            ("run null -b 3K", "--block-size: 3072 is not accepted; give a power of two from 512 to 4KiB"),
            ("run python a:B --param x", "--param: 'x' is not accepted; give KEY=VALUE"),
            (
                "run null --log-level loud",
                "--log-level: 'loud' is not accepted; give debug, info, warning or error",
            ),
            ("run null --json", "run --json needs --dry-run"),
            ("run null -q", "Option '-q' requires an argument (see ublkd"),
            ("run null --bogus", "No such option"),
            ("run --config /none", "/none: No such file or directory"),
        ],
    )
    def test_bad_input_is_one_line_and_starts_nothing(
        self, supervisor: Supervisor, capsys: Output, line: str, text: str
    ) -> None:
        args = line.split()
        if args[0].startswith("-"):
            # The note on the default target comes first there.
            assert main(args) == 2
            assert text in capsys.readouterr().err.splitlines()[-1]
        else:
            assert text in error_of(capsys, 2, *args)
        assert supervisor.calls == []

    def test_option_not_for_the_target_in_the_file_is_refused(
        self, supervisor: Supervisor, capsys: Output, tmp_path: Path
    ) -> None:
        (tmp_path / "a.toml").write_text('[device]\ntarget="memory"\n')
        text = error_of(capsys, 2, "run", "--config", str(tmp_path / "a.toml"), "--direct")
        assert text == "--direct is for the loop target"

    def test_errors_from_below_are_one_line_with_their_hint_and_status(
        self, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, capsys: Output
    ) -> None:
        def fail(spec: DeviceSpec, origin: object) -> int:
            raise UblkdError("no driver\nat all", "load it")

        monkeypatch.setattr(supervisor, "run_foreground", fail)
        assert error_of(capsys, 1, "run", "null") == "no driver at all (load it)"

    def test_interrupt_is_quiet(
        self, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, capsys: Output
    ) -> None:
        def interrupt(spec: DeviceSpec, origin: object) -> int:
            raise KeyboardInterrupt

        monkeypatch.setattr(supervisor, "run_foreground", interrupt)
        assert main(["run", "null"]) == 130
        assert capsys.readouterr().err.strip() == ""


class TestCheckConfig:
    def test_good_file(self, capsys: Output) -> None:
        path = str(TOP / "configs/examples/null.toml")
        assert main(["check-config", path]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"{path}: ok\n") and re.search(r"^  depth +256$", out, re.M)
        assert main(["check-config", path, "--json"]) == 0
        assert DeviceSpec.from_dict(json.loads(capsys.readouterr().out)) == loader.resolve({}, path)

    def test_bad_file(self, capsys: Output, tmp_path: Path) -> None:
        (tmp_path / "a.toml").write_text('[device]\ntarget = "null"\nquues = 1\n')
        text = error_of(capsys, 2, "check-config", str(tmp_path / "a.toml"))
        assert f"{tmp_path}/a.toml:3: device.quues: unknown key" in text and "'queues'" in text


class TestDevices:
    def test_list_aligns_columns(self, devices: dict[int, Any], capsys: Output) -> None:
        devices[0] = device(0)
        devices[12] = device(
            12, state="dead", served=False, target=None, backing=None, supervisor=None, size=None
        )
        assert main(["list"]) == 0
        head, first, second = capsys.readouterr().out.splitlines()
        assert " ".join(head.split()) == "DEVICE STATE TARGET SIZE MODE QUEUES DEPTH SERVER BACKING"
        assert " ".join(first.split()) == "/dev/ublkb0 live loop 4 GiB rw 1 128 100 /srv/disk.img"
        assert second.startswith("/dev/ublkb12  dead, unserved  -")
        for column in ("STATE", "TARGET", "BACKING"):
            at = head.index(column)
            assert first[at - 1] == second[at - 1] == " " and first[at] != " " and second[at] != " "

    def test_list_shows_notes(self, devices: dict[int, Any], capsys: Output) -> None:
        devices[0] = device(0, note="its record is damaged")
        assert main(["list"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "/dev/ublkb0: its record is damaged"

    def test_list_json_is_an_array(self, devices: dict[int, Any], capsys: Output) -> None:
        assert main(["list", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == []
        devices[0] = device(0)
        assert main(["list", "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert found == device(0)
        keys = [
            "id",
            "path",
            "state",
            "target",
            "backing",
            "size",
            "queues",
            "depth",
            "supervisor",
            "workers",
        ]
        assert set(keys) <= set(found) and found["workers"] == [{"queue": 0, "pid": 101, "cpu": 3}]

    @pytest.mark.parametrize("name", ["3", "/dev/ublkb3", "ublkb3", "/dev/ublkc3"])
    def test_device_by_number_or_path(self, devices: dict[int, Any], capsys: Output, name: str) -> None:
        devices[3] = device(3)
        assert main(["show", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["id"] == 3

    def test_device_by_link(self, devices: dict[int, Any], capsys: Output, tmp_path: Path) -> None:
        devices[3] = device(3)
        (tmp_path / "disk").symlink_to("/dev/ublkb3")
        assert main(["show", str(tmp_path / "disk"), "--json"]) == 0

    @pytest.mark.parametrize("name", ["x", "-1", "/dev/sda", "/dev/ublkb3p1", "3.0", "\u0663"])
    def test_what_is_no_device(self, devices: dict[int, Any], capsys: Output, name: str) -> None:
        assert "is no ublk device; give a number N or /dev/ublkbN" in error_of(capsys, 2, "show", "--", name)

    def test_show_prints_fields_and_workers(self, devices: dict[int, Any], capsys: Output) -> None:
        devices[3] = device(3)
        assert main(["show", "3"]) == 0
        out = capsys.readouterr().out
        assert re.search(r"^size +4 GiB$", out, re.M) and re.search(r"^  queue 0  pid 101  cpu 3$", out, re.M)

    @pytest.mark.parametrize("verb", ["show", "del"])
    def test_missing_device(
        self, supervisor: Supervisor, devices: dict[int, Any], capsys: Output, verb: str
    ) -> None:
        assert error_of(capsys, 1, verb, "3").startswith("there is no device 3 (")

    def test_del_of_a_device_of_ublkd_stops_it(self, supervisor: Supervisor, devices: dict[int, Any]) -> None:
        devices.update({1: device(1), 2: device(2)})
        assert main(["del", "/dev/ublkb1", "2", "--force"]) == 0
        assert supervisor.calls == [("stop", 1, True), ("stop", 2, True)]

    def test_del_of_a_foreign_device_goes_to_the_driver(
        self, supervisor: Supervisor, devices: dict[int, Any]
    ) -> None:
        devices[1] = device(1, served=False, state="dead", owner="other")
        assert main(["del", "1"]) == 0
        assert devices == {} and supervisor.calls == []

    def test_del_all_means_those_of_ublkd(self, supervisor: Supervisor, devices: dict[int, Any]) -> None:
        devices.update({1: device(1), 2: device(2, owner="other"), 3: device(3, served=False)})
        assert main(["del", "--all"]) == 0
        assert supervisor.calls == [("stop", 1, False), ("stop", 3, False)]

    def test_del_goes_on_after_an_error(
        self, supervisor: Supervisor, devices: dict[int, Any], capsys: Output
    ) -> None:
        devices[2] = device(2)
        assert main(["del", "1", "2"]) == 1
        assert supervisor.calls == [("stop", 2, False)]
        assert "there is no device 1" in capsys.readouterr().err

    @pytest.mark.parametrize("line", ["del", "del 1 --all"])
    def test_del_needs_numbers_or_all(self, devices: dict[int, Any], capsys: Output, line: str) -> None:
        assert "give device numbers, or --all (see ublkd del --help)" in error_of(capsys, 2, *line.split())

    def test_cleanup_removes_what_nobody_serves(
        self, devices: dict[int, Any], capsys: Output, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        devices.update(
            {
                1: device(1),
                2: device(2, served=False, state="quiesced"),
                3: device(3, served=False, state="dead", owner="other"),
                4: device(4, served=False, state="dead"),
            }
        )
        monkeypatch.setattr(inventory, "holders_of", {2: [7], 4: [7]}.get)
        monkeypatch.setattr(inventory, "cleanup", lambda: ["record x is damaged"])
        assert main(["cleanup", "--dry-run"]) == 0
        assert sorted(devices) == [1, 2, 3, 4] and capsys.readouterr().out == "/dev/ublkb2 (quiesced)\n"
        assert main(["cleanup"]) == 0
        # 4 is held open although it is dead: it is just being started.
        assert sorted(devices) == [1, 3, 4]
        assert capsys.readouterr().out == "/dev/ublkb2 (quiesced)\nrecord x is damaged\n"

    def test_recover_and_resize(self, supervisor: Supervisor, capsys: Output) -> None:
        assert main(["recover", "/dev/ublkb1"]) == 0
        assert main(["recover", "1", "--foreground"]) == 0
        assert main(["resize", "1", "8G"]) == 0
        assert main(["resize", "1"]) == 0
        assert supervisor.calls == [
            ("recover", 1, True),
            ("recover", 1, False),
            ("resize", 1, 8 << 30),
            ("resize", 1, None),
        ]
        assert capsys.readouterr().out.split() == ["/dev/ublkb1", str(8 << 30), "4096"]


def snap(dev_id: int, now_ns: int, reads: int, start_ns: int = 1) -> dict[str, Any]:
    """A device with two queues, each with this many reads of 4096 bytes that took 2048 ns."""
    bucket = next(i for i in range(layout.HIST_BUCKETS) if layout.bucket_bounds(i)[0] == 2048)
    queues = []
    for queue in range(2):
        ops = {op: reader.zero() for op in layout.OPS}
        ops["read"].update(ios=reads, bytes=reads * 4096, lat_ns=reads * 2048)
        ops["read"]["hist"][bucket] = reads
        words = dict.fromkeys(layout.QUEUE_WORDS, 0)
        queues.append({**words, "queue": queue, "worker": 0, "pid": 50 + queue, "in_flight": 3, "ops": ops})
    return {"id": dev_id, "time_ns": now_ns, "start_ns": start_ns, "size": 1, "depth": 1, "queues": queues}


class TestStat:
    @pytest.fixture
    def snaps(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        """What the reader returns, one after the other."""
        pending: list[dict[str, Any]] = []
        monkeypatch.setattr(reader, "snapshot", lambda dev_id: pending.pop(0))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        return pending

    def test_one_shot_is_since_the_start(self, snaps: list[Any], capsys: Output) -> None:
        snaps.append(snap(4, 0, 1000, start_ns=time.time_ns() - 10 * 10**9))
        assert main(["stat", "/dev/ublkb4", "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert (found["id"], found["path"], len(found["queues"])) == (4, "/dev/ublkb4", 2)
        total = found["total"]
        assert (total["ios"], total["bytes"], total["errors"], total["in_flight"]) == (
            2000,
            2000 * 4096,
            0,
            6,
        )
        assert total["iops"] == pytest.approx(200, rel=0.05)
        assert found["queues"][1]["pid"] == 51 and found["queues"][1]["ios"] == 1000
        assert found["operations"]["read"]["ios"] == 2000 and found["operations"]["write"]["ios"] == 0
        assert total["latency_us"]["mean"] == 2.0
        assert (
            2.0
            <= total["latency_us"]["p50"]
            <= total["latency_us"]["p99"]
            <= total["latency_us"]["p99.9"]
            <= 2.6
        )

    def test_watch_is_over_the_interval(self, snaps: list[Any], capsys: Output) -> None:
        second = 10**9
        snaps += [snap(4, 0, 1000), snap(4, 2 * second, 1500), snap(4, 3 * second, 1500)]
        assert main(["stat", "4", "--watch", "2", "--count", "2", "--json"]) == 0
        first, idle = [json.loads(line)[0] for line in capsys.readouterr().out.splitlines()]
        assert (first["total"]["ios"], first["total"]["iops"], first["seconds"]) == (1000, 500.0, 2.0)
        assert first["total"]["mb_per_s"] == pytest.approx(2.05, abs=0.01)
        assert (idle["total"]["ios"], idle["total"]["latency_us"]["p99"]) == (0, 0.0)

    def test_device_that_was_made_anew_meanwhile_starts_over(self, snaps: list[Any], capsys: Output) -> None:
        snaps += [snap(4, 0, 1000), snap(4, 10**9, 10, start_ns=2)]
        assert main(["stat", "4", "--watch", "--count", "1", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["total"]["ios"] == 20

    def test_table(self, snaps: list[Any], capsys: Output) -> None:
        snaps += [snap(4, 0, 0), snap(4, 10**9, 500)]
        assert main(["stat", "4", "--watch", "--count", "1"]) == 0
        out = capsys.readouterr().out
        assert "/dev/ublkb4  in the last 1.0 s" in out
        rows = [re.split(r"  +", line.strip()) for line in out.splitlines()]
        heads = "PID|IN FLIGHT|IOPS|MB/s|I/Os|MB|ERRORS|MEAN us|P50 us|P99 us|P99.9 us"
        assert "|".join(rows[1]) == heads
        assert [row[0] for row in rows[2:6]] == ["queue 0", "queue 1", "read", "total"]
        assert rows[5][1:6] == ["6", "1000", "4.1", "1000", "4.1"]
        assert len({len(line) for line in out.splitlines()[1:6]}) == 1

    def test_workers_that_share_a_queue(self, snaps: list[Any], capsys: Output) -> None:
        shared = snap(4, 0, 100)
        for worker, slot in enumerate(shared["queues"]):
            slot.update(queue=0, worker=worker)
        snaps += [shared, shared]
        assert main(["stat", "4"]) == 0
        names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[2:4]]
        assert names == ["queue 0.0", "queue 0.1"]
        assert main(["stat", "4", "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert [(q["queue"], q["worker"]) for q in found["queues"]] == [(0, 0), (0, 1)]

    def test_all_devices_without_a_number(
        self, snaps: list[Any], devices: dict[int, Any], capsys: Output
    ) -> None:
        devices.update({1: device(1), 2: device(2)})
        snaps += [snap(1, 0, 1), snap(2, 0, 1)]
        assert main(["stat", "--json"]) == 0
        assert [found["id"] for found in json.loads(capsys.readouterr().out)] == [1, 2]

    def test_watch_ends_well_on_an_interrupt(
        self, snaps: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Output
    ) -> None:
        def interrupt(seconds: float) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(time, "sleep", interrupt)
        snaps.append(snap(4, 0, 1))
        assert main(["stat", "4", "--watch"]) == 0
        assert capsys.readouterr() == ("", "")

    def test_device_without_counters(self, capsys: Output) -> None:
        assert error_of(capsys, 1, "stat", "999999").startswith("device 999999 has no counters")

    def test_count_needs_watch(self, capsys: Output) -> None:
        assert "--count is for --watch" in error_of(capsys, 2, "stat", "--count", "1")


class TestHelp:
    @pytest.mark.parametrize("verb", list(cli.VERBS))
    def test_every_verb_has_help_with_examples(self, capsys: Output, verb: str) -> None:
        assert main([verb, "--help"]) == 0
        out = capsys.readouterr().out
        assert cli.VERBS[verb][1] in " ".join(out.split())
        assert "Examples:" in out

    def test_help_names_every_verb_and_the_exit_statuses(self, capsys: Output) -> None:
        for args in ([], ["--help"], ["-h"]):
            assert main(args) == 0
            out = capsys.readouterr().out
            assert all(f"\n  {verb} " in out for verb in cli.VERBS)
            assert "Exit status: 0 done; 1 failed; 2 wrong usage; 130 interrupted." in out
            assert "_UBLKD_COMPLETE=bash_source ublkd" in out

    def test_run_help_shows_every_option_by_target(self, capsys: Output) -> None:
        assert main(["run", "--help"]) == 0
        out = capsys.readouterr().out
        for setting in SETTINGS.values():
            for flags, _ in setting.spellings():
                assert re.search(rf"^  {', '.join(map(re.escape, flags))}\b", out, re.M), flags
        assert out.index("\nOnly for loop:") < out.index("--direct")

    def test_man_page_names_every_verb_and_option(self) -> None:
        page = (TOP / "docs/man/ublkd.8").read_text().replace("\\-", "-")
        context = click.Context(cli.ublkd)
        for verb in cli.VERBS:
            command = cli.ublkd.get_command(context, verb)
            assert command is not None
            assert re.search(rf"^\.B {verb}$", page, re.M), verb
            for param in command.params:
                if isinstance(param, click.Option):
                    assert all(re.search(rf"{flag}\b", page) for flag in param.opts), (verb, param.opts)

    def test_targets(self, capsys: Output) -> None:
        assert main(["targets", "--json"]) == 0
        names = [target["name"] for target in json.loads(capsys.readouterr().out)]
        assert names == ["loop", "memory", "null", "python"]
        assert main(["targets"]) == 0
        assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == names

    def test_version(self, capsys: Output) -> None:
        for args in (["version"], ["--version"]):
            assert main(args) == 0
            assert capsys.readouterr().out == ublkd.__version__ + "\n"


@pytest.fixture(scope="session")
def bytecode(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A bytecode cache that is sure to be there and up to date, as after an installation."""
    return str(tmp_path_factory.mktemp("bytecode"))


@pytest.fixture
def environment(tmp_path: Path, bytecode: str) -> dict[str, str]:
    """For real processes: no device of this machine is seen."""
    changed = {
        "PYTHONPATH": str(Path(ublkd.__file__).parents[1]),
        "PYTHONPYCACHEPREFIX": bytecode,
        "UBLKD_RUNTIME_DIR": str(tmp_path),
    }
    return {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | changed


class TestProcess:
    @pytest.mark.parametrize("args", [["--help"], ["list"], ["stat"]])
    def test_light_verbs_import_nothing_heavy(self, environment: dict[str, str], args: list[str]) -> None:
        code = f"import sys; from ublkd.cli import main; main({args!r}); print(*sys.modules, file=sys.stderr)"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
        )
        heavy = {
            "structlog",
            "psutil",
            "tomllib",
            "multiprocessing",
            "asyncio",
            "logging",
            "subprocess",
            "cffi",
        }
        heavy |= {"ublkd.supervisor", "ublkd.native", "ublkd.worker", "ublkd.config.loader"}
        assert not heavy & set(done.stderr.split())

    def test_closed_pipe_is_quiet(self, environment: dict[str, str]) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        try:
            done = subprocess.run(
                [*COMMAND, "--help"], env=environment, stdout=writing, stderr=subprocess.PIPE
            )
        finally:
            os.close(writing)
        assert (done.returncode, done.stderr) == (1, b"")

    def test_interrupt_is_quiet(self, environment: dict[str, str]) -> None:
        with self._watching(environment) as process:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, b"")

    @staticmethod
    def _watching(environment: dict[str, str]) -> "subprocess.Popen[bytes]":
        command = [*COMMAND, "stat", "--watch", "0.05", "--json"]
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A shell starts what runs in its background with the interrupt ignored, these tests included.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout is not None
        # Once the first interval is out it is past its imports.
        assert process.stdout.readline() == b"[]\n"
        return process

    def test_error_goes_to_standard_error_with_status_2(self, environment: dict[str, str]) -> None:
        done = subprocess.run(
            [*COMMAND, "run", "null", "-q", "0"], env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "ublkd: error: --queues: 0 is not accepted; give 1 to 4096\n"

    def test_shell_completion(self, environment: dict[str, str]) -> None:
        def complete(words: str, index: int) -> str:
            extra = {"_UBLKD_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(index)}
            return subprocess.run(COMMAND, env=environment | extra, capture_output=True, text=True).stdout

        assert "plain,recover" in complete("ublkd rec", 1)
        assert "plain,memory" in complete("ublkd run mem", 2)
        assert "plain,--queues" in complete("ublkd run --que", 2)


class TestLog:
    @pytest.fixture
    def log_lines(self, environment: dict[str, str]) -> Callable[[str], list[str]]:
        def run(code: str) -> list[str]:
            code = f"from ublkd import log\n{code}"
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
            )
            assert done.stdout == ""
            return done.stderr.splitlines()

        return run

    def test_json_binds_device_and_queue(self, log_lines: Callable[[str], list[str]]) -> None:
        code = "log.get(device=3, queue=1).info('started', cpu=2)"
        (line,) = log_lines(f"log.setup('info', 'json'); {code}")
        event = json.loads(line)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", event.pop("timestamp"))
        assert event == {"event": "started", "level": "info", "device": 3, "queue": 1, "cpu": 2}

    def test_json_is_the_default_off_a_terminal(self, log_lines: Callable[[str], list[str]]) -> None:
        (line,) = log_lines("log.get(device=3).warning('x')")
        assert json.loads(line)["device"] == 3

    def test_level(self, log_lines: Callable[[str], list[str]]) -> None:
        code = "log.setup('warning', 'json'); log.get().info('no'); log.get().error('yes')"
        assert [json.loads(line)["event"] for line in log_lines(code)] == ["yes"]

    def test_console_is_readable(self, log_lines: Callable[[str], list[str]]) -> None:
        (line,) = log_lines("log.setup('info', 'console'); log.get(device=3).info('worker started', cpu=2)")
        assert re.fullmatch(r"\d\d:\d\d:\d\d \[info *\] worker started +cpu=2 device=3", line)

    def test_exception_stays_on_one_json_line(self, log_lines: Callable[[str], list[str]]) -> None:
        code = "log.setup('info', 'json')\ntry: 1/0\nexcept Exception: log.get().exception('failed')"
        (line,) = log_lines(code)
        assert "ZeroDivisionError" in json.loads(line)["exception"]

    def test_closed_standard_error_hurts_nobody(self, log_lines: Callable[[str], list[str]]) -> None:
        assert log_lines("import os; os.close(2); log.setup('info', 'json'); log.get().info('lost')") == []


@pytest.fixture(autouse=True)
def _no_leftovers() -> Iterator[None]:
    """The command line must leave this process's logging alone for the next test."""
    from ublkd import log

    yield
    log._ready = False
