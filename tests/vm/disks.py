# SPDX-License-Identifier: Apache-2.0
"""Scratch disks: sparse files without a name, so that nothing is left behind whatever happens."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


@dataclass(frozen=True)
class Disk:
    """A scratch disk: bytes, logical and physical sector size, and whether it discards.

    With nbd, the Unix socket of an NBD server, the disk is that server's, and so is what becomes of it.
    """

    size: int
    sector: int = 512
    discard: bool = False
    nbd: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Disk:
        """From SIZE[,sector=N][,discard]. Raises ValueError."""
        size_text, *flags = text.split(",")
        size, sector, discard = parse_size(size_text), 512, False
        for flag in flags:
            if flag == "discard":
                discard = True
            elif match := re.fullmatch(r"sector=(512|1024|2048|4096)", flag):
                sector = int(match[1])
            else:
                raise ValueError(f"{flag!r} is neither sector=512|1024|2048|4096 nor discard")
        if size % sector or size == 0:
            raise ValueError(f"size {size_text} is not a multiple of the sector size {sector}")
        return cls(size, sector, discard)

    def create(self) -> int:
        """Make the file and return its descriptor, the only way to reach it. No disk of an NBD server's."""
        directory = os.environ.get("TMPDIR") or "/var/tmp"
        descriptor = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
        os.ftruncate(descriptor, self.size)
        return descriptor


def parse_size(text: str) -> int:
    """Bytes from a number with an optional K, M, G or T (powers of 1024). Raises ValueError."""
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"{text!r} is not a size such as 512M or 2G")
    return int(match[1]) * _UNITS[match[2].upper()]
