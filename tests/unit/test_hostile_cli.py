# SPDX-License-Identifier: Apache-2.0
"""No command line ends in a traceback: it does what it says, or one line tells what is wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import NUMBERS, TEXTS, fuzz
from hypothesis import example, given
from hypothesis import strategies as st

from ublkd import cli, inventory
from ublkd import supervisor as supervisors
from ublkd.config import loader
from ublkd.config.schema import SETTINGS

FLAGS = sorted({flag for s in SETTINGS.values() for flags, _ in s.spellings() for flag in flags})
WORDS = st.one_of(
    st.sampled_from([*FLAGS, "--json", "--config", "--dry-run", "--force", "--all", "--nonsense", "-", "--", "--help"]),
    st.sampled_from(["loop", "memory", "null", "python", "/dev/null", "/", "x.py:C", "0", "/dev/ublkb0"]),
    # no argument can hold a NUL
    TEXTS.map(lambda text: text.replace("\0", "")),
    NUMBERS.map(str),
)


@pytest.fixture(autouse=True)
def harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is served or removed."""
    for name in ("run", "shm", "sys"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UBLKD_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(inventory, "SHM_DIR", str(tmp_path / "shm"))
    monkeypatch.setattr(inventory, "SYS", str(tmp_path / "sys"))
    monkeypatch.setattr(loader, "DEFAULT_FILE", str(tmp_path / "ublkd.toml"))
    done: dict[str, Any] = {"run_foreground": 0, "run_background": "/dev/ublkb0"}
    for name, result in done.items():
        monkeypatch.setattr(supervisors, name, lambda *a, result=result, **k: result)
    monkeypatch.setattr(os, "kill", lambda *a: pytest.fail(f"kill{a}"))
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *a: pytest.fail(f"pidfd_send_signal{a}"))
    yield


def check(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    try:
        status = cli.main(words)
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if status:
        errors = [line for line in said.splitlines() if line.startswith("ublkd: error: ")]
        assert errors, f"{words} ended with {status} and said {said!r}"


@fuzz
@given(verb=st.sampled_from([*cli.VERBS, "", "nonsense"]), words=st.lists(WORDS, max_size=6))
@example(verb="show", words=["9" * 5000])
@example(verb="show", words=[str(1 << 64)])
@example(verb="del", words=[str(1 << 64)])
@example(verb="recover", words=[str(1 << 64)])
@example(verb="resize", words=["0", "9" * 5000])
@example(verb="", words=["\udcff"])
def test_any_words(verb: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if verb in ("stat", "monitor"):
        return  # goes on until it is interrupted
    check([verb, *words] if verb else words, capsys)


@fuzz
@given(words=st.lists(WORDS, max_size=6))
def test_any_short_form(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words and words[0] in ("stat", "monitor"):
        return
    check(words, capsys)
