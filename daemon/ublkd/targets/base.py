# SPDX-License-Identifier: Apache-2.0
"""What every target has on the control side."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ublkd.config.schema import DeviceSpec
    from ublkd.native import EngineTarget

# The driver counts in 32-bit sectors, the engine in 32-bit bytes; whole requests stay well below both.
MAX_RANGE_BYTES = 1 << 30


class Limits(NamedTuple):
    """What the kernel is told of the disk. Sizes in bytes; 0 where an operation isn't offered."""

    size: int
    block_size: int = 512
    physical_block_size: int = 4096
    io_min: int = 4096
    io_opt: int = 0
    read_only: bool = False
    rotational: bool = False
    volatile_cache: bool = False
    fua: bool = False
    discard_granularity: int = 0
    max_discard: int = 0
    max_write_zeroes: int = 0
    dma_align: int = 0


class ControlTarget:
    """A target as the supervisor sees it; one object per device, made before any device exists.

    Order of calls: preflight() if the device is to be taken over from its server; open() in the supervisor,
    where the user still sees errors; added() once the device has its number; engine_target() in each worker, after
    the fork; close() in the supervisor. Errors are UblkdError.
    """

    name = ""
    # How its data may cross, the best first (config's names).
    transports: tuple[str, ...] = ("copy", "user-copy")

    # May a request that a dead server may have served already be served again?
    idempotent = True

    def __init__(self, spec: DeviceSpec) -> None:
        self.spec = spec

    @classmethod
    def check(cls, spec: DeviceSpec) -> None:
        """Refuse what is wrong with spec by itself, without touching what is behind the device."""

    def preflight(self) -> None:
        """Check what can be checked while another process serves this very device; UblkdError as from open()."""

    def open(self, dev_id: int | None = None) -> Limits:
        """Check and open what is behind the device. dev_id: take over the data of that quiesced device."""
        raise NotImplementedError

    def added(self, dev_id: int) -> None:
        """The device got its number."""

    def engine_target(self, qid: int) -> EngineTarget:
        """The engine's half, made in the worker of queue qid."""
        raise NotImplementedError

    def backing(self) -> str:
        """What is behind the device, for people; empty if nothing."""
        return ""

    def backing_id(self) -> str | None:
        """Identity of the backing file, "device:inode", or None."""
        return None

    def files(self) -> list[str]:
        """Files that hold the device's data on our account: removed with the device, never before."""
        return []

    def details(self) -> dict[str, object]:
        """Facts for `ublkd show`."""
        return {}

    def resized(self, size: int | None) -> int:
        """The new size in bytes for a resize to size (None: whatever is behind the device has now).

        Called without open(), by the process that resizes.
        """
        from ublkd.errors import UblkdError

        raise UblkdError(f"a {self.name} device can't be resized while it runs")

    def close(self, *, discard: bool) -> None:
        """Let go of everything; discard: the device is gone for good, and its own files with it."""
