# SPDX-License-Identifier: Apache-2.0
"""Proofs that nothing acknowledged is lost: kill storm, power cuts, write orderings, many devices.

`scripts/faults` runs them. What runs in a VM is a module of its own here: storm, powercut.guest, orderings, many.
"""

import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[2]

for _place in (TOP / "tests" / "integration", TOP / "tests"):
    if str(_place) not in sys.path:
        sys.path.insert(0, str(_place))
