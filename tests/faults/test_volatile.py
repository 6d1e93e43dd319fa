# SPDX-License-Identifier: Apache-2.0
"""The disks of the power cuts lose what may be lost, and nothing else."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.volatile import Disk, Power, Server

SIZE = 1 << 20


@pytest.fixture
def disk() -> Iterator[Disk]:
    disk = Disk(SIZE, Power(), random.Random(7))
    yield disk
    disk.close()


def block(number: int) -> bytes:
    return bytes([number % 255 + 1]) * 4096


def test_flushed_writes_are_kept(disk: Disk) -> None:
    for number in range(50):
        disk.write(number * 4096, block(number))
    disk.flush()
    disk.lose_power()
    assert all(disk.read(number * 4096, 4096) == block(number) for number in range(50))
    assert disk.lost_writes == 0


def test_of_other_writes_some_are_lost_and_some_are_torn(disk: Disk) -> None:
    for number in range(200):
        disk.write(number * 4096, block(number))
    disk.lose_power()
    found = [disk.read(number * 4096, 4096) for number in range(200)]
    kept = sum(data == block(number) for number, data in enumerate(found))
    lost = sum(data == bytes(4096) for data in found)
    assert kept > 20 and lost > 20 and kept + lost < 200
    for number, data in enumerate(found):
        sectors = [data[at : at + 512] for at in range(0, 4096, 512)]
        assert all(sector in (bytes(512), block(number)[:512]) for sector in sectors)
        assert sectors == sorted(sectors, reverse=True), "a torn write is a part from its start"


def test_what_was_there_before_comes_back(disk: Disk) -> None:
    disk.write(0, block(1))
    disk.flush()
    for _ in range(40):
        disk.write(0, block(2))
        disk.write(0, block(3))
        disk.lose_power()
        data = disk.read(0, 4096)
        assert {data[at : at + 512] for at in range(0, 4096, 512)} <= {block(n)[:512] for n in (1, 2, 3)}
        disk.write(0, block(1))
        disk.flush()


def test_a_write_with_fua_is_kept_over_an_older_one_without(disk: Disk) -> None:
    for _ in range(40):
        disk.write(8192, block(1))
        disk.write(8192, block(2), fua=True)
        disk.lose_power()
        assert disk.read(8192, 4096) == block(2)


def test_nothing_is_answered_once_the_power_is_off(disk: Disk, tmp_path: Path) -> None:
    server = Server(disk, tmp_path / "disk")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(server.path))
        stream = client.makefile("rb")
        assert stream.read(18)[:8] == b"NBDMAGIC"
        client.sendall(struct.pack(">IQII", 3, int.from_bytes(b"IHAVEOPT", "big"), 1, 0))
        assert struct.unpack(">QH", stream.read(10))[0] == SIZE
        client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, 5, 4096, 4096) + block(9))
        assert struct.unpack(">IIQ", stream.read(16)) == (0x67446698, 0, 5)
        client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 6, 4096, 4096))
        assert stream.read(16 + 4096)[16:] == block(9)
        with disk.power.lock:
            disk.power.on = False
        client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 3, 7, 0, 0))
        assert stream.read(16) == b""
    server.close()
    assert disk.flushes == 0
