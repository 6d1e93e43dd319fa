# SPDX-License-Identifier: Apache-2.0
"""The machine's scratch disks, by turns raw and with a file system for backing files."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from lib.tools import sh

MOUNT_POINT = Path("/run/ublkd-test/scratch")


def names() -> list[str]:
    """Disks that may be overwritten."""
    return os.environ.get("UBLKD_VM_DISKS", "").split()


def with_blocks_of(size: int) -> str | None:
    """The first of them with that logical block size."""
    for path in names():
        if int(Path(f"/sys/block/{os.path.basename(path)}/queue/logical_block_size").read_text()) == size:
            return path
    return None


class Scratch:
    """One disk for the whole run: made into a file system when files are wanted, and back."""

    def __init__(self, disk: str) -> None:
        self.disk = disk
        self.mounted = False

    def directory(self) -> Path:
        """An empty directory on it."""
        if not self.mounted:
            sh("mkfs.ext4", "-qF", self.disk)
            MOUNT_POINT.mkdir(parents=True, exist_ok=True)
            sh("mount", self.disk, MOUNT_POINT)
            self.mounted = True
        self.empty()
        place = MOUNT_POINT / "files"
        place.mkdir()
        return place

    def empty(self) -> None:
        """Give the space back that a test took."""
        if self.mounted:
            shutil.rmtree(MOUNT_POINT / "files", ignore_errors=True)

    def raw(self) -> str:
        """The disk itself, unused and blank."""
        self.release()
        sh("blkdiscard", "-f", self.disk)
        sh("wipefs", "-aqf", self.disk)
        return self.disk

    def release(self) -> None:
        """Unmount."""
        if self.mounted:
            sh("umount", MOUNT_POINT)
            self.mounted = False
