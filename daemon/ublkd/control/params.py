# SPDX-License-Identifier: Apache-2.0
"""Device parameters, in bytes; the wire has shifts and sectors."""

from __future__ import annotations

import os
from typing import NamedTuple

from ublkd.control import uapi
from ublkd.errors import UsageError

_PAGE = os.sysconf("SC_PAGESIZE")
_MAX_SHIFT_BYTES = 1 << 28  # newer kernels refuse larger hints
_U32 = 0xFFFFFFFF
_CSUM_TUPLE_BYTES = {0: 0, 1: 8, 2: 8, 4: 16}  # LBMD_PI_CSUM_*: none, ip, crc16, crc64


class Basic(NamedTuple):
    """Size and shape. `attrs` are uapi.ATTR_*; block sizes and hints are powers of two."""

    size: int
    block_size: int = 512
    physical_block_size: int = 512
    io_min: int = 512
    io_opt: int = 512
    max_io_bytes: int = 512 << 10
    chunk_bytes: int = 0
    attrs: int = 0
    virt_boundary_mask: int = 0


class Discard(NamedTuple):
    """Discard and write zeroes; a maximum of 0 means that the operation is not offered."""

    granularity: int
    max_discard_bytes: int = 0
    max_write_zeroes_bytes: int = 0
    alignment: int = 0
    max_segments: int = 1


class Devt(NamedTuple):
    """Device numbers, filled in by the driver. The disk's are 0:0 until the start."""

    char_major: int
    char_minor: int
    disk_major: int
    disk_minor: int


class Zoned(NamedTuple):
    """Zone limits; 0 open or active zones means no limit."""

    max_open_zones: int
    max_active_zones: int
    max_append_bytes: int


class Segment(NamedTuple):
    """Limits of one request's memory segments."""

    boundary_mask: int
    max_bytes: int
    max_segments: int


class Integrity(NamedTuple):
    """Integrity data per interval; flags and csum_type are LBMD_PI_*."""

    flags: int
    max_segments: int
    interval_exp: int
    metadata_bytes: int
    pi_offset: int
    csum_type: int
    tag_bytes: int


class Params(NamedTuple):
    """One device's parameters. `dma_align` is an alignment in bytes."""

    basic: Basic
    discard: Discard | None = None
    devt: Devt | None = None
    zoned: Zoned | None = None
    dma_align: int | None = None
    segment: Segment | None = None
    integrity: Integrity | None = None

    def check(self, max_io_bytes: int, flags: int) -> None:
        """UsageError for what the driver would answer with a bare EINVAL. Arguments: what ADD_DEV granted."""
        self._check_basic(max_io_bytes)
        if self.discard is not None:
            d = self.discard
            _require(d.granularity > 0, "discard granularity", d.granularity, "not be 0")
            _require(
                not d.max_discard_bytes or d.max_segments == 1, "discard segments", d.max_segments, "be 1"
            )
        self._check_zoned(flags)
        if self.dma_align is not None:
            _require(
                _is_power(self.dma_align) and self.dma_align < _PAGE,
                "DMA alignment",
                self.dma_align,
                f"be a power of two below {_PAGE}",
            )
        if self.segment is not None:
            boundary, max_bytes, max_segments = self.segment
            _require(
                _is_power(boundary + 1) and boundary + 1 >= 4096,
                "segment boundary mask",
                boundary,
                "be a power of two of at least 4096, minus 1",
            )
            _require(max_bytes >= 4096, "segment size", max_bytes, "be at least 4096 bytes")
            _require(max_segments > 0, "segment count", max_segments, "not be 0")
        if self.integrity is not None:
            self._check_integrity(self.integrity, flags)

    def _check_basic(self, max_io_bytes: int) -> None:
        b = self.basic
        _require(
            _is_power(b.block_size) and 512 <= b.block_size <= _PAGE,
            "block size",
            b.block_size,
            f"be a power of two from 512 to {_PAGE}",
        )
        _require(
            _is_power(b.physical_block_size) and b.block_size <= b.physical_block_size <= _MAX_SHIFT_BYTES,
            "physical block size",
            b.physical_block_size,
            f"be a power of two from the block size ({b.block_size}) to {_MAX_SHIFT_BYTES}",
        )
        for name, value in (("minimal I/O size", b.io_min), ("optimal I/O size", b.io_opt)):
            _require(
                _is_power(value) and value <= _MAX_SHIFT_BYTES,
                name,
                value,
                f"be a power of two up to {_MAX_SHIFT_BYTES}",
            )
        _require(
            _PAGE <= b.max_io_bytes <= max_io_bytes and b.max_io_bytes % uapi.SECTOR == 0,
            "largest request",
            b.max_io_bytes,
            f"be whole sectors, from {_PAGE} to the {max_io_bytes} bytes that the device was added with",
        )
        _require(
            b.size > 0 and b.size % b.block_size == 0,
            "device size",
            b.size,
            f"be a positive multiple of the block size ({b.block_size})",
        )
        if b.attrs & uapi.ATTR_FUA and not b.attrs & uapi.ATTR_VOLATILE_CACHE:
            raise UsageError("FUA makes sense only for a device with a volatile cache")

    def _check_zoned(self, flags: int) -> None:
        if bool(flags & uapi.F_ZONED) != (self.zoned is not None):
            raise UsageError("zoned parameters and the ZONED flag go together")
        if self.zoned is None:
            return
        chunk = self.basic.chunk_bytes
        _require(_is_power(chunk), "zone size", chunk, "be a power of two")
        append, zones = self.zoned.max_append_bytes, -(-self.basic.size // chunk)
        _require(append > 0, "largest zone append", append, "not be 0")
        for name, value in (
            ("open zones", self.zoned.max_open_zones),
            ("active zones", self.zoned.max_active_zones),
        ):
            _require(value <= zones, name, value, f"be at most the number of zones ({zones})")

    def _check_integrity(self, integrity: Integrity, flags: int) -> None:
        if not flags & uapi.F_INTEGRITY:
            raise UsageError("integrity parameters need the INTEGRITY flag")
        size = integrity.metadata_bytes
        _require(size > 0, "integrity metadata size", size, "not be 0")
        tuple_bytes = _CSUM_TUPLE_BYTES.get(integrity.csum_type)
        if tuple_bytes is None:
            raise UsageError(f"checksum type {integrity.csum_type} is unknown")
        _require(
            integrity.pi_offset + tuple_bytes <= size,
            "protection information offset",
            integrity.pi_offset,
            f"leave {tuple_bytes} bytes of the metadata's {size}",
        )
        _require(
            uapi.SECTOR <= 1 << integrity.interval_exp <= self.basic.block_size,
            "integrity interval",
            integrity.interval_exp,
            "lie between 9 and the block size's shift",
        )

    def pack(self) -> bytearray:
        """struct ublk_params. Device numbers are the driver's to give and are left out."""
        out = bytearray(uapi.PARAMS_BYTES)
        types = uapi.TYPE_BASIC
        b = self.basic
        uapi.BASIC.pack_into(
            out,
            uapi.BASIC_OFFSET,
            b.attrs,
            _shift(b.block_size),
            _shift(b.physical_block_size),
            _shift(b.io_opt),
            _shift(b.io_min),
            _sectors(b.max_io_bytes),
            _sectors(b.chunk_bytes),
            b.size // uapi.SECTOR,
            b.virt_boundary_mask,
        )
        if self.discard is not None:
            types |= uapi.TYPE_DISCARD
            d = self.discard
            uapi.DISCARD.pack_into(
                out,
                uapi.DISCARD_OFFSET,
                d.alignment,
                d.granularity,
                _sectors(d.max_discard_bytes),
                _sectors(d.max_write_zeroes_bytes),
                d.max_segments,
                0,
            )
        if self.zoned is not None:
            types |= uapi.TYPE_ZONED
            z = self.zoned
            uapi.ZONED.pack_into(
                out,
                uapi.ZONED_OFFSET,
                z.max_open_zones,
                z.max_active_zones,
                _sectors(z.max_append_bytes),
            )
        if self.dma_align is not None:
            types |= uapi.TYPE_DMA_ALIGN
            uapi.DMA_ALIGN.pack_into(out, uapi.DMA_ALIGN_OFFSET, self.dma_align - 1)
        if self.segment is not None:
            types |= uapi.TYPE_SEGMENT
            uapi.SEGMENT.pack_into(out, uapi.SEGMENT_OFFSET, *self.segment)
        if self.integrity is not None:
            types |= uapi.TYPE_INTEGRITY
            uapi.INTEGRITY.pack_into(out, uapi.INTEGRITY_OFFSET, *self.integrity)
        uapi.PARAMS_HEADER.pack_into(out, 0, len(out), types)
        return out

    @classmethod
    def unpack(cls, data: bytes | bytearray) -> Params:
        """From struct ublk_params of the full length, zeroes where the driver knows less.

        Without the basic part (nothing was set yet) the size is 0.
        """
        _, types = uapi.PARAMS_HEADER.unpack_from(data, 0)
        basic = Basic(0)
        if types & uapi.TYPE_BASIC:
            attrs, lbs, pbs, io_opt, io_min, max_io, chunk, sectors, boundary = uapi.BASIC.unpack_from(
                data, uapi.BASIC_OFFSET
            )
            basic = Basic(
                sectors * uapi.SECTOR,
                1 << lbs,
                1 << pbs,
                1 << io_min,
                1 << io_opt,
                max_io * uapi.SECTOR,
                chunk * uapi.SECTOR,
                attrs,
                boundary,
            )
        discard = devt = zoned = segment = integrity = dma_align = None
        if types & uapi.TYPE_DISCARD:
            align, unit, most, zeroes, segments, _ = uapi.DISCARD.unpack_from(data, uapi.DISCARD_OFFSET)
            discard = Discard(unit, most * uapi.SECTOR, zeroes * uapi.SECTOR, align, segments)
        if types & uapi.TYPE_DEVT:
            devt = Devt._make(uapi.DEVT.unpack_from(data, uapi.DEVT_OFFSET))
        if types & uapi.TYPE_ZONED:
            opened, active, append = uapi.ZONED.unpack_from(data, uapi.ZONED_OFFSET)
            zoned = Zoned(opened, active, append * uapi.SECTOR)
        if types & uapi.TYPE_DMA_ALIGN:
            dma_align = uapi.DMA_ALIGN.unpack_from(data, uapi.DMA_ALIGN_OFFSET)[0] + 1
        if types & uapi.TYPE_SEGMENT:
            segment = Segment._make(uapi.SEGMENT.unpack_from(data, uapi.SEGMENT_OFFSET))
        if types & uapi.TYPE_INTEGRITY:
            integrity = Integrity._make(uapi.INTEGRITY.unpack_from(data, uapi.INTEGRITY_OFFSET))
        return cls(basic, discard, devt, zoned, dma_align, segment, integrity)


def _is_power(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def _shift(value: int) -> int:
    return value.bit_length() - 1


def _sectors(value: int) -> int:
    """Whole sectors, as many as the field can say: a limit above that is no limit."""
    return min(value // uapi.SECTOR, _U32)


def _require(ok: bool, what: str, value: int, rule: str) -> None:
    if not ok:
        raise UsageError(f"{what} {value}: must {rule}")
