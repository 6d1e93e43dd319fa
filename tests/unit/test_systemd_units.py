# SPDX-License-Identifier: Apache-2.0
"""The systemd units say what systemd understands."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNITS = sorted((Path(__file__).parents[2] / "configs" / "systemd").iterdir())
INSTALLED = "/usr/local/bin/ublkd"

pytestmark = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")


def complaints(text: str, place: Path) -> str:
    """What systemd-analyze has to say about a unit of this text; ublkd need not be installed."""
    assert INSTALLED in text
    place.write_text(text.replace(INSTALLED, sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", place], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = [line for line in done.stdout.splitlines() if place.name.partition("@")[0] in line]
    return "\n".join(lines) or ("" if done.returncode == 0 else done.stdout or f"status {done.returncode}")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_is_understood(unit: Path, tmp_path: Path) -> None:
    assert complaints(unit.read_text(), tmp_path / unit.name) == ""


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
@pytest.mark.parametrize(
    ("right", "wrong"),
    [("KillMode=mixed", "KillMod=mixed"), ("Type=notify", "Type=notifies"), (INSTALLED, "/no/such/ublkd")],
)
def test_a_mistake_in_a_unit_would_be_found(unit: Path, right: str, wrong: str, tmp_path: Path) -> None:
    text = unit.read_text()
    assert right in text
    assert complaints(text.replace(right, wrong) + f"# {INSTALLED}\n", tmp_path / unit.name) != ""
