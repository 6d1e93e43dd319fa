# SPDX-License-Identifier: Apache-2.0
"""Two files or disks that hold the same: ublkd run python mirror.py:Mirror --param a=FILE --param b=FILE

Writes go to both, reads to the first that gives the data. A queue keeps its whole depth in flight.
"""

import os

import ublkd


class Mirror(ublkd.Target):
    multiprocess = True  # all state is in the files
    fua = True  # pwrite_async() is durable where a request asks for it

    def prepare(self, spec):
        self.files = [os.open(spec.params[name], os.O_RDWR) for name in ("a", "b")]
        self.size = min(os.lseek(fd, 0, os.SEEK_END) for fd in self.files) // 4096 * 4096

    async def read(self, req):
        try:
            await req.pread_async(self.files[0])
        except OSError:
            await req.pread_async(self.files[1])

    async def write(self, req):
        for fd in self.files:
            await req.pwrite_async(fd)

    async def flush(self, req):
        for fd in self.files:
            await req.fsync_async(fd)
