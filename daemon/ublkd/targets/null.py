# SPDX-License-Identifier: Apache-2.0
"""The null target, control side."""

from __future__ import annotations

from ublkd import native
from ublkd.targets.base import MAX_RANGE_BYTES, ControlTarget, Limits
from ublkd.targets.sizes import block_sizes, whole_blocks


class NullTarget(ControlTarget):
    """Accepts everything, stores nothing."""

    name = "null"
    transports = ("user-copy", "copy")

    def open(self, dev_id: int | None = None) -> Limits:
        spec = self.spec
        lbs, pbs = block_sizes(spec, 512, 4096)
        size = whole_blocks("--size", spec.size or 0, lbs)
        return Limits(
            size=size,
            block_size=lbs,
            physical_block_size=pbs,
            io_min=pbs,
            read_only=spec.read_only,
            discard_granularity=0 if spec.read_only else pbs,
            max_discard=0 if spec.read_only else MAX_RANGE_BYTES,
            max_write_zeroes=0 if spec.read_only else MAX_RANGE_BYTES,
        )

    def engine_target(self, qid: int) -> native.EngineTarget:
        return native.null_target(self.spec.zero)

    def resized(self, size: int | None) -> int:
        if size is None:
            return self.spec.size or 0
        return whole_blocks("the new size", size, self.spec.block_size or 512)
