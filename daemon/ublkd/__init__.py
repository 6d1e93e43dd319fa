# SPDX-License-Identifier: Apache-2.0
"""Block devices in user space on Linux's ublk driver.

For a device in Python, derive from Target and call serve(), or give the class to `ublkd run python`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ublkd._version import __version__

if TYPE_CHECKING:
    from ublkd._pytarget import (
        DISCARD,
        FLUSH,
        READ,
        WRITE,
        WRITE_ZEROES,
        Batch,
        Operation,
        Request,
        sleep,
    )
    from ublkd.errors import UblkdError
    from ublkd.target import Target
    from ublkd.targets.python import Spec

__all__ = [
    "DISCARD",
    "FLUSH",
    "READ",
    "WRITE",
    "WRITE_ZEROES",
    "Batch",
    "Operation",
    "Request",
    "Spec",
    "Target",
    "UblkdError",
    "__version__",
    "serve",
    "sleep",
]

_ELSEWHERE = {"Target": "ublkd.target", "UblkdError": "ublkd.errors"}


def __getattr__(name: str) -> object:
    # `import ublkd` is part of every command's start-up, so names are fetched when they are first used.
    if name not in __all__:
        raise AttributeError(f"module 'ublkd' has no attribute {name!r}")
    value = getattr(importlib.import_module(_ELSEWHERE.get(name, "ublkd.targets.python")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def serve(target: Target | type[Target], **settings: Any) -> int:
    """Serve a target as a block device until SIGINT or SIGTERM; the exit status of `ublkd run`.

    settings are those of ublkd.toml(5): size="1G", queues=4, depth=64, params={...}. Raises UblkdError if the
    device can't be made. Call it under `if __name__ == "__main__"`: recovery imports the script again.
    """
    from ublkd.supervisor import run_foreground
    from ublkd.targets.python import PythonTarget, script_spec

    spec = script_spec(target, settings)
    return run_foreground(spec, target=PythonTarget(spec, target))
