# SPDX-License-Identifier: Apache-2.0
"""The log of dm-log-writes is read as the kernel writes it."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from faults.writelog import DISCARD, FLUSH, FUA, MAGIC, MARK, WriteLog


def sector(data: bytes) -> bytes:
    return data.ljust(512, b"\0")


def entry(start: int, count: int, flags: int, data: bytes = b"") -> bytes:
    return sector(struct.pack("<4Q", start, count, flags, len(data) if flags & MARK else 0) + data * bool(flags & MARK))


def test_replay(tmp_path: Path) -> None:
    entries = [
        entry(0, 2, 0) + b"a" * 1024,
        entry(0, 0, FLUSH),
        entry(0, 0, MARK, b"record-7"),
        entry(1, 1, FUA) + b"b" * 512,
        entry(0, 1, DISCARD),
    ]
    path = tmp_path / "log"
    path.write_bytes(sector(struct.pack("<3QI", MAGIC, 1, len(entries), 512)) + b"".join(entries))
    log = WriteLog(str(path))
    found = list(log.read())
    assert [each.durable for each in found] == [False, True, False, True, False]
    assert found[2].mark == "record-7"
    states = []
    with open(tmp_path / "image", "wb+") as image:
        for each in found:
            log.replay(each, image.fileno())
            states.append(os.pread(image.fileno(), 1024, 0))
    log.close()
    a, b, none = b"a" * 512, b"b" * 512, bytes(512)
    assert states == [a + a, a + a, a + a, a + b, none + b]


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(bytes(4096))
    with pytest.raises(ValueError, match="no log of writes"):
        WriteLog(str(path))
