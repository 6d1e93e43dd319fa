# SPDX-License-Identifier: Apache-2.0
"""Write the "newc" cpio archives that Linux takes as an initramfs (several may be joined end to end)."""

from __future__ import annotations

import stat

_TRAILER = "TRAILER!!!"


class Archive:
    """An archive in memory. Add directories before what lies in them."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._inode = 0

    def directory(self, name: str) -> None:
        """Add a directory."""
        self._entry(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._entry(name, stat.S_IFREG | mode, data)

    def symlink(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def data(self) -> bytes:
        """The finished archive, padded so that another may follow."""
        trailer = Archive()
        trailer._entry(_TRAILER, 0, b"")
        whole = b"".join(self._chunks + trailer._chunks)
        return whole + bytes(-len(whole) % 512)

    def _entry(self, name: str, mode: int, data: bytes) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._chunks += [_padded(head), _padded(data)]


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
