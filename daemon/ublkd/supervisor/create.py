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

BATCHED = "+batch"  # behind a transport's name: with commands for many tags at once
TRANSPORTS = {
    "copy": native.TRANSPORT_COPY,
    "user-copy": native.TRANSPORT_USER_COPY,
    "zero-copy": native.TRANSPORT_ZERO_COPY,
    "user-copy" + BATCHED: native.TRANSPORT_USER_COPY | native.TRANSPORT_BATCH,
    "zero-copy" + BATCHED: native.TRANSPORT_ZERO_COPY | native.TRANSPORT_BATCH,
}
# What each takes of the driver. Zero copy falls back to user copy for a request that can't be registered.
TRANSPORT_FLAGS = {
    "copy": 0,
    "user-copy": uapi.F_USER_COPY,
    "zero-copy": uapi.F_USER_COPY | uapi.F_AUTO_BUF_REG,
}
TRANSPORT_FLAGS |= {name + BATCHED: TRANSPORT_FLAGS[name] | uapi.F_BATCH_IO for name in ("user-copy", "zero-copy")}

# What each --on-crash takes of the driver, beside USER_RECOVERY itself.
CRASH_FLAGS = {
    "requeue": "USER_RECOVERY_REISSUE",
    "fail": "USER_RECOVERY",
    "error": "USER_RECOVERY_FAIL_IO",
}


def choose_transport(spec: DeviceSpec, target: ControlTarget, features: Features) -> str:
    """The transport's name: the one asked for, else the target's best that this driver has."""
    possible = [t for t in target.transports if TRANSPORT_FLAGS[t] & ~features == 0]
    if spec.transport not in ("auto", *possible):
        raise UsageError(
            f"the transport {spec.transport} can't be had for {spec.target} on this driver",
            hint=f"there is {' and '.join(possible)}",
        )
    transport = possible[0] if spec.transport == "auto" else spec.transport
    return transport + BATCHED if _batched(spec, target, transport, features) else transport


def _batched(spec: DeviceSpec, target: ControlTarget, transport: str, features: Features) -> bool:
    """Whether commands are for many tags at once."""
    if spec.batch == "off":
        return False
    lacking = why_not_batched(transport, on_crash(spec, target), bool(uapi.F_BATCH_IO & features))
    if spec.workers_per_queue > 1:
        lacking = "a queue's requests come in batches to one worker"
    if lacking:
        raise UsageError(f"--batch on can't be had: {lacking}", hint="leave it out")
    return True


def why_not_batched(transport: str, policy: str, offered: bool) -> str:
    """What a transport of this name (and --on-crash policy) has against commands for many tags at once, or nothing."""
    if not offered:
        return "the driver has no BATCH_IO (Linux 7.0)"
    if transport + BATCHED not in TRANSPORTS:
        return f"the transport is {transport}"
    if policy != "requeue":
        # When a server ends, the driver fails requests that it has not brought to it yet like those that it has.
        return f"--on-crash is {policy}, and even an upgrade would fail requests"
    return ""


def about_batch(flags: int, transport: str, policy: str, asked: str, offered: bool) -> str:
    """Whether a device that was granted flags has commands for many requests at once, and why.

    asked: its setting; offered: the driver has them.
    """
    if flags & uapi.F_BATCH_IO:
        return "on: the driver takes and brings many requests at once" + (" (--batch on)" if asked == "on" else "")
    why = "--batch is off" if asked == "off" else why_not_batched(transport, policy, offered)
    return f"off: {why or 'it was made by a version without them'}"


def transport_of(flags: int) -> str:
    """The transport of a device that was granted flags."""
    by_need = sorted(TRANSPORT_FLAGS, key=lambda t: -TRANSPORT_FLAGS[t].bit_count())
    return next(t for t in by_need if TRANSPORT_FLAGS[t] & ~flags == 0)


def on_crash(spec: DeviceSpec, target: ControlTarget) -> str:
    """What --on-crash comes to for this target: requeue, fail or error."""
    if spec.on_crash != "auto":
        return spec.on_crash
    return "requeue" if target.idempotent else "fail"


def policy_of(flags: int) -> str:
    """The --on-crash of a device that was granted flags."""
    for policy in ("error", "requeue", "fail"):
        if flags & uapi.FLAGS[CRASH_FLAGS[policy]].value:
            return policy
    return "remove"  # a driver without recovery ends the device with its server


def _recovery_flags(spec: DeviceSpec, target: ControlTarget, features: Features) -> int:
    policy = on_crash(spec, target)
    flag = CRASH_FLAGS[policy]
    if not features.has(flag):
        # Such a driver ends the device with its server; only who asked for more must hear that he can't have it.
        if spec.on_crash == "auto":
            return 0
        raise UsageError(
            f"--on-crash {policy} needs a driver with {flag} (Linux {uapi.FLAGS[flag].since})",
            hint="`ublkd features` lists what this driver has",
        )
    # With shards a queue belongs to one worker's file.
    wanted = ("QUIESCE", "SHARDS") if spec.workers_per_queue == 1 else ("QUIESCE",)
    more = [name for name in wanted if features.has(name)]
    return uapi.F_USER_RECOVERY | sum(uapi.FLAGS[name].value for name in (flag, *more))


def choose_flags(spec: DeviceSpec, target: ControlTarget, transport: str, features: Features) -> int:
    """UBLK_F_* for ADD_DEV; target is open. What a driver that can't be asked drops is seen in its answer."""
    if spec.workers_per_queue > 1 and not features.has("PER_IO_DAEMON"):
        raise UsageError(
            "--workers-per-queue needs a driver with PER_IO_DAEMON (Linux 6.16, or ublkd's own)",
            hint="leave it out, or give more queues; `ublkd features` lists what this driver has",
        )
    flags = uapi.F_CMD_IOCTL_ENCODE | TRANSPORT_FLAGS[transport] | _recovery_flags(spec, target, features)
    if flags & uapi.F_BATCH_IO:
        # 7.2 cancels a quiesced queue's FETCH as if the device were stopped: until the next server is there new
        # requests would fail (ublk_batch_cancel_queue sets force_abort). The workers drain instead.
        flags &= ~uapi.F_QUIESCE
    if not spec.partscan:
        if not features.has("NO_AUTO_PART_SCAN"):
            raise UsageError(
                "--no-partscan needs a driver with NO_AUTO_PART_SCAN (Linux 7.0)",
                hint="leave it out; `ublkd features` lists what this driver has",
            )
        flags |= uapi.F_NO_AUTO_PART_SCAN
    return flags


def max_io_bytes(spec: DeviceSpec, transport: str) -> int:
    """The device's largest request: as set, else the kernel's usual most, and half where each tag fills a buffer."""
    return spec.max_io_size or (512 if transport == "copy" else 1024) << 10


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
