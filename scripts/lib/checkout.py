# SPDX-License-Identifier: Apache-2.0
"""How a script in Python comes to run in the checkout's own environment."""

import os
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]
VENV = TOP / ".venv"
PYTHON = VENV / "bin" / "python"


def enter(script: str, group: str) -> None:
    """Go on as the Python of .venv, if there is one: ublkd and what `scripts/setup GROUP` installs are there."""
    if PYTHON.exists() and Path(sys.prefix).resolve() != VENV:
        if os.environ.get("UBLKD_SCRIPT_EXEC"):
            sys.exit(f"{script}: {PYTHON} does not start as that of {VENV}: run scripts/setup {group}")
        os.environ["UBLKD_SCRIPT_EXEC"] = "1"
        os.execv(PYTHON, [str(PYTHON), "-B", str(TOP / "scripts" / script), *sys.argv[1:]])
    os.environ.pop("UBLKD_SCRIPT_EXEC", None)
