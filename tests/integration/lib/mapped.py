# SPDX-License-Identifier: Apache-2.0
"""Device-mapper devices: disks that fail, lie, wait, or keep a record, and change their mind while they are used."""

from __future__ import annotations

import os

from lib.tools import sh

# nobody to wait for: dmsetup makes the nodes itself
_ENV = {**os.environ, "DM_DISABLE_UDEV": "1"}


def sectors(path: str) -> int:
    """Size of a block device in units of 512 bytes."""
    return int(sh("blockdev", "--getsz", path))


class Mapped:
    """One device of the given lines of a table."""

    def __init__(self, name: str, *lines: str) -> None:
        self.name = name
        self.path = f"/dev/mapper/{name}"
        sh("dmsetup", "create", name, input="\n".join(lines), env=_ENV)

    def load(self, *lines: str) -> None:
        """Another table; I/O under way ends on the old one first."""
        sh("dmsetup", "load", self.name, input="\n".join(lines), env=_ENV)
        sh("dmsetup", "suspend", "--nolockfs", self.name, env=_ENV)
        self.resume()

    def suspend(self) -> None:
        """I/O waits from here on."""
        sh("dmsetup", "suspend", "--nolockfs", self.name, env=_ENV)

    def resume(self) -> None:
        """No longer."""
        sh("dmsetup", "resume", self.name, env=_ENV)

    def remove(self) -> None:
        """It is gone."""
        sh("dmsetup", "remove", "--retry", "--force", self.name, env=_ENV)
