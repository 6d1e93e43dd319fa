# SPDX-License-Identifier: Apache-2.0
"""Reads and replays what dm-log-writes recorded (Documentation/admin-guide/device-mapper/log-writes.rst).

The log holds completed writes in the order in which flushes and FUA made them durable: replayed up to any flush, FUA
write or mark, it gives a disk as a power cut at that moment leaves it at the least.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8
MAGIC = 0x6A736677736872
_SUPER = struct.Struct("<3QI")
_ENTRY = struct.Struct("<4Q")


@dataclass
class Entry:
    """One record: bytes of the disk, and where their new contents are in the log."""

    number: int
    flags: int
    offset: int
    length: int
    data_at: int
    mark: str = ""

    @property
    def durable(self) -> bool:
        """All before it had to be on the disk when it was done."""
        return bool(self.flags & (FLUSH | FUA))


class WriteLog:
    """The log on a device or in a file."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        magic, version, self.entries, self.sector = _SUPER.unpack(os.pread(self._fd, _SUPER.size, 0))
        if magic != MAGIC or version != 1:
            raise ValueError(f"{path} holds no log of writes")

    def close(self) -> None:
        """No more reading."""
        os.close(self._fd)

    def read(self) -> Iterator[Entry]:
        """The entries in order."""
        at = self.sector
        for number in range(self.entries):
            head = os.pread(self._fd, self.sector, at)
            sector, sectors, flags, data_len = _ENTRY.unpack_from(head)
            mark = head[_ENTRY.size : _ENTRY.size + data_len].decode() if flags & MARK else ""
            at += self.sector
            yield Entry(number, flags, sector * self.sector, sectors * self.sector, at, mark)
            if not flags & (DISCARD | MARK):
                at += sectors * self.sector

    def replay(self, entry: Entry, image: int) -> None:
        """Do to an open file what the entry did to the disk."""
        if entry.flags & MARK or not entry.length:
            return
        if entry.flags & DISCARD:
            # what a disk gives after a discard is its own affair; ours gives zeroes
            done = 0
            while done < entry.length:
                part = min(1 << 20, entry.length - done)
                os.pwrite(image, bytes(part), entry.offset + done)
                done += part
            return
        done = 0
        while done < entry.length:
            data = os.pread(self._fd, min(1 << 20, entry.length - done), entry.data_at + done)
            os.pwrite(image, data, entry.offset + done)
            done += len(data)
