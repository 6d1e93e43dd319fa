# SPDX-License-Identifier: Apache-2.0
"""The Python target, control side: find the class, prepare it, make its half of the engine."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import mmap
import os
import sys
import time
import traceback
from typing import TYPE_CHECKING, Any

from ublkd import native
from ublkd._pytarget import (
    DISCARD,
    FLUSH,
    READ,
    WRITE,
    WRITE_ZEROES,
    Batch,
    Operation,
    Request,
    create,
    sleep,
)
from ublkd.errors import UblkdError, UsageError
from ublkd.target import Target
from ublkd.targets.base import MAX_RANGE_BYTES, ControlTarget, Limits
from ublkd.targets.sizes import block_sizes, whole_blocks
from ublkd.units import format_size

if TYPE_CHECKING:
    from ublkd.config.schema import DeviceSpec

__all__ = [
    "DISCARD",
    "FLUSH",
    "READ",
    "WRITE",
    "WRITE_ZEROES",
    "Batch",
    "Operation",
    "PythonTarget",
    "Request",
    "Spec",
    "script_spec",
    "sleep",
]

OPERATIONS = ("read", "write", "flush", "discard", "write_zeroes")
SHM_DIR = "/dev/shm"
# How soon, in seconds, a failure is logged again, with a count; and how many different ones are told apart.
REPEAT_S = 60.0
MAX_FAILURES = 64

# Set while a target's file is imported: a script that calls serve() there would serve itself without end.
_importing = ""


class Spec:
    """What a target is told of its device.

    size and block_size (bytes; size is 0 if nobody gave one), queues, depth, params (the --param texts),
    read_only, recovering (this device existed before: shared() has its data), queue (its number, in open();
    -1 in prepare()).
    """

    __slots__ = (
        "_shared",
        "block_size",
        "depth",
        "params",
        "queue",
        "queues",
        "read_only",
        "recovering",
        "size",
    )

    def __init__(
        self,
        *,
        size: int = 0,
        block_size: int = 512,
        queues: int = 1,
        depth: int = 128,
        params: dict[str, str] | None = None,
        read_only: bool = False,
        recovering: bool = False,
        shared: SharedFiles | None = None,
    ) -> None:
        self.size, self.block_size, self.queues, self.depth = size, block_size, queues, depth
        self.params = params or {}
        self.read_only, self.recovering = read_only, recovering
        self.queue = -1
        self._shared = shared

    def shared(self, size: int) -> mmap.mmap:
        """size bytes, zeroes at first, that all workers see and that outlive any of them. In prepare() only.

        The n-th call of a recovered device's prepare() gives the data of the n-th call before.
        """
        if self._shared is None or self.queue >= 0:
            raise RuntimeError(
                "spec.shared() works in prepare() alone: a worker's own memory is shared with nobody"
            )
        if size <= 0:
            raise UsageError(
                f"spec.shared({size}): nothing to share", "does the device have a size? give --size"
            )
        return self._shared.add(size)


class SharedFiles:
    """The files behind spec.shared(): named after the device, so that they outlive a crash of the server."""

    def __init__(self, dev_id: int | None) -> None:
        self._dev_id = dev_id
        self._maps: list[mmap.mmap] = []
        self.paths: list[str] = []

    def add(self, size: int) -> mmap.mmap:
        path = self._path(self._dev_id, len(self.paths))
        new = self._dev_id is None
        try:
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if new else 0)
            fd = os.open(path, flags, 0o600)
            try:
                self.paths.append(path)
                if new:
                    os.ftruncate(fd, size)
                elif os.fstat(fd).st_size != size:
                    raise UblkdError(f"{path} is not of the {size} bytes that prepare() asks for")
                self._maps.append(mmap.mmap(fd, size))
            finally:
                os.close(fd)
        except OSError as e:
            raise UblkdError(f"cannot share {format_size(size)} of memory in {path}: {e.strerror}") from None
        return self._maps[-1]

    def rename(self, dev_id: int) -> None:
        for index, path in enumerate(self.paths):
            self.paths[index] = self._path(dev_id, index)
            os.rename(path, self.paths[index])

    def close(self, *, discard: bool) -> None:
        for mapping in self._maps:
            try:
                mapping.close()
            except BufferError:
                pass  # the target still holds a view; both go with the process
        self._maps.clear()
        for path in self.paths if discard else ():
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass

    @staticmethod
    def _path(dev_id: int | None, index: int) -> str:
        # The number isn't known before the device is there; our pid tells apart what a crash left behind.
        owner = f"new-{os.getpid()}" if dev_id is None else str(dev_id)
        return f"{SHM_DIR}/ublkd-{owner}-shared-{index}"


class PythonTarget(ControlTarget):
    """A device served by a subclass of ublkd.Target."""

    name = "python"
    transports = ("user-copy", "copy")

    def __init__(self, spec: DeviceSpec, target: Target | type[Target] | None = None) -> None:
        """target: serve this class or object; without it spec.file is imported."""
        super().__init__(spec)
        self._given = target
        self._dev_id: int | None = None
        self._shared: SharedFiles | None = None

    def preflight(self) -> None:
        self._make()

    def _make(self) -> Target:
        """Import the class and make its object."""
        spec = self.spec
        label = self._label = spec.file or ""
        found = self._given
        if found is None:
            # In the record the path must be good from any directory.
            label = self._label = spec.file = absolute(label)
            found = load(label)
        try:
            target = found() if isinstance(found, type) else found
        except Exception as e:
            raise _failed(label, "__init__()", e) from e
        _check(label, target)
        self.idempotent = bool(target.idempotent)
        return target

    def open(self, dev_id: int | None = None) -> Limits:
        spec = self.spec
        self._dev_id = dev_id
        target = self._target = self._make()
        label = self._label
        processes = spec.queues * spec.workers_per_queue
        if processes > 1 and not target.multiprocess:
            raise UsageError(
                f"{label} is served by one process, not {processes}: each worker is a process of its own, "
                "and processes don't share Python objects",
                "use one queue with one worker, or keep the data in spec.shared() and say `multiprocess = True` in the "
                "class",
            )
        target.size = spec.size or target.size
        target.block_size = spec.block_size or target.block_size
        self._shared = SharedFiles(dev_id)
        self._told = Spec(
            size=target.size,
            block_size=target.block_size,
            queues=spec.queues,
            depth=spec.depth,
            params=dict(spec.params),
            read_only=spec.read_only or "write" not in _operations(target),
            recovering=dev_id is not None,
            shared=self._shared,
        )
        try:
            self._call("prepare")
            return self._limits()
        except BaseException:
            self.close(discard=dev_id is None)
            raise

    def _call(self, method: str) -> None:
        """The target's prepare() or open(); what it raises becomes something a user can read."""
        try:
            getattr(self._target, method)(self._told)
        except Exception as e:
            raise _failed(self._label, f"{method}()", e) from e

    def _limits(self) -> Limits:
        target = self._target
        for attribute in ("size", "block_size"):
            if not isinstance(getattr(target, attribute), int):
                raise UsageError(
                    f"{self._label}: {attribute} is {getattr(target, attribute)!r}, not a number of bytes"
                )
        lbs, pbs = block_sizes(self.spec, target.block_size, 4096)
        if target.block_size != lbs or lbs & (lbs - 1) or not 512 <= lbs <= 4096:
            raise UsageError(
                f"{self._label}: the block size is {target.block_size}; give 512, 1024, 2048 or 4096"
            )
        if not target.size:
            raise UsageError(
                f"{self._label} has no size", "give --size, or set `size` in the class or in prepare()"
            )
        self._told.size, self._told.block_size = target.size, lbs
        can = self.capabilities()
        return Limits(
            size=whole_blocks(f"the size of {self._label}", target.size, lbs),
            block_size=lbs,
            physical_block_size=pbs,
            io_min=pbs,
            read_only=self._told.read_only,
            volatile_cache="flush" in can,
            fua="fua" in can,
            discard_granularity=lbs if "discard" in can else 0,
            max_discard=MAX_RANGE_BYTES if "discard" in can else 0,
            max_write_zeroes=MAX_RANGE_BYTES if "write_zeroes" in can else 0,
        )

    def capabilities(self) -> set[str]:
        """What the device offers: names out of OPERATIONS, and "fua"."""
        can = _operations(self._target)
        if self._told.read_only:
            can &= {"read"}
        if self._target.fua and {"write", "flush"} <= can:
            can.add("fua")
        return can

    def added(self, dev_id: int) -> None:
        self._dev_id = dev_id
        if self._shared is not None:
            self._shared.rename(dev_id)

    def engine_target(self, qid: int) -> native.EngineTarget:
        from ublkd import log

        self._told.queue = qid
        self._call("open")
        logger = log.get(device=self._dev_id, queue=qid)
        address = create(
            self._target,
            on_error=ErrorLog(logger),
            operations=self.capabilities(),
            block_size=self._told.block_size,
        )
        return _Served(address, self._target, logger)

    def backing(self) -> str:
        return self.spec.file or ""

    def files(self) -> list[str]:
        return list(self._shared.paths) if self._shared is not None else []

    def details(self) -> dict[str, object]:
        return {
            "class": f"{type(self._target).__module__}.{type(self._target).__qualname__}",
            "operations": sorted(self.capabilities()),
            "batch": hasattr(self._target, "handle"),
            "multiprocess": bool(self._target.multiprocess),
        }

    def close(self, *, discard: bool) -> None:
        if self._shared is not None:
            self._shared.close(discard=discard)
            self._shared = None


class _Served(native.EngineTarget):
    """The engine's half, and the target's own close() after it."""

    def __init__(self, address: int, target: Target, logger: Any) -> None:
        super().__init__(native.foreign_target(address).ptr)
        self._target, self._logger = target, logger

    def close(self) -> None:
        if self.ptr:
            super().close()
            try:
                self._target.close()
            except Exception as e:
                self._logger.error("close() of the Python target failed", exc_info=e)


class ErrorLog:
    """Logs what handlers raise: each exception type from each place once with its traceback, then counts."""

    def __init__(self, logger: Any) -> None:
        self._logger = logger
        self._seen: dict[tuple[object, ...], list[float]] = {}

    def __call__(self, method: str, exc: BaseException) -> None:
        tb = exc.__traceback__
        while tb is not None and tb.tb_next is not None:
            tb = tb.tb_next
        key = (method, type(exc), tb and (tb.tb_frame.f_code.co_filename, tb.tb_lineno))
        now = time.monotonic()
        seen = self._seen.get(key)
        if seen is None:
            if len(self._seen) >= MAX_FAILURES:
                return
            self._seen[key] = [now, 0]
            self._logger.error("Python target failed a request", method=method, exc_info=exc)
            return
        seen[1] += 1
        if now - seen[0] >= REPEAT_S:
            self._logger.error(
                "Python target keeps failing requests", method=method, error=repr(exc), again=int(seen[1])
            )
            seen[:] = [now, 0]


def absolute(reference: str) -> str:
    """FILE:CLASS with FILE made absolute; MODULE:CLASS as it is."""
    place, _, name = reference.rpartition(":")
    return f"{os.path.abspath(place)}:{name}" if _is_file(place) else reference


def load(reference: str) -> type[Target]:
    """The class that FILE:CLASS or package.module:CLASS names; UsageError says what is wrong with it."""
    global _importing
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise UsageError(f"{reference!r} does not name a class", "give FILE:CLASS, as in my_disk.py:RamDisk")
    if _is_file(place) and not os.path.isfile(place):
        raise UsageError(f"there is no Python file {place}")
    _importing = place
    try:
        module = _import_file(place) if _is_file(place) else importlib.import_module(place)
    except UblkdError:
        raise
    except (Exception, SystemExit) as e:
        raise UsageError(f"{place} can't be imported: {_one_line(e, place)}") from e
    finally:
        _importing = ""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        classes = [
            n
            for n, v in vars(module).items()
            if isinstance(v, type) and issubclass(v, Target) and v is not Target
        ]
        raise UsageError(
            f"{place} has no class {name}",
            f"it has {', '.join(classes)}" if classes else "it has no ublkd.Target",
        )
    if not isinstance(found, type) or not issubclass(found, Target):
        raise UsageError(f"{reference} is no subclass of ublkd.Target", f"class {name}(ublkd.Target): ...")
    return found


def script_spec(target: Target | type[Target], settings: dict[str, Any]) -> DeviceSpec:
    """The device that a script asks for by serve(); its record names the script, for recovery."""
    from ublkd.config.schema import DeviceSpec

    if _importing:
        raise UsageError(
            f"{_importing} calls ublkd.serve() when it is imported",
            'put it under `if __name__ == "__main__":`',
        )
    cls = target if isinstance(target, type) else type(target)
    if not issubclass(cls, Target):
        raise UsageError(f"{cls.__qualname__} is no subclass of ublkd.Target")
    module = sys.modules[cls.__module__]
    place = cls.__module__ if cls.__module__ != "__main__" else os.path.abspath(module.__file__ or "__main__")
    return DeviceSpec(**{**settings, "target": "python", "file": f"{place}:{cls.__qualname__}"})


def _is_file(place: str) -> bool:
    return place.endswith(".py") or os.sep in place


def _import_file(path: str) -> Any:
    path = os.path.abspath(path)
    name = "ublkd_target_" + os.path.basename(path).removesuffix(".py")
    loader_spec = importlib.util.spec_from_file_location(name, path)
    if loader_spec is None or loader_spec.loader is None:
        raise UsageError(f"{path} is no Python file", "its name must end in .py")
    module = importlib.util.module_from_spec(loader_spec)
    # Its neighbours can be imported; at the end, so that none of them hides a module of Python's own.
    if os.path.dirname(path) not in sys.path:
        sys.path.append(os.path.dirname(path))
    sys.modules[name] = module
    kept = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # as for any script: leave no __pycache__ beside it
    try:
        loader_spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = kept
    return module


def _operations(target: Target) -> set[str]:
    if hasattr(target, "handle"):
        return set(target.operations)
    return {op for op in OPERATIONS if callable(getattr(target, op, None))}


def _check(label: str, target: Target) -> None:
    handle = getattr(target, "handle", None)
    if handle is not None:
        if not callable(handle) or inspect.iscoroutinefunction(handle):
            raise UsageError(
                f"{label}: handle() must be a plain method", "make read() and write() `async def` instead"
            )
        unknown = _operations(target).difference(OPERATIONS)
        if unknown:
            raise UsageError(
                f"{label}: unknown operation {min(unknown)!r}", f"known are {', '.join(OPERATIONS)}"
            )
    if "read" not in _operations(target):
        raise UsageError(
            f"{label} has no read() method, which every target needs", "def read(self, req): ..."
        )


def _failed(label: str, method: str, exc: Exception) -> UblkdError:
    """What a user reads when a method of the target raised."""
    if isinstance(exc, UblkdError):
        return exc
    return UblkdError(f"{label}: {method} raised {_one_line(exc, label.rpartition(':')[0])}")


def _one_line(exc: BaseException, path: str) -> str:
    """Exception and place, in one line; the place in path that led to it if there is one."""
    frames = traceback.extract_tb(exc.__traceback__)
    own = [frame for frame in frames if os.path.abspath(frame.filename) == os.path.abspath(path)]
    place = ""
    if isinstance(exc, SyntaxError) and exc.filename:
        place = f"{exc.filename}:{exc.lineno}"
        exc = SyntaxError(exc.msg)
    elif own or frames:
        frame = (own or frames)[-1]
        place = f"{frame.filename}:{frame.lineno}"
    text = " ".join(str(exc).split())
    return f"{type(exc).__name__}{': ' if text else ''}{text}{f' ({place})' if place else ''}"
