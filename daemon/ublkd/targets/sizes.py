# SPDX-License-Identifier: Apache-2.0
"""Checks of sizes that several targets share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ublkd.errors import UsageError

if TYPE_CHECKING:
    from ublkd.config.schema import DeviceSpec


def block_sizes(spec: DeviceSpec, logical: int, physical: int) -> tuple[int, int]:
    """Logical and physical block size in bytes: what spec says, else the target's own."""
    lbs = spec.block_size or logical
    pbs = spec.physical_block_size or max(physical, lbs)
    if pbs < lbs:
        raise UsageError(
            f"the physical block size {pbs} is smaller than the logical {lbs}",
            hint="raise --physical-block-size or lower --block-size",
        )
    return lbs, pbs


def whole_blocks(what: str, size: int, block_size: int) -> int:
    """size, if the device can have it."""
    if size <= 0:
        raise UsageError(f"{what} is {size} bytes: a device needs at least one block of {block_size}")
    if size % block_size:
        raise UsageError(
            f"{what} of {size} bytes is no multiple of the block size {block_size}",
            hint=f"the next smaller one is {size - size % block_size}",
        )
    return size
