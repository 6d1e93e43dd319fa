# SPDX-License-Identifier: Apache-2.0
"""What a disk's settings were before scripts/tune changed them: /run/ublkd/tune-N.json."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ublkd import inventory
from ublkd.errors import UblkdError

from .disk import ATTRIBUTES, Disk, valid
from .workers import valid_cpus

FORMAT = 1
_MOST_BYTES = 64 * 1024


@dataclass
class Originals:
    """Attributes as they were, and the `cpus` setting if the workers were moved (`moved`; cpus None: none)."""

    attributes: dict[str, str]
    moved: bool = False
    cpus: list[int] | None = None

    def under(self, later: Originals) -> Originals:
        """Of two records the older one's word counts, so that the first originals are never lost."""
        first = self if self.moved else later
        return Originals({**later.attributes, **self.attributes}, first.moved, first.cpus)


def path_of(disk: Disk) -> Path:
    """Its file."""
    name = disk.name if disk.ublk_id is None else str(disk.ublk_id)
    return Path(inventory.runtime_dir()) / f"tune-{name}.json"


def load(disk: Disk) -> Originals | None:
    """What was stored for this very disk; None if nothing was. UblkdError if it is another's, or damaged."""
    path = path_of(disk)
    try:
        with open(path, "rb") as file:
            content = json.loads(file.read(_MOST_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UblkdError(f"record {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and content.get("format") == FORMAT:
        if content.get("identity") != disk.identity():
            raise Stale(f"record {path} is of another disk that was {disk.path} before", "remove it")
        if originals := _checked(content):
            return originals
    raise UblkdError(f"record {path} is damaged", "remove it; the settings stay as they are")


class Stale(UblkdError):
    """The record is about a disk that is gone."""


def _checked(content: dict[str, Any]) -> Originals | None:
    attributes, moved, cpus = (content.get(name) for name in ("attributes", "moved", "cpus"))
    if not isinstance(attributes, dict) or not isinstance(moved, bool) or not (cpus is None or valid_cpus(cpus)):
        return None
    if not all(name in ATTRIBUTES and valid(name, value) for name, value in attributes.items()):
        return None
    return Originals(attributes, moved, cpus)


def store(disk: Disk, originals: Originals | None) -> None:
    """Write the record whole, or remove it (None)."""
    path = path_of(disk)
    if originals is None:
        path.unlink(missing_ok=True)
        return
    content = {"format": FORMAT, "device": disk.path, "identity": disk.identity(), **vars(originals)}
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        os.rename(new, path)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        hint = "run as root" if isinstance(error, PermissionError) else ""
        raise UblkdError(f"what was there before can't be stored in {path}: {error.strerror}", hint) from None
