# SPDX-License-Identifier: Apache-2.0
"""The class that a Python target derives from; ublkd-python(7) is its manual."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ublkd.targets.python import Spec


class Target:
    """A block device in Python. Define at least read(self, req).

    The operations a class defines (read, write, flush, discard, write_zeroes: plain or `async def`, called
    with one ublkd.Request) are those the device offers: one without write() is read-only. Or define
    handle(self, batch) and name them in `operations`. Return None for success; raise OSError(errno) to fail
    the request with that errno.

    prepare() runs once, in the supervisor, before there is a device; all else runs in the worker processes,
    each of which has a copy of the object as prepare() left it.
    """

    # Size of the device and of its logical block in bytes. The command line overrides what the class says;
    # prepare() has the last word by setting self.size, self.block_size.
    size: int = 0
    block_size: int = 512
    # May several processes serve the device? Only if what one does to `self` is of no concern to the others.
    multiprocess: bool = False
    # Does write() honour req.fua? Without it a durable write comes as a write and a flush.
    fua: bool = False
    # May a request be served twice? When a worker dies, those it held are issued again; say False, and they fail.
    idempotent: bool = True
    # For handle() alone: the operations it serves.
    operations: tuple[str, ...] = ("read", "write")

    def prepare(self, spec: Spec) -> None:
        """Once, in the supervisor: check, open, share, set the size. An exception ends the start."""

    def open(self, spec: Spec) -> None:
        """In each worker, before its first request; spec.queue says which. An exception ends the start."""

    def close(self) -> None:
        """In each worker, after its last request."""
