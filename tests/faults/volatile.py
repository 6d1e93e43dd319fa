# SPDX-License-Identifier: Apache-2.0
"""Disks that lose what they were not told to keep, for VMs: an NBD server with a write cache that a power cut empties.

What a guest wrote is in the cache until it flushes, or says FUA. When the power goes, each write in the cache is kept
or lost by itself, whole or cut at a sector, in whatever order: as a disk with a volatile cache may do it.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

SECTOR = 512
CACHE_BYTES = 64 << 20
KEPT = 0.5  # of the writes in the cache, when the power goes
TORN = 0.3  # of those that are kept: only a part from their start

_HELLO = struct.pack(">8s8sH", b"NBDMAGIC", b"IHAVEOPT", 3)
_REPLY_MAGIC = 0x3E889045565A9
_EXPORT_NAME, _ABORT, _INFO, _GO = 1, 2, 6, 7
_ACK, _REP_INFO, _UNSUPPORTED = 1, 3, 0x80000001
_FLAGS = 1 | 4 | 8  # it has flags, takes flushes, takes FUA
_READ, _WRITE, _DISCONNECT, _FLUSH = range(4)
_FUA = 1


class Power:
    """The switch of all disks of a machine. While it is off, none of them answers."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.on = True


@dataclass
class _Write:
    offset: int
    before: bytes
    data: bytes
    durable: bool


class Disk:
    """One disk: what it holds now is in a file; the cache has what it would take to undo that."""

    def __init__(self, size: int, power: Power, rng: random.Random, directory: str = "/var/tmp") -> None:
        self.size = size
        self.power = power
        self._rng = rng
        self._fd = os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
        os.ftruncate(self._fd, size)
        self._cache: list[_Write] = []
        self._cached = 0
        self.flushes = self.fuas = self.writes = self.lost_writes = self.kept_writes = 0

    def read(self, offset: int, length: int) -> bytes:
        """Bytes as the guest sees them."""
        return os.pread(self._fd, length, offset)

    def write(self, offset: int, data: bytes, fua: bool = False) -> None:
        """Into the cache; with fua, through it."""
        self.writes += 1
        self.fuas += fua
        self._cache.append(_Write(offset, os.pread(self._fd, len(data), offset), data, fua))
        os.pwrite(self._fd, data, offset)
        self._cached += len(data)
        while self._cached > CACHE_BYTES:
            # no cache is without end; the oldest goes to the disk, as it may at any time
            self._cached -= len(self._cache.pop(0).data)

    def flush(self) -> None:
        """All that was written is kept."""
        self.flushes += 1
        self._cache.clear()
        self._cached = 0

    def lose_power(self) -> None:
        """Forget the cache, but for what by chance had reached the disk."""
        for write in reversed(self._cache):
            os.pwrite(self._fd, write.before, write.offset)
        for write in self._cache:
            data = write.data
            if not write.durable:
                if self._rng.random() >= KEPT:
                    self.lost_writes += 1
                    continue
                self.kept_writes += 1
                if self._rng.random() < TORN:
                    data = data[: self._rng.randrange(len(data) // SECTOR + 1) * SECTOR]
            os.pwrite(self._fd, data, write.offset)
        self._cache.clear()
        self._cached = 0

    def close(self) -> None:
        """It is gone."""
        os.close(self._fd)


class Server:
    """Offers a disk on a Unix socket to one client after the other."""

    def __init__(self, disk: Disk, path: Path) -> None:
        self.disk = disk
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(4)
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """No new clients."""
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(EOFError, OSError):
            stream = connection.makefile("rb")
            if self._negotiate(connection, stream):
                while self._request(connection, stream):
                    pass

    def _negotiate(self, connection: socket.socket, stream) -> bool:  # type: ignore[no-untyped-def]
        connection.sendall(_HELLO)
        (client_flags,) = struct.unpack(">I", _exactly(stream, 4))
        while True:
            _, option, length = struct.unpack(">QII", _exactly(stream, 16))
            _exactly(stream, length)
            if option == _EXPORT_NAME:
                padding = b"" if client_flags & 2 else bytes(124)
                connection.sendall(struct.pack(">QH", self.disk.size, _FLAGS) + padding)
                return True
            if option in (_INFO, _GO):
                about = struct.pack(">HQH", 0, self.disk.size, _FLAGS)
                connection.sendall(struct.pack(">QIII", _REPLY_MAGIC, option, _REP_INFO, len(about)) + about)
            known = option in (_INFO, _GO, _ABORT)
            connection.sendall(struct.pack(">QIII", _REPLY_MAGIC, option, _ACK if known else _UNSUPPORTED, 0))
            if option == _ABORT:
                return False
            if option == _GO:
                return True

    def _request(self, connection: socket.socket, stream) -> bool:  # type: ignore[no-untyped-def]
        _, flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", _exactly(stream, 28))
        data = _exactly(stream, length) if kind == _WRITE else b""
        if kind == _DISCONNECT:
            return False
        answer, error = b"", 0
        with self.disk.power.lock:
            # Whatever was answered before the power went counts; nothing is answered after.
            if not self.disk.power.on:
                return False
            if kind == _READ:
                answer = self.disk.read(offset, length)
            elif kind == _WRITE:
                self.disk.write(offset, data, bool(flags & _FUA))
            elif kind == _FLUSH:
                self.disk.flush()
            else:
                error = 22
            connection.sendall(struct.pack(">IIQ", 0x67446698, error, cookie) + answer)
        return True


def _exactly(stream, length: int) -> bytes:  # type: ignore[no-untyped-def]
    data: bytes = stream.read(length)
    if len(data) < length:
        raise EOFError
    return data
