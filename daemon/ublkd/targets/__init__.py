# SPDX-License-Identifier: Apache-2.0
"""The targets: what a device can be made of. Modules are imported when one is asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ublkd.targets.base import ControlTarget

# name -> (module, class, one line for `ublkd targets`)
TARGETS = {
    "loop": ("ublkd.targets.loop", "LoopTarget", "a regular file or a block device"),
    "memory": ("ublkd.targets.memory", "MemoryTarget", "a RAM disk; discard gives memory back"),
    "null": ("ublkd.targets.null", "NullTarget", "accepts everything, stores nothing; for measuring"),
    "python": ("ublkd.targets.python", "PythonTarget", "a class of yours: FILE:CLASS"),
}


def get(name: str) -> type[ControlTarget]:
    """The control-side class of a target; KeyError if there is none of that name."""
    module, cls, _help = TARGETS[name]
    found: type[ControlTarget] = getattr(importlib.import_module(module), cls)
    return found
