# SPDX-License-Identifier: Apache-2.0
"""The compiled half of the Python target (engine/target_python.c). Import ublkd, not this."""

from collections.abc import Awaitable, Callable, Container, Generator, Iterator
from typing import Protocol, SupportsIndex, final

from typing_extensions import Buffer

READ: int
WRITE: int
FLUSH: int
DISCARD: int
WRITE_ZEROES: int

class _HasFileno(Protocol):
    def fileno(self) -> int: ...

_File = int | _HasFileno

@final
class Operation(Awaitable[None]):
    """I/O or a pause that an `async def` handler awaits, once; raises OSError if it fails."""

    def __await__(self) -> Generator[Operation]: ...

@final
class Request:
    """One request for the device. Once it is answered its methods raise ValueError; its numbers stay."""

    @property
    def op(self) -> int:
        """READ, WRITE, FLUSH, DISCARD or WRITE_ZEROES."""
    @property
    def offset(self) -> int:
        """Bytes from the start of the device."""
    @property
    def length(self) -> int:
        """Bytes; 0 for a flush."""
    @property
    def tag(self) -> int:
        """Number of the request among those of its queue that are in flight, below the depth."""
    @property
    def queue(self) -> int:
        """Number of the hardware queue."""
    @property
    def flags(self) -> int:
        """The driver's flag bits as they came."""
    @property
    def fua(self) -> bool:
        """A write must be durable before it is answered. Only comes if the class says `fua = True`."""
    @property
    def nounmap(self) -> bool:
        """A write of zeroes must leave the blocks allocated."""
    @property
    def result(self) -> int:
        """What will be answered if the handler returns None: bytes done, or a negative errno after fail()."""
    @property
    def buffer(self) -> memoryview:
        """The request's data, writable: what a write brings, what a read is to deliver. Else empty.

        The view is released when the request is answered: copy what you keep. Parts of it that live on (a
        slice, an array) fail the request with EIO.
        """
    def copy_from(self, source: Buffer, off: int | None = None) -> None:
        """Deliver source[off:off+length]; off defaults to the request's offset. Reads only.

        ValueError if that is not all inside source, OSError if its memory can't be had. Leave source as it is
        until the request is answered if you go on to look at its data.
        """
    def copy_to(self, destination: Buffer, off: int | None = None) -> None:
        """Store the data at destination[off:off+length]; zeroes for a discard or a write of zeroes.

        ValueError if that is not all inside destination, OSError if its memory can't be had.
        """
    def zero(self) -> None:
        """Deliver zeroes. Reads only."""
    def pread(self, file: _File, off: int | None = None) -> None:
        """Deliver the file's bytes at off (default: the request's offset); zeroes beyond its end. Reads only.

        All of it or OSError. Blocks the queue; other Python threads run meanwhile.
        """
    def pwrite(self, file: _File, off: int | None = None) -> None:
        """Store the data in the file at off (default: the request's offset), durably if `fua` is set.

        All of it or OSError. Blocks the queue; other Python threads run meanwhile.
        """
    def pread_async(self, file: _File, off: int | None = None) -> Operation:
        """As pread(), to be awaited: the queue serves other requests meanwhile."""
    def pwrite_async(self, file: _File, off: int | None = None) -> Operation:
        """As pwrite(), to be awaited: the queue serves other requests meanwhile."""
    def fsync_async(self, file: _File) -> Operation:
        """fdatasync(2) on the file, to be awaited."""
    def fail(self, error: int | OSError) -> None:
        """Answer with this errno, whatever the handler returns: lets one request of a batch fail alone."""

@final
class Batch:
    """The requests of one pass, for handle(): a sequence, valid until it returns."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: SupportsIndex, /) -> Request: ...
    def __iter__(self) -> Iterator[Request]: ...
    def copy_from(self, source: Buffer, /) -> None:
        """Request.copy_from(source) for every read that has not failed."""
    def copy_to(self, destination: Buffer, /) -> None:
        """Request.copy_to(destination) for every write, discard and write of zeroes that has not failed."""

def sleep(seconds: float, /) -> Operation:
    """A pause, to be awaited in a handler: the queue serves other requests meanwhile."""

def create(
    target: object,
    *,
    on_error: Callable[[str, BaseException], object],
    operations: Container[str],
    block_size: int = 512,
) -> int:
    """Address of a new struct ublkd_target that serves with target's methods; for the engine.

    operations names the methods to use (read, write, flush, discard, write_zeroes); if target has handle(),
    that one gets them all. on_error(method, exception) is told of everything but an OSError with an errno.
    """

def destroy(address: int, /) -> None:
    """Free a target that the engine was never given; else the engine does."""
