# SPDX-License-Identifier: Apache-2.0
"""A RAM disk whose requests cost CPU time in the worker, as those of one that checks or packs its data would."""

import hashlib

import ublkd

TIMES = 50


class Disk(ublkd.Target):
    """SHA-256 of all that is read or written, TIMES times."""

    multiprocess = True

    def prepare(self, spec):
        self.data = spec.shared(spec.size)

    def read(self, req):
        req.copy_from(self.data)
        self.digest(req)

    def write(self, req):
        req.copy_to(self.data)
        self.digest(req)

    def digest(self, req):
        part = memoryview(self.data)[req.offset : req.offset + req.length]
        for _ in range(TIMES):
            hashlib.sha256(part).digest()
