# SPDX-License-Identifier: Apache-2.0
"""From a spec and a target's limits to what the driver is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ublkd import native
from ublkd.control import uapi
from ublkd.control.params import Basic, Discard, Params
from ublkd.errors import UsageError

if TYPE_CHECKING:
    from ublkd.config.schema import DeviceSpec
    from ublkd.control.features import Features
    from ublkd.targets.base import ControlTarget, Limits

TRANSPORTS = {
    "copy": native.TRANSPORT_COPY,
    "user-copy": native.TRANSPORT_USER_COPY,
    "zero-copy": native.TRANSPORT_ZERO_COPY,
}
# What each takes of the driver. Zero copy falls back to user copy for a request that can't be registered.
TRANSPORT_FLAGS = {
    "copy": 0,
    "user-copy": uapi.F_USER_COPY,
    "zero-copy": uapi.F_USER_COPY | uapi.F_AUTO_BUF_REG,
}


def choose_transport(spec: DeviceSpec, target: ControlTarget, features: Features) -> str:
    """The transport's name: the one asked for, else the target's best that this driver has."""
    possible = [t for t in target.transports if TRANSPORT_FLAGS[t] & ~features == 0]
    if spec.transport == "auto":
        return possible[0]
    if spec.transport not in possible:
        raise UsageError(
            f"the transport {spec.transport} can't be had for {spec.target} on this driver",
            hint=f"there is {' and '.join(possible)}",
        )
    return spec.transport


def transport_of(flags: int) -> str:
    """The transport of a device that was granted flags."""
    by_need = sorted(TRANSPORT_FLAGS, key=lambda t: -TRANSPORT_FLAGS[t].bit_count())
    return next(t for t in by_need if TRANSPORT_FLAGS[t] & ~flags == 0)


def choose_flags(spec: DeviceSpec, transport: str, features: Features) -> int:
    """UBLK_F_* for ADD_DEV. What a driver that can't be asked drops is seen in its answer."""
    flags = uapi.F_CMD_IOCTL_ENCODE | TRANSPORT_FLAGS[transport]
    # Requests that a dead server held are issued again: writing the same twice does no harm to these targets.
    if features.has("USER_RECOVERY_REISSUE"):
        flags |= uapi.F_USER_RECOVERY | uapi.F_USER_RECOVERY_REISSUE
    if not spec.partscan:
        if not features.has("NO_AUTO_PART_SCAN"):
            raise UsageError(
                "--no-partscan needs a driver with NO_AUTO_PART_SCAN (Linux 7.0)",
                hint="leave it out; `ublkd features` lists what this driver has",
            )
        flags |= uapi.F_NO_AUTO_PART_SCAN
    return flags


def build_params(limits: Limits, max_io_bytes: int) -> Params:
    """The device's parameters; limits are in bytes, as everything here."""
    attrs = (
        (uapi.ATTR_READ_ONLY if limits.read_only else 0)
        | (uapi.ATTR_ROTATIONAL if limits.rotational else 0)
        | (uapi.ATTR_VOLATILE_CACHE if limits.volatile_cache else 0)
        | (uapi.ATTR_FUA if limits.fua else 0)
    )
    basic = Basic(
        size=limits.size,
        block_size=limits.block_size,
        physical_block_size=limits.physical_block_size,
        io_min=limits.io_min or limits.physical_block_size,
        # The driver takes powers of two; others say nothing useful about alignment.
        io_opt=limits.io_opt if limits.io_opt & (limits.io_opt - 1) == 0 and limits.io_opt else limits.io_min,
        max_io_bytes=max_io_bytes,
        attrs=attrs,
    )
    discard = None
    if limits.max_discard or limits.max_write_zeroes:
        discard = Discard(
            granularity=limits.discard_granularity or limits.block_size,
            max_discard_bytes=limits.max_discard,
            max_write_zeroes_bytes=limits.max_write_zeroes,
        )
    # 512 is what the kernel takes for granted; drivers before 6.15 know no other.
    return Params(basic, discard, dma_align=limits.dma_align if limits.dma_align > 512 else None)
