# SPDX-License-Identifier: Apache-2.0
"""No text, value or file makes anything but a device as asked for, or one line that says what is wrong."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import JSON, NESTED, TEXTS, fuzz
from hypothesis import example, given
from hypothesis import strategies as st

from ublkd import units
from ublkd.config import loader
from ublkd.config.schema import SETTINGS, DeviceSpec
from ublkd.errors import UblkdError


@fuzz
@given(st.text(max_size=40))
@example("9" * 5000)
@example("1." + "0" * 5000 + "K")
@example("٣K")
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        size = units.parse_size(text)
    except ValueError as e:
        assert "size" in str(e) or "whole number of bytes" in str(e), e
    else:
        assert size >= 0


@fuzz
@given(st.integers(0, 1 << 70))
def test_a_size_that_was_written_is_read_again(size: int) -> None:
    assert units.parse_size(units.exact_size(size)) == size


@fuzz
@given(st.text(alphabet="0123456789-, x٣", max_size=12))
@example("0-" + "9" * 5000)
@example("0-65535," * 200 + "0")
def test_any_text_is_a_list_of_cpus_or_refused(text: str) -> None:
    try:
        cpus = units.parse_cpus(text)
    except ValueError as e:
        assert "CPU" in str(e)
    else:
        assert units.parse_cpus(units.format_cpus(cpus)) == cpus


@fuzz
@given(st.sampled_from(sorted(SETTINGS)), JSON)
@example("size", "9" * 5000)
@example("params", {"a": float("nan")})
@example("file", "a\0b")
def test_any_value_of_a_setting_is_taken_or_refused(name: str, value: Any) -> None:
    with contextlib.suppress(ValueError):
        taken = SETTINGS[name].load(value)
        if taken is not None:
            assert isinstance(SETTINGS[name].toml(taken), str)


@fuzz
@given(st.dictionaries(st.sampled_from([*sorted(SETTINGS), "nonsense"]), JSON, max_size=6))
def test_any_set_of_values_is_a_device_or_refused(values: dict[str, Any]) -> None:
    try:
        spec = DeviceSpec(**values)
    except UblkdError as e:
        assert e.message
    else:
        assert DeviceSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.fixture
def load(tmp_path: Path) -> Callable[[bytes], None]:
    """load(bytes): as a TOML file; only a UblkdError may come of it."""
    path = tmp_path / "ublkd.toml"

    def load(data: bytes) -> None:
        path.write_bytes(data)
        try:
            loader.resolve({}, str(path))
        except UblkdError as e:
            assert e.message and "\n" not in e.message.strip()

    return load


KEYS = st.sampled_from([*(s.key for s in SETTINGS.values()), "nonsense", '"quoted key"', "a.b"])
VALUES = st.one_of(
    st.sampled_from(["1", "-1", "true", '"x"', "[1,2]", "{a=1}", "1e400", "nan", "1979-05-27", "0x10", "'''a\n'''"]),
    TEXTS.map(lambda text: json.dumps(text)),
    st.integers().map(str),
)


@fuzz
@given(st.lists(st.tuples(st.sampled_from(["device", "log", "recovery", "other"]), KEYS, VALUES), max_size=5))
def test_any_settings_in_a_file(load: Callable[[bytes], None], lines: list[tuple[str, str, str]]) -> None:
    load("".join(f"[{s}]\n{k} = {v}\n" for s, k, v in lines).encode(errors="surrogatepass"))
    load(b'[device]\ntarget = "memory"\n' + "".join(f"{k} = {v}\n" for _, k, v in lines).encode(errors="replace"))


@fuzz
@given(st.binary(max_size=200))
def test_any_bytes_in_a_file(load: Callable[[bytes], None], data: bytes) -> None:
    load(data)


@pytest.mark.parametrize("text", [*NESTED, "a=" + "[" * 50_000, "a.b" * 20_000 + "=1", "x=" + "9" * 5000])
def test_a_file_that_is_too_much(load: Callable[[bytes], None], text: str) -> None:
    load(text.encode())
    load(f"[device]\ntarget = {text}\n".encode())


@pytest.mark.parametrize("path", ["a\0b", "/dev", "/proc/self/mem", "x" * 5000, "\udcff"])
def test_a_file_name_that_is_none(path: str) -> None:
    with pytest.raises(UblkdError):
        loader.resolve({}, path)
