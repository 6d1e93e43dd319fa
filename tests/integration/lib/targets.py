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


class Ways(Disk):
    """Every MiB keeps its data in another way: straight, in the buffer, in files, and with detours."""

    looks = True  # at what it gave

    def prepare(self, spec):
        super().prepare(spec)
        self.file = os.open(spec.params["file"], os.O_RDWR)

    async def read(self, req):
        way = req.offset >> 20 & 7
        if way == 0:
            req.copy_from(self.data)
        elif way == 1:
            req.buffer[:] = memoryview(self.data)[req.offset : req.offset + req.length]
        elif way == 2:
            req.pread(self.file)
        elif way == 3:
            await req.pread_async(self.file)
        elif way == 4:
            req.zero()
            req.copy_from(self.data)
            if self.looks:
                bytes(req.buffer)
        elif way == 5:  # it is kept inverted
            if self.looks:
                req.copy_from(self.data)
                req.buffer[:] = bytes(req.buffer).translate(INVERTED)
            else:
                kept = self.data[req.offset : req.offset + req.length]
                req.copy_from(kept.translate(INVERTED), 0)
        elif way == 6:
            part = req.length // 1024 * 512 or req.length
            req.copy_from(self.data)
            return part
        else:
            req.pread(self.file)
            req.copy_to(self.data)
            await ublkd.sleep(0)
            req.copy_from(self.data)

    async def write(self, req):
        way = req.offset >> 20 & 7
        if way == 0:
            req.copy_to(self.data)
            req.copy_to(self.data)
        elif way == 1:
            self.data[req.offset : req.offset + req.length] = req.buffer
        elif way == 2:
            req.pwrite(self.file)
        elif way == 3:
            await req.pwrite_async(self.file)
        elif way == 5:
            req.buffer[:] = bytes(req.buffer).translate(INVERTED)
            req.copy_to(self.data)
        elif way == 6:
            await ublkd.sleep(0)
            req.copy_to(self.data)
            return req.length // 1024 * 512 or req.length
        else:
            req.copy_to(self.data)
            await req.pwrite_async(self.file)

    discard = write_zeroes = None  # neither reaches the file


class StraightWays(Ways):
    """Reads that are given straight after a while."""

    looks = False


INVERTED = bytes(255 - n for n in range(256))


class Careless(ublkd.Target):
    """Answers reads without all of their data, or with none of it: by its offset."""

    size = 16 << 20

    def read(self, req):
        way = req.offset >> 12 & 3
        if way == 1:
            req.buffer[:512] = bytes(512)
        elif way == 2:
            with req.buffer as view, view[:512] as head:
                head[:] = bytes(512)
            return 512
        elif way == 3:
            try:
                req.pread(-1)
            except (OSError, ValueError):
                pass
