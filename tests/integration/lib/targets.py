# SPDX-License-Identifier: Apache-2.0
"""Python targets that the tests serve, good and bad."""

import errno
import os
import signal
import sys
import time
from pathlib import Path

import ublkd

sys.path.append(str(Path(__file__).resolve().parents[3] / "configs" / "examples"))

from ram_disk import RamDisk


class Disk(RamDisk):
    """The example, with every operation there is."""

    fua = True

    def flush(self, req):
        pass

    discard = RamDisk.write


class Batches(Disk):
    """The same, in batches."""

    operations = ("read", "write", "flush", "discard", "write_zeroes")

    def handle(self, batch):
        batch.copy_from(self.data)
        batch.copy_to(self.data)


class Sparse(ublkd.Target):
    """Zeroes, but for a bad sector at 64 KiB; its own size."""

    size = 1 << 20

    def read(self, req):
        if req.offset <= 65536 < req.offset + req.length:
            raise OSError(errno.ENODATA, "bad sector")
        req.zero()


class Held(Disk):
    """A read at 1 MiB is answered once the file of the parameter `gate` is there."""

    def prepare(self, spec):
        super().prepare(spec)
        self.gate = spec.params["gate"]

    async def read(self, req):
        while req.offset == 1 << 20 and not os.path.exists(self.gate):
            await ublkd.sleep(0.05)
        req.copy_from(self.data)


class Stuck(Held):
    """The same, but nothing else is done meanwhile."""

    def read(self, req):
        while req.offset == 1 << 20 and not os.path.exists(self.gate):
            pass
        req.copy_from(self.data)


class Frail(Disk):
    """Queue 1 does not come up while the file `kill` is there; while `wait` is, it takes its time."""

    def prepare(self, spec):
        super().prepare(spec)
        self.place = spec.params["place"]

    def open(self, spec):
        while spec.queue == 1 and os.path.exists(f"{self.place}/wait"):
            time.sleep(0.05)
        if spec.queue == 1 and os.path.exists(f"{self.place}/kill"):
            os.unlink(f"{self.place}/kill")
            os.kill(os.getpid(), signal.SIGKILL)


class SingleProcess(Disk):
    """Not for several queues."""

    multiprocess = False


class NoRead(ublkd.Target):
    """Lacks what every target needs."""

    size = 1 << 20


class RaisesInPrepare(Disk):
    """Fails before there is a device."""

    def prepare(self, spec):
        raise ValueError("no such shelf")


class RaisesInOpen(Disk):
    """Fails in a worker."""

    def open(self, spec):
        raise OSError(errno.EACCES, "the vault is closed")


class DiesInOpen(Disk):
    """Takes its worker along."""

    def open(self, spec):
        if spec.queue == spec.queues - 1:
            os.kill(os.getpid(), 9)
