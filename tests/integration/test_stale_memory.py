# SPDX-License-Identifier: Apache-2.0
"""What was never written reads as zeroes, whatever lay in the memory that carries it: no read shows old memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from lib.device import Device
from lib.tools import MIB, forget, has, pwrite

HERE = Path(__file__).resolve().parent
EXAMPLE = f"{HERE.parents[1]}/configs/examples/ram_disk.py:RamDisk"
SIZE = 16 * MIB
WRITTEN = 4 * MIB  # at the front, with the pattern
OLD = b"OLD-MEMORY\xa5\x5a"
PATTERN = (OLD * 86)[:1024]

TARGETS = {
    "null": ("null", {"size": SIZE}),
    "memory": ("memory", {"size": SIZE}),
    "python": ("python", {"file": EXAMPLE, "size": SIZE}),
    "loop-direct": ("loop", {"direct": "on"}),
    "loop-buffered": ("loop", {"direct": "off"}),
}


def transports(target: str) -> list[tuple[str, str]]:
    """(transport, batch) that this driver has for it."""
    names = ["copy", "user-copy", *(["zero-copy"] if target == "loop" and has("AUTO_BUF_REG") else [])]
    batched = [(name, "on") for name in names[1:]] if has("BATCH_IO") else []
    return [*((name, "off") for name in names), *batched]


def dirty_the_free_pages() -> None:
    """Memory that the kernel gives out next holds the pattern."""
    with mmap.mmap(-1, 64 * MIB) as memory:
        memory.write(PATTERN * (64 * MIB // len(PATTERN)))


def look(path: str, direct: bool) -> bytes:
    """Read all that was never written, in pieces of all sizes, to memory that holds the pattern: what isn't zero."""
    found = b""
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    try:
        with mmap.mmap(-1, MIB) as memory:
            at, length = WRITTEN, 4096
            while at < SIZE:
                length = min(length * 2, MIB, SIZE - at)
                memory.seek(0)
                memory.write(PATTERN * (MIB // len(PATTERN)))
                with memoryview(memory) as view, view[:length] as piece:
                    assert os.preadv(fd, [piece], at) == length
                    if piece != bytes(length):
                        found += bytes(piece)
                at += length
    finally:
        os.close(fd)
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_no_read_shows_old_memory(name: str, serve: Callable[..., Device], image: Callable[..., Path]) -> None:
    target, settings = TARGETS[name]
    for transport, batch in transports(target):
        file = {"file": image(SIZE)} if target == "loop" else {}
        device = serve(target, queues=1, depth=8, transport=transport, batch=batch, **settings, **file)
        # buffers of tags hold it, too
        pwrite(device.path, PATTERN * (WRITTEN // len(PATTERN)), 0)
        for direct in (True, False):
            dirty_the_free_pages()
            forget(device.path)
            found = look(device.path, direct)
            assert not found, f"{transport}, batch {batch}, direct {direct}: {found.strip(bytes(1))[:100]!r}"
        device.stop()


def test_the_look_sees_old_memory(serve: Callable[..., Device]) -> None:
    """Or the other tests would prove nothing. --no-zero says what it does."""
    device = serve("null", size=SIZE, queues=1, zero=False, transport="user-copy")
    assert OLD in look(device.path, direct=True)
