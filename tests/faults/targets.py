# SPDX-License-Identifier: Apache-2.0
"""Python targets for the proofs: one that is right, and some that break their word, to see that it is noticed."""

import os
import sys
from pathlib import Path

import ublkd

sys.path.append(str(Path(__file__).resolve().parents[1] / "integration"))

from lib.targets import Disk


class Forgetful(Disk):
    """Acknowledges every 50th write and does not carry it out."""

    count = 0

    def write(self, req):
        self.count += 1
        if self.count % 50:
            req.copy_to(self.data)

    discard = write_zeroes = Disk.write


class Hasty(ublkd.Target):
    """A file behind the disk; flush and FUA are acknowledged and nothing is done about them."""

    fua = True

    def prepare(self, spec):
        self.fd = os.open(spec.params["file"], os.O_RDWR)
        self.size = min(os.lseek(self.fd, 0, os.SEEK_END), 32 << 20)

    def read(self, req):
        req.buffer[:] = os.pread(self.fd, req.length, req.offset)

    def write(self, req):
        os.pwrite(self.fd, req.buffer, req.offset)

    def flush(self, req):
        pass
