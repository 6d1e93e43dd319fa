# SPDX-License-Identifier: Apache-2.0
"""A RAM disk: ublkd run python ram_disk.py:RamDisk --size 1G -q 4"""

import ublkd


class RamDisk(ublkd.Target):
    multiprocess = True  # the data is shared memory: any number of queues may serve it

    def prepare(self, spec):
        self.data = spec.shared(spec.size)

    def read(self, req):
        req.copy_from(self.data)

    def write(self, req):
        req.copy_to(self.data)

    write_zeroes = write  # copy_to() stores zeroes then


if __name__ == "__main__":
    raise SystemExit(ublkd.serve(RamDisk, size="1G"))
