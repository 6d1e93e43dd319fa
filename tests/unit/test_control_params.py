# SPDX-License-Identifier: Apache-2.0
"""Parameters: to the wire and back, and what is refused before the kernel sees it."""

import mmap
import struct
from typing import Any

import pytest

from ublkd.control import uapi
from ublkd.control.params import Basic, Devt, Discard, Integrity, Params, Segment, Zoned
from ublkd.errors import UsageError

MAX_IO = 512 << 10
BASIC = Basic(
    size=1 << 30,
    block_size=4096,
    physical_block_size=8192,
    io_min=16384,
    io_opt=65536,
    max_io_bytes=MAX_IO,
    chunk_bytes=1 << 20,
    attrs=uapi.ATTR_VOLATILE_CACHE | uapi.ATTR_FUA,
    virt_boundary_mask=4095,
)
FULL = Params(
    BASIC,
    Discard(4096, 64 << 20, 32 << 20),
    zoned=Zoned(8, 4, 128 << 10),
    dma_align=512,
    segment=Segment(0xFFFF, 65536, 128),
    integrity=Integrity(1, 0, 12, 8, 0, 2, 0),
)


def test_round_trip() -> None:
    assert Params.unpack(FULL.pack()) == FULL


def test_basic_on_the_wire() -> None:
    data = Params(BASIC).pack()
    assert len(data) == 152
    assert struct.unpack_from("=II", data) == (152, uapi.TYPE_BASIC)
    assert struct.unpack_from("=IBBBBIIQQ", data, 8) == (12, 12, 13, 16, 14, 1024, 2048, 2 << 20, 4095)


def test_dma_alignment_is_a_mask_on_the_wire() -> None:
    assert struct.unpack_from("=I", Params(BASIC, dma_align=512).pack(), 108) == (511,)


def test_device_numbers_are_never_sent() -> None:
    data = FULL._replace(devt=Devt(1, 2, 3, 4)).pack()
    assert not struct.unpack_from("=II", data)[1] & uapi.TYPE_DEVT
    assert data[60:76] == bytes(16)


def test_device_numbers_are_read() -> None:
    data = Params(BASIC).pack()
    struct.pack_into("=I", data, 4, uapi.TYPE_BASIC | uapi.TYPE_DEVT)
    struct.pack_into("=IIII", data, 60, 240, 1, 259, 7)
    assert Params.unpack(data).devt == Devt(240, 1, 259, 7)


def test_nothing_set_yet() -> None:
    assert Params.unpack(bytes(152)) == Params(Basic(0))


def test_a_limit_above_the_field_is_the_field_s_most() -> None:
    data = Params(BASIC, Discard(4096, max_discard_bytes=1 << 50)).pack()
    assert Params.unpack(data).discard == Discard(4096, 0xFFFFFFFF * 512)


def test_good_parameters_pass() -> None:
    Params(BASIC, FULL.discard, dma_align=512, segment=FULL.segment).check(MAX_IO, 0)
    FULL.check(MAX_IO, uapi.F_ZONED | uapi.F_INTEGRITY | uapi.F_USER_COPY)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"block_size": 1000}, "block size 1000: must be a power of two from 512"),
        ({"block_size": 256}, "block size 256"),
        ({"block_size": 2 * mmap.PAGESIZE, "physical_block_size": 1 << 20}, "block size"),
        ({"physical_block_size": 2048}, "physical block size 2048"),
        ({"io_min": 3000}, "minimal I/O size 3000"),
        ({"io_opt": 1 << 29}, "optimal I/O size"),
        ({"max_io_bytes": MAX_IO + 512}, "largest request"),
        ({"max_io_bytes": 512}, "largest request 512"),
        ({"size": 0}, "device size 0"),
        ({"size": 4096 + 512}, "multiple of the block size (4096)"),
        ({"attrs": uapi.ATTR_FUA}, "FUA"),
    ],
)
def test_bad_basics(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Params(BASIC._replace(**changes)).check(MAX_IO, 0)
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("changes", "flags", "says"),
    [
        ({"discard": Discard(0, 1 << 20)}, 0, "discard granularity 0"),
        ({"discard": Discard(4096, 1 << 20, max_segments=4)}, 0, "discard segments 4: must be 1"),
        ({"zoned": Zoned(0, 0, 4096)}, 0, "go together"),
        ({}, uapi.F_ZONED, "go together"),
        ({"zoned": Zoned(0, 0, 0)}, uapi.F_ZONED, "largest zone append 0"),
        ({"zoned": Zoned(2000, 0, 4096)}, uapi.F_ZONED, "number of zones (1024)"),
        ({"dma_align": 3}, 0, "DMA alignment 3"),
        ({"dma_align": mmap.PAGESIZE}, 0, "DMA alignment"),
        ({"segment": Segment(2047, 4096, 1)}, 0, "segment boundary mask"),
        ({"segment": Segment(4095, 2048, 1)}, 0, "segment size 2048"),
        ({"segment": Segment(4095, 4096, 0)}, 0, "segment count 0"),
        ({"integrity": FULL.integrity}, 0, "INTEGRITY flag"),
        ({"integrity": Integrity(0, 0, 12, 0, 0, 0, 0)}, uapi.F_INTEGRITY, "metadata size 0"),
        ({"integrity": Integrity(0, 0, 12, 8, 4, 2, 0)}, uapi.F_INTEGRITY, "offset 4"),
        ({"integrity": Integrity(0, 0, 13, 8, 0, 2, 0)}, uapi.F_INTEGRITY, "interval 13"),
        ({"integrity": Integrity(0, 0, 12, 8, 0, 9, 0)}, uapi.F_INTEGRITY, "checksum type 9"),
    ],
)
def test_bad_parts(changes: dict[str, Any], flags: int, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Params(BASIC)._replace(**changes).check(MAX_IO, flags)
    assert says in caught.value.message
