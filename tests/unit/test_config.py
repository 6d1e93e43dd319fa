# SPDX-License-Identifier: Apache-2.0
"""Schema, loader and generated files."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from ublkd.config import generate, loader, schema
from ublkd.config.schema import SETTINGS, DeviceSpec
from ublkd.errors import ConfigError, UsageError
from ublkd.targets import TARGETS

TOP = Path(__file__).parents[2]
GIB = 1 << 30


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


class TestDeviceSpec:
    def test_defaults(self) -> None:
        spec = DeviceSpec(target="null")
        assert (spec.queues, spec.depth, spec.number, spec.cpus) == (1, 128, -1, None)
        assert (spec.max_io_size, spec.transport, spec.scheduler) == (None, "auto", "none")
        assert spec.partscan and spec.zero and not spec.read_only

    def test_memory_and_null_have_a_size_without_being_told(self) -> None:
        assert DeviceSpec(target="memory").size == GIB
        assert DeviceSpec(target="null").size == 250 * GIB
        assert DeviceSpec(target="loop", file="/x").size is None

    def test_round_trip_through_json(self) -> None:
        spec = DeviceSpec(
            target="python",
            file="/a.py:B",
            size="2M",
            cpus=[1, 0],
            params={"a": "1"},
            number=7,
            read_only=True,
        )
        assert DeviceSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
        assert set(spec.to_dict()) == set(SETTINGS)

    def test_every_default_survives_the_round_trip(self) -> None:
        spec = DeviceSpec(target="null")
        assert DeviceSpec.from_dict(spec.to_dict()) == spec

    def test_missing_settings_get_defaults(self) -> None:
        assert DeviceSpec.from_dict({"target": "null"}).depth == 128

    def test_unknown_setting_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="unknown setting 'dept'") as caught:
            DeviceSpec.from_dict({"target": "null", "dept": 1})
        assert "'depth'" in caught.value.hint

    def test_devices_share_no_params(self) -> None:
        a, b = DeviceSpec(target="null"), DeviceSpec(target="null")
        a.params["x"] = "1"
        assert b.params == {} and SETTINGS["params"].default == {}

    @pytest.mark.parametrize(
        ("values", "text"),
        [
            ({}, "no target is given; give loop, memory, null or python"),
            ({"target": "lop"}, "give loop, memory, null or python"),
            ({"target": "loop"}, "needs a backing file"),
            ({"target": "python"}, "needs FILE:CLASS"),
            ({"target": "python", "file": "a.py"}, "needs FILE:CLASS"),
            ({"target": "python", "file": "a.py:"}, "needs FILE:CLASS"),
            ({"target": "null", "queues": 0}, "queues: 0 is not accepted; give 1 to 4096"),
            ({"target": "null", "queues": 4097}, "give 1 to 4096"),
            ({"target": "null", "queues": True}, "give 1 to 4096"),
            ({"target": "null", "queues": 1.0}, "give 1 to 4096"),
            ({"target": "null", "depth": 4097}, "depth: 4097"),
            ({"target": "null", "number": -2}, "give auto or 0 to 1048575"),
            ({"target": "null", "number": 1 << 20}, "give auto or 0 to 1048575"),
            ({"target": "null", "block_size": 256}, "a power of two from 512 to 4KiB"),
            ({"target": "null", "block_size": 8192}, "a power of two from 512 to 4KiB"),
            ({"target": "null", "block_size": 3072}, "a power of two from 512 to 4KiB"),
            ({"target": "null", "max_io_size": 6000}, "a multiple of 4096 from 4KiB to 32MiB"),
            ({"target": "null", "max_io_size": "64M"}, "a multiple of 4096 from 4KiB to 32MiB"),
            ({"target": "null", "size": 1000}, "1000 is no multiple of the block size 512"),
            ({"target": "null", "size": 512 * 9, "block_size": 4096}, "no multiple of the block size 4096"),
            ({"target": "null", "size": 0}, "512 or more"),
            ({"target": "null", "size": -512}, "512 or more"),
            ({"target": "null", "size": 1 << 63}, "512 or more"),
            ({"target": "loop", "file": "/x", "size_limit": 700}, "the size limit 700 is no multiple"),
            ({"target": "loop", "file": "/x", "offset": -1}, "0 or more"),
            ({"target": "loop", "file": "a\0b"}, "give text"),
            (
                {"target": "null", "block_size": 4096, "physical_block_size": 512},
                "below the logical block size",
            ),
            ({"target": "null", "depth": 3, "workers_per_queue": 4}, "4 workers can't share a queue that holds 3"),
            ({"target": "null", "cpus": []}, "give CPU numbers and ranges"),
            ({"target": "null", "cpus": [-1]}, "give CPU numbers and ranges"),
            ({"target": "null", "cpus": [True]}, "give CPU numbers and ranges"),
            ({"target": "null", "direct": "yes"}, "give auto, on or off"),
            ({"target": "null", "start_timeout": 0}, "give 1 to 3600 seconds"),
            ({"target": "null", "params": [1]}, "a table of key = value"),
            ({"target": "null", "params": {"a": [1]}}, "give text, a number, true or false"),
        ],
    )
    def test_wrong_values_are_refused_with_what_is_accepted(self, values: dict[str, Any], text: str) -> None:
        with pytest.raises(UsageError) as caught:
            DeviceSpec(**values)
        assert text in str(caught.value)
        assert caught.value.exit_status == 2


class TestSchema:
    def test_targets_of_settings_exist(self) -> None:
        for setting in SETTINGS.values():
            assert set(setting.targets) <= set(TARGETS)

    def test_no_option_and_no_key_is_declared_twice(self) -> None:
        flags = [flag for s in SETTINGS.values() for spelled, _ in s.spellings() for flag in spelled]
        assert len(flags) == len(set(flags))
        keys = [(s.section, s.key) for s in SETTINGS.values()]
        assert len(keys) == len(set(keys))

    def test_defaults_are_accepted_values(self) -> None:
        for setting in SETTINGS.values():
            if setting.default is not None and setting.name != "target":
                assert setting.load(setting.default) == setting.default

    def test_toml_text_of_a_value_is_read_back(self) -> None:
        import tomllib

        for setting in SETTINGS.values():
            document = tomllib.loads(f"x = {setting.toml(setting.example)}")
            assert setting.load(document["x"]) == setting.example, setting.name


class TestLoad:
    def test_all_forms_of_values(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "a.toml",
            '[device]\ntarget="python"\nfile="d.py:D"\nsize=4096\nmax_io_size="1MiB"\ncpus=[0]\nnumber="auto"\n'
            '[device.params]\nspeed=3\nname="x"\ndry=true\n[log]\nlevel="debug"\n',
        )
        assert loader.load(path) == {
            "target": "python",
            "file": f"{tmp_path}/d.py:D",
            "size": 4096,
            "max_io_size": 1 << 20,
            "cpus": [0],
            "number": -1,
            "params": {"speed": "3", "name": "x", "dry": "true"},
            "log_level": "debug",
        }

    def test_absolute_file_stays(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.toml", '[device]\ntarget="loop"\nfile="/dev/vdb"\n')
        assert loader.load(path)["file"] == "/dev/vdb"

    @pytest.mark.parametrize(
        ("text", "message", "hint"),
        [
            (
                '[device]\ntarget = "null"\n\nqueue = 4\n',
                ":4: device.queue: unknown key; [device] takes",
                "'queues'",
            ),
            ('[device]\nlevel = "debug"\n', ":2: device.level: unknown key", "belongs into [log]"),
            (
                'queues = 4\n[device]\ntarget = "null"\n',
                ":1: unknown key outside a section",
                "belongs into [device]",
            ),
            ("[devices]\n", ":1: unknown section 'devices'; the sections are [device], [recovery], [log]", "'device'"),
            ('[device]\nqueues = "four"\n', ":2: device.queues: four is not accepted; give 1 to 4096", ""),
            ("[device]\n# queues = 1\nqueues = true\n", ":3: device.queues:", ""),
            (
                '[device]\nread_only = "yes"\n',
                ":2: device.read_only: 'yes' is not accepted; give true or false",
                "",
            ),
            ('[device]\ncpus = "x"\n', ":2: device.cpus: 'x' is not a list of CPUs", ""),
            ('[device]\nsize = "12 parsecs"\n', ":2: device.size: '12 parsecs' is not a size", ""),
            ("[device]\nsize = 1.5\n", ":2: device.size: 1.5 is not accepted", ""),
            ('[device]\ntarget = "nul"\n', ":2: device.target: 'nul' is not accepted; give loop, memory", ""),
            (
                '[device]\ntarget = "null"\noffset = 512\n',
                ":3: device.offset is for the loop target, not for null",
                "",
            ),
            ('device.target = "null"\ndevice.dept = 1\n', ":2: device.dept: unknown key", "'depth'"),
            ("[device]\n[device.params]\na = [1]\n", ":2: device.params: a = [1] is not accepted", ""),
            ("[device]\nqueues = \n", ":2: invalid value", ""),
            ("[device\n", ":1: expected", ""),
            ("[device]\nqueues = 1\nqueues = 2\n", "cannot overwrite a value", ""),
        ],
    )
    def test_errors_name_file_line_and_accepted_values(
        self, tmp_path: Path, text: str, message: str, hint: str
    ) -> None:
        path = write(tmp_path / "bad.toml", text)
        with pytest.raises(ConfigError) as caught:
            loader.load(path)
        assert caught.value.message.lower().startswith(f"{path}:".lower())
        assert message.lower() in caught.value.message.lower()
        assert hint in caught.value.hint
        assert "\n" not in str(caught.value)

    def test_unreadable_files(self, tmp_path: Path) -> None:
        for path, text in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
            with pytest.raises(ConfigError, match=text):
                loader.load(str(path))
        (tmp_path / "binary").write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError, match="UTF-8"):
            loader.load(str(tmp_path / "binary"))


class TestResolve:
    def test_command_line_wins_over_the_file(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.toml", '[device]\ntarget="null"\nqueues=2\ndepth=16\n')
        spec = loader.resolve({"queues": 3}, path)
        assert (spec.queues, spec.depth) == (3, 16)

    def test_params_of_both_are_joined(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.toml", '[device]\ntarget="python"\nfile="a:B"\nparams={a="1",b="1"}\n')
        assert loader.resolve({"params": {"b": "2"}}, path).params == {"a": "1", "b": "2"}

    def test_other_target_than_the_file_says_is_refused(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.toml", '[device]\ntarget="null"\n')
        with pytest.raises(UsageError, match=r"the command line says memory, .* says null"):
            loader.resolve({"target": "memory"}, path)

    def test_file_without_a_target(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.toml", "[device]\nqueues=2\n")
        with pytest.raises(ConfigError, match=r"a\.toml: device\.target is missing; give loop"):
            loader.resolve({}, path)
        assert loader.resolve({"target": "null"}, path).queues == 2

    def test_fault_between_settings_of_a_file_names_the_file(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.toml", '[device]\ntarget="null"\nsize=1000\n')
        with pytest.raises(ConfigError, match=r"a\.toml: the size 1000 is no multiple"):
            loader.resolve({}, path)

    def test_listed_cpus_give_queues_except_to_python(self) -> None:
        here = sorted(os.sched_getaffinity(0))[0]
        assert loader.resolve({"target": "null", "cpus": [here, here]}).queues == 2
        assert loader.resolve({"target": "null", "cpus": [here] * 4, "workers_per_queue": 2}).queues == 2
        assert loader.resolve({"target": "null", "cpus": [here], "workers_per_queue": 2}).queues == 1
        assert loader.resolve({"target": "null", "cpus": [here, here], "queues": 1}).queues == 1
        assert loader.resolve({"target": "python", "file": "a:B", "cpus": [here, here]}).queues == 1


class TestCpus:
    @pytest.fixture
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
        monkeypatch.setattr(schema, "_kernel_cpus", {"present": {0, 1, 2, 3}, "online": {0, 1, 2}}.get)

    @pytest.mark.parametrize(
        ("cpu", "text"),
        [(2, "not among those this process may run on"), (3, "is offline"), (4, "does not exist")],
    )
    def test_unusable_cpu_is_refused_with_the_reason(self, machine: None, cpu: int, text: str) -> None:
        with pytest.raises(UsageError, match=f"CPU {cpu} .*{text}") as caught:
            schema.check_cpus([0, cpu])
        assert caught.value.hint == "usable here: 0-1"

    def test_usable_cpus_pass(self, machine: None) -> None:
        schema.check_cpus([1, 0, 1])

    def test_real_machine(self) -> None:
        schema.check_cpus(sorted(os.sched_getaffinity(0)))
        with pytest.raises(UsageError, match="does not exist"):
            schema.check_cpus([65000])


class TestGenerated:
    def test_committed_files_are_up_to_date(self) -> None:
        for path, text in generate.outputs(TOP).items():
            assert path.read_text() == text, f"{path}: run python -m ublkd.config.generate"

    def test_check_notices_a_stale_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for part in ("configs", "docs/man"):
            shutil.copytree(TOP / part, tmp_path / part)
        assert generate.main(["--check", str(tmp_path)]) == 0
        sample = tmp_path / "configs/ublkd.toml"
        sample.write_text(sample.read_text().replace("#queues = 1", "#queues = 2"))
        assert generate.main(["--check", str(tmp_path)]) == 1
        assert "out of date" in capsys.readouterr().err
        assert generate.main([str(tmp_path)]) == 0
        assert generate.main(["--check", str(tmp_path)]) == 0

    def test_sample_works_as_it_stands(self) -> None:
        assert loader.resolve({}, str(TOP / "configs/ublkd.toml")) == DeviceSpec(target="memory")

    @pytest.mark.parametrize("target", sorted(TARGETS))
    def test_sample_with_every_fitting_line_uncommented_works(self, tmp_path: Path, target: str) -> None:
        fitting = {s.key for s in SETTINGS.values() if not loader.misplaced(s.name, target)}
        lines = []
        for line in (TOP / "configs/ublkd.toml").read_text().splitlines():
            key = line.removeprefix("#").partition(" = ")[0]
            lines.append(line.removeprefix("#") if key in fitting else line)
        text = "\n".join(lines).replace('target = "memory"', f'target = "{target}"')
        values = loader.load(write(tmp_path / "all.toml", text))
        assert set(values) == {name for name in SETTINGS if not loader.misplaced(name, target)}

    @pytest.mark.parametrize("path", sorted((TOP / "configs/examples").glob("*.toml")), ids=lambda p: p.stem)
    def test_example_loads_and_is_of_the_target_it_is_named_after(self, path: Path) -> None:
        assert loader.resolve({}, str(path)).target == path.stem

    def test_every_target_has_an_example(self) -> None:
        assert {path.stem for path in (TOP / "configs/examples").glob("*.toml")} >= set(TARGETS)

    def test_man_page_names_every_key(self) -> None:
        page = (TOP / "docs/man/ublkd.toml.5").read_text()
        for setting in SETTINGS.values():
            assert f"\n\\fB{setting.key}\\fR\n" in page
