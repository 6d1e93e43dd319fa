# SPDX-License-Identifier: Apache-2.0
"""What the command line means: disks, environment, QEMU's arguments, the job's script."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from vm import accel, cli, integration, job, qemu
from vm.cpio import Archive
from vm.disks import Disk, parse_size
from vm.kernels import Kernel
from vm.streams import MarkedStream

KERNEL = Kernel("6.12", "6.12.5+deb12-amd64", Path("/cache/6.12.5"))


@pytest.mark.parametrize(("text", "size"), [("512", 512), ("4k", 4096), ("2G", 2 << 30), ("1GiB", 1 << 30)])
def test_size(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_disk() -> None:
    assert Disk.parse("1G") == Disk(1 << 30)
    assert Disk.parse("1G,sector=4096,discard") == Disk(1 << 30, 4096, True)


@pytest.mark.parametrize("text", ["", "0", "1X", "1G,sector=100", "1G,fast", "1000", "-1G"])
def test_bad_disk_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Disk.parse(text)


@pytest.mark.parametrize("arguments", [["--disk", "1X"], ["--cpus", "0"], ["--memory", "much"], ["--frobnicate"]])
def test_bad_option_is_a_usage_error(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def test_unknown_kernel_is_one_line_and_the_status_for_cannot_start(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["5.10", "--", "true"]) == 125
    error = capfd.readouterr().err
    assert error.startswith("vm: ") and error.count("\n") == 1


def test_scratch_disk_leaves_no_name_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    descriptor = Disk(1 << 30).create()
    assert os.fstat(descriptor).st_size == 1 << 30
    assert os.fstat(descriptor).st_blocks == 0
    os.close(descriptor)
    assert list(tmp_path.iterdir()) == []


def test_environment_is_not_forwarded_but_for_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SECRET", "ASKED", "UBLKD_X", "CI"):
        monkeypatch.setenv(name, name.lower())
    monkeypatch.setenv("PATH", "/opt/bin:/usr/bin")
    seen = job.guest_environment(["ASKED", "GIVEN=a=b", "ABSENT"])
    assert "SECRET" not in seen and "ABSENT" not in seen
    assert (seen["ASKED"], seen["GIVEN"], seen["UBLKD_X"], seen["CI"]) == ("asked", "a=b", "ublkd_x", "ci")
    assert seen["PATH"] == "/opt/bin:/usr/bin:/usr/local/sbin:/usr/sbin:/sbin"


def test_words_of_the_command_survive_the_shell(tmp_path: Path) -> None:
    words = ["a b", "$HOME", "it's", "*", "", "-n"]
    script = tmp_path / "command"
    task = job.Job(["printf", "%s|", *words], tmp_path, {"PATH": os.environ["PATH"], "ODD": "x 'y' $z"})
    script.write_text(task._script())
    done = subprocess.run(["sh", script], capture_output=True, text=True, check=True)
    assert done.stdout == "".join(f"{word}|" for word in words)


def test_tmp_is_private_unless_the_command_works_there() -> None:
    assert "private_tmp=1" in job.Job(["true"], Path("/src")).settings(KERNEL)
    assert "private_tmp=0" in job.Job(["true"], Path("/tmp/src")).settings(KERNEL)


def command_line(machine: qemu.Machine, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(qemu, "binary", lambda: "qemu")
    chardevs = {name: number for number, name in enumerate(("console", "monitor", *qemu.PORTS), start=10)}
    return " ".join(qemu.command_line(machine, KERNEL, 3, chardevs, [20 + n for n in range(len(machine.disks))]))


def test_disk_options_reach_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    line = command_line(qemu.Machine(disks=[Disk(1 << 30), Disk(1 << 20, 4096, True)]), monkeypatch)
    assert "file=/proc/self/fd/20,cache=unsafe,discard=ignore" in line
    assert "serial=ublkd-1,discard=on,write-zeroes=on,logical_block_size=4096" in line


def test_cpus_of_an_instruction_clock_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    line = command_line(qemu.Machine(cpus=4, icount=True, kvm=True), monkeypatch)
    assert "-icount shift=2,sleep=off" in line
    assert "thread=single" in line and "-smp 4" in line and "kvm" not in line


def test_instruction_clock_has_one_cpu_unless_asked(tmp_path: Path) -> None:
    for words, cpus in ((["--icount"], 1), (["--icount", "--cpus", "4"], 4), ([], 2)):
        assert cli._machine(cli.parser().parse_args(words), ["true"]).cpus == cpus


def test_host_root_is_never_writable(monkeypatch: pytest.MonkeyPatch) -> None:
    line = command_line(qemu.Machine(share=Path("/out,put")), monkeypatch)
    assert "path=/,security_model=none,multidevs=remap,readonly=on" in line
    assert "path=/out,,put,security_model=none,multidevs=remap " in line


def test_stream_ends_at_its_mark_in_whatever_pieces_it_comes() -> None:
    data = b"output mar" + b"mark" + b"more"
    for cut in range(len(data)):
        stream = MarkedStream("mark")
        # "mar" before the mark is output although it looks like its beginning
        assert stream.feed(data[:cut]) + stream.feed(data[cut:]) == b"output mar"
        assert stream.ended


def test_what_looked_like_a_mark_is_output_at_the_end() -> None:
    stream = MarkedStream("mark")
    assert stream.feed(b"a ma") + stream.rest() == b"a ma"


def test_archive_has_the_format_that_linux_reads() -> None:
    archive = Archive()
    archive.directory("d")
    archive.file("d/f", b"hello", 0o755)
    data = archive.data()
    assert data.startswith(b"070701") and len(data) % 512 == 0
    assert b"d/f\0" in data and b"TRAILER!!!\0" in data
    head = data[data.index(b"d/f\0") - 110 :]
    assert (int(head[14:22], 16), int(head[54:62], 16)) == (0o100755, 5)


def test_kvm_is_tried_once_and_the_answer_kept(tmp_path: Path) -> None:
    asked: list[int] = []

    def find_out() -> bool:
        asked.append(1)
        return False

    for _ in range(2):
        assert not accel.remembered("this boot", find_out, tmp_path / "kvm.json")
    assert len(asked) == 1
    accel.remembered("next boot", find_out, tmp_path / "kvm.json")
    assert len(asked) == 2


def test_integration_runs_named_tests_instead_of_all() -> None:
    everything = integration.command("6.12", Path("logs"), ["-k", "loop"])
    assert everything[-3:] == ["-k", "loop", "tests/integration"]
    named = integration.command("6.12", Path("logs"), ["tests/integration/test_a.py::test_b"])
    assert named[-1] == "tests/integration/test_a.py::test_b"
    assert "tests/integration" not in named


def test_integration_runs_on_another_driver() -> None:
    module = Path("build/driver/x/ublkd_drv.ko")
    command = integration.command("6.1", Path("logs"), [], module)
    assert f"--module={module}" in command[: command.index("--")]
    assert not [word for word in integration.command("6.1", Path("logs"), []) if word.startswith("--module")]
