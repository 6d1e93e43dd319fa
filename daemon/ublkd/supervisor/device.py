# SPDX-License-Identifier: Apache-2.0
"""What the parts of a supervisor share: the device that it serves."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ublkd import inventory, log
from ublkd._version import __version__
from ublkd.control.device import path_of
from ublkd.supervisor import create, placement
from ublkd.supervisor.child import Post

if TYPE_CHECKING:
    from ublkd.config.schema import DeviceSpec
    from ublkd.control.commands import Control, DeviceInfo
    from ublkd.shm.segment import Segment
    from ublkd.supervisor.child import Worker
    from ublkd.targets.base import ControlTarget, Limits


class Device:
    """The supervisor alone sets these, while it makes the device or takes it over; the others read."""

    dev_id: int
    ctl: Control
    info: DeviceInfo
    limits: Limits
    transport: str
    segment: Segment
    cpus: list[int]
    remark: str

    def __init__(self, spec: DeviceSpec, target: ControlTarget) -> None:
        self.spec = spec
        self.target = target
        self.log = log.get()
        self.live = False
        self.recoveries = 0
        self.record: dict[str, Any] = {}

    def number(self, dev_id: int) -> None:
        """It has a number now."""
        self.dev_id = dev_id
        self.log = log.get(device=dev_id)

    def has(self, flag: int) -> bool:
        """Was the device granted this UBLK_F_*?"""
        return bool(self.info.flags & flag)

    @property
    def fragile(self) -> bool:
        """Is this a driver that must not be asked to begin a recovery before every queue was fetched since the last?

        Up to 6.15 START_USER_RECOVERY takes the task of each queue's last fetch for granted: with some queues fetched
        and others not, it oopses; with none, it says EINVAL, and the dead process that mapped the command buffers
        stays the only one that may. The drivers with a task per tag don't mind.
        """
        return not self.ctl.get_features().has("PER_IO_DAEMON")

    @property
    def posts(self) -> list[Post]:
        """What there is to serve, a worker each."""
        shares = self.spec.workers_per_queue
        return [Post(qid, share, shares) for qid in range(self.info.queues) for share in range(shares)]

    def place(self) -> None:
        """Find each worker's CPU."""
        masks = [self.ctl.queue_affinity(self.dev_id, post.qid) for post in self.posts]
        self.cpus = placement.place(masks, self.spec.cpus, placement.topology())
        self.remark = placement.remark(self.spec.queues, self.info.queues, self.cpus)
        if self.remark:
            self.log.warning("placement", remark=self.remark, cpus=self.cpus)

    def write_record(self, workers: list[Worker], origin: dict[str, Any]) -> None:
        """Leave behind what another supervisor needs to go on, and what `ublkd list` shows."""
        self.record = {
            "format": 1,
            "id": self.dev_id,
            "path": path_of(self.dev_id),
            "target": self.spec.target,
            "backing": self.target.backing(),
            "backing_id": self.target.backing_id(),
            "size": self.segment.dev_bytes(),
            "queues": self.info.queues,
            "workers_per_queue": self.spec.workers_per_queue,
            "depth": self.info.depth,
            "block_size": self.limits.block_size,
            "transport": self.transport,
            "flags": self.info.flags,
            "on_crash": create.policy_of(self.info.flags),
            "recoveries": self.recoveries,
            "read_only": self.limits.read_only,
            "remark": self.remark,
            "details": self.target.details(),
            "supervisor": {"pid": os.getpid(), "start_time": inventory.start_time(os.getpid())},
            "workers": [{**w.post.facts(), "pid": w.pid, "cpu": w.cpu} for w in workers],
            "settings": self.spec.to_dict(),
            "origin": origin,
            "version": __version__,
            "boot_id": inventory.boot_id(),
            "files": self.target.files(),
        }
        inventory.write_record(self.record)

    def write_failed(self, reason: str) -> None:
        """Have the record say that the device is given up."""
        self.record["failed"] = reason
        inventory.write_record(self.record)
