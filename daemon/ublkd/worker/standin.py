# SPDX-License-Identifier: Apache-2.0
"""A process that fetches in the place of workers that will not, and ends.

Drivers before 6.16 can't begin a recovery unless every queue has been fetched since the last one began. Whoever was
to do that may have been killed. Fetching takes no mapping of the command buffer, of which such a driver allows only
the process that came first; and it brings no requests before the recovery has ended.
"""

from __future__ import annotations

import os

from ublkd import native


def fetch_what_is_left(cdev_fd: int, queues: int, depth: int, transport: int) -> int:
    """Have every queue fetched that is not yet, by a child that has ended when this returns: its exit status.

    cdev_fd is the open char device, which the child has too: close it after that.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for qid in range(queues):
                queue = native.Queue(
                    cdev_fd=cdev_fd,
                    qid=qid,
                    depth=depth,
                    max_io_bytes=os.sysconf("SC_PAGESIZE"),  # nothing is ever moved
                    transport=transport,
                    dev_bytes=0,
                    cmdbuf=native.NoCommands(depth),
                    shm=None,
                    target=native.null_target(zero_reads=False),
                )
                queue.fetch()  # which the driver refuses, and nobody asks, where that has been done
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
