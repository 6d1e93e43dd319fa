# SPDX-License-Identifier: Apache-2.0
"""The control side of the Python target, and the public names of the package."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import types

import pytest

import ublkd
from ublkd.config.schema import DeviceSpec
from ublkd.errors import UblkdError, UsageError
from ublkd.targets import python as control

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "configs" / "examples"
MIB = 1 << 20


class Disk(ublkd.Target):
    def read(self, req):
        pass


class SharedDisk(Disk):
    multiprocess = True

    def prepare(self, spec):
        self.spec = spec
        self.data = spec.shared(spec.size)

    def write(self, req):
        pass


@pytest.fixture(autouse=True)
def shm(tmp_path, monkeypatch):
    """A private place for the files of shared()."""
    directory = tmp_path / "shm"
    directory.mkdir()
    monkeypatch.setattr(control, "SHM_DIR", str(directory))
    return directory


@pytest.fixture
def script(tmp_path):
    def write(text, name="disk.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def opened(target, dev_id=None, **settings):
    """The control target and the limits of a class or object."""
    made = control.PythonTarget(DeviceSpec(target="python", file="disk.py:Disk", **settings), target)
    return made, made.open(dev_id)


def refusal(target, **settings):
    """Message and hint with which a class is refused."""
    with pytest.raises(UblkdError) as e:
        opened(target, **settings)
    assert "\n" not in e.value.message
    return f"{e.value.message} ({e.value.hint})"


def load_refusal(reference):
    with pytest.raises(UsageError) as e:
        control.load(str(reference))
    assert "\n" not in e.value.message
    return f"{e.value.message} ({e.value.hint})"


# ---- finding the class ----


def test_file_and_class(script):
    path = script(
        "import ublkd, neighbour\nclass D(ublkd.Target):\n  class Inner(ublkd.Target):\n    x = neighbour.x\n"
    )
    script("x = 7\n", "neighbour.py")
    assert control.load(f"{path}:D").__name__ == "D"
    assert control.load(f"{path}:D.Inner").x == 7
    assert not (path.parent / "__pycache__").exists()
    sys.path.remove(str(path.parent))


def test_module_and_class(monkeypatch, script):
    path = script("import ublkd\nclass D(ublkd.Target): pass\n", "some_disk_module.py")
    monkeypatch.syspath_prepend(str(path.parent))
    assert control.load("some_disk_module:D").__module__ == "some_disk_module"


def test_the_path_becomes_absolute(monkeypatch, script):
    path = script("import ublkd\nclass D(ublkd.Target):\n  size = 512\n  def read(self, req): pass\n")
    monkeypatch.chdir(path.parent)
    spec = DeviceSpec(target="python", file="disk.py:D")
    control.PythonTarget(spec).open()
    assert spec.file == f"{path}:D"
    assert control.absolute("package.module:D") == "package.module:D"


def test_what_cannot_be_loaded(script, tmp_path):
    path = script("import ublkd\nclass D(ublkd.Target): pass\nclass E: pass\nx = 3\n")
    assert load_refusal(tmp_path / "no.py:D") == f"there is no Python file {tmp_path}/no.py ()"
    assert "ModuleNotFoundError: No module named 'no_such_module'" in load_refusal("no_such_module:D")
    assert load_refusal(f"{path}:F") == f"{path} has no class F (it has D)"
    for name in ("E", "x"):
        assert f"{path}:{name} is no subclass of ublkd.Target" in load_refusal(f"{path}:{name}")
    assert "does not name a class" in load_refusal("disk.py")
    assert "there is no Python file" in load_refusal(f"{tmp_path}:D")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module' ({path}:1)"),
        ("\n\nraise ValueError('a\\nb')\n", "ValueError: a b ({path}:3)"),
        ("x = 1\ndef f(:\n", "SyntaxError: invalid syntax ({path}:2)"),
        ("raise SystemExit(3)\n", "SystemExit: 3 ({path}:1)"),
        ("import ublkd\n\nublkd.serve(None)\n", "calls ublkd.serve() when it is imported"),
    ],
)
def test_a_file_that_cannot_be_imported(script, text, said):
    path = script(text)
    assert said.format(path=path) in load_refusal(f"{path}:D")


# ---- what is refused ----


def test_a_target_needs_read():
    class NoRead(ublkd.Target):
        def write(self, req):
            pass

    assert "disk.py:Disk has no read() method, which every target needs" in refusal(NoRead, size=MIB)


def test_several_queues_need_multiprocess():
    text = refusal(Disk, size=MIB, queues=4)
    assert "disk.py:Disk is served by one process, not 4" in text and "multiprocess = True" in text
    assert opened(SharedDisk, size=MIB, queues=4)


def test_exceptions_of_the_target_become_one_line():
    class Broken(Disk):
        def prepare(self, spec):
            raise ValueError("no\nluck")

    line = Broken.prepare.__code__.co_firstlineno + 1
    assert (
        refusal(Broken, size=MIB)
        == f"disk.py:Disk: prepare() raised ValueError: no luck ({__file__}:{line}) ()"
    )

    class Picky(Disk):
        def __init__(self, path):
            pass

    assert "__init__() raised TypeError" in refusal(Picky, size=MIB)

    class Own(Disk):
        def prepare(self, spec):
            raise ublkd.UblkdError("the remote end is away", "try later")

    assert refusal(Own, size=MIB) == "the remote end is away (try later)"


def test_an_exception_in_open_names_the_method():
    class Broken(Disk):
        def open(self, spec):
            assert spec.queue == 2
            raise OSError(5, "no such luck")

    made, _ = opened(Broken, size=MIB)
    with pytest.raises(
        UblkdError, match=r"disk.py:Disk: open\(\) raised OSError: \[Errno 5\] no such luck \(.*:\d+\)"
    ):
        made.engine_target(2)


@pytest.mark.parametrize(
    ("attributes", "said"),
    [
        ({}, "disk.py:Disk has no size (give --size"),
        ({"size": 1000}, "no multiple of the block size 512"),
        ({"size": "1G"}, "size is '1G', not a number of bytes"),
        ({"size": -512}, "-512"),
        ({"size": MIB, "block_size": 100}, "the block size is 100"),
        ({"size": MIB, "block_size": 8192}, "the block size is 8192"),
        (
            {"size": MIB, "handle": lambda self, b: None, "operations": ("read", "trim")},
            "unknown operation 'trim'",
        ),
        ({"size": MIB, "handle": lambda self, b: None, "operations": ("write",)}, "has no read() method"),
        ({"size": MIB, "handle": 3}, "handle() must be a plain method"),
    ],
)
def test_attributes_that_make_no_sense(attributes, said):
    assert said in refusal(type("D", (Disk,), attributes))


def test_handle_cannot_be_a_coroutine():
    class Async(Disk):
        async def handle(self, batch):
            pass

    assert "handle() must be a plain method" in refusal(Async, size=MIB)


# ---- size, limits, capabilities ----


def test_where_the_size_comes_from():
    class Sized(Disk):
        size = 2 * MIB
        block_size = 4096

    class Own(Sized):
        def prepare(self, spec):
            assert (spec.size, spec.block_size) == (2 * MIB, 4096)
            self.size, self.block_size = 3 * MIB, 1024

    assert opened(Sized)[1][:2] == (2 * MIB, 4096)
    assert opened(Sized, size=MIB, block_size=512)[1][:2] == (MIB, 512)
    assert opened(Own)[1][:2] == (3 * MIB, 1024)


def test_what_prepare_is_told():
    made, _ = opened(SharedDisk, size=MIB, queues=2, depth=64, params={"a": "b"}, read_only=True)
    spec = made._target.spec
    assert (spec.size, spec.block_size, spec.queues, spec.depth) == (MIB, 512, 2, 64)
    assert (spec.params, spec.read_only, spec.recovering, spec.queue) == ({"a": "b"}, True, False, -1)
    made.close(discard=True)


def test_the_operations_defined_are_those_offered():
    def op(self, req):
        pass

    made, limits = opened(Disk, size=MIB)
    assert made.capabilities() == {"read"}
    assert (
        limits.read_only
        and not limits.volatile_cache
        and not limits.max_discard
        and not limits.max_write_zeroes
    )
    everything = dict.fromkeys(("write", "flush", "discard", "write_zeroes"), op)
    made, limits = opened(type("D", (Disk,), everything), size=MIB)
    assert made.capabilities() == set(control.OPERATIONS)
    assert not limits.read_only and limits.volatile_cache and not limits.fua
    assert limits.max_discard and limits.discard_granularity and limits.max_write_zeroes
    made, limits = opened(type("D", (Disk,), {**everything, "fua": True}), size=MIB)
    assert "fua" in made.capabilities() and limits.fua
    # Without a cache to flush, FUA means nothing.
    assert not opened(type("D", (Disk,), {"write": op, "fua": True}), size=MIB)[1].fua
    made, limits = opened(type("D", (Disk,), everything), size=MIB, read_only=True)
    assert made.capabilities() == {"read"} and limits.read_only and not limits.max_discard


def test_handle_serves_what_it_declares():
    class Batched(ublkd.Target):
        size = MIB

        def handle(self, batch):
            pass

    assert opened(Batched)[0].capabilities() == {"read", "write"}
    Batched.operations = ("read", "write", "flush")
    assert opened(Batched)[0].capabilities() == {"read", "write", "flush"}
    Batched.operations = ("read", "flush")  # nothing to flush where nothing is written
    assert opened(Batched)[0].capabilities() == {"read"}
    assert opened(Batched)[1].read_only


# ---- shared() ----


def test_shared_memory_is_seen_across_a_fork(shm):
    made, _ = opened(SharedDisk, size=MIB)
    data = made._target.data
    pid = os.fork()
    if pid == 0:
        data[:5] = b"child"
        os._exit(0)
    os.waitpid(pid, 0)
    assert len(data) == MIB and data[:6] == b"child\0"
    made.close(discard=True)
    assert not list(shm.iterdir())


def test_shared_files_follow_the_device(shm):
    class Two(SharedDisk):
        def prepare(self, spec):
            self.maps = [spec.shared(4096), spec.shared(8192)]

    made, _ = opened(Two, size=MIB)
    made._target.maps[1][:4] = b"keep"
    assert all(f"new-{os.getpid()}" in path for path in made.files())
    made.added(7)
    expected = [f"{shm}/ublkd-7-shared-0", f"{shm}/ublkd-7-shared-1"]
    assert made.files() == expected == sorted(map(str, shm.iterdir()))
    assert all(os.stat(path).st_mode & 0o777 == 0o600 for path in expected)
    made.close(discard=False)

    again, _ = opened(Two, dev_id=7, size=MIB)
    assert again._told.recovering and again.files() == expected
    assert again._target.maps[1][:4] == b"keep"
    view = memoryview(again._target.maps[0])  # a target may well hold one
    again.close(discard=True)
    assert not list(shm.iterdir())
    view.release()


def test_recovery_without_the_data_says_so(shm):
    with pytest.raises(UblkdError, match=r"cannot share 1 MiB of memory in .*ublkd-9-shared-0: No such file"):
        opened(SharedDisk, dev_id=9, size=MIB)
    (shm / "ublkd-9-shared-0").write_bytes(b"short")
    with pytest.raises(UblkdError, match="is not of the 1048576 bytes"):
        opened(SharedDisk, dev_id=9, size=MIB)
    assert (shm / "ublkd-9-shared-0").read_bytes() == b"short"  # somebody's data: not ours to remove


@pytest.mark.parametrize("exc", [ValueError, KeyboardInterrupt])
def test_a_failed_prepare_leaves_no_file(shm, exc):
    class Late(SharedDisk):
        def prepare(self, spec):
            super().prepare(spec)
            raise exc

    with pytest.raises((UblkdError, KeyboardInterrupt)):
        opened(Late, size=MIB)
    assert not list(shm.iterdir())


def test_shared_outside_prepare_or_of_nothing(shm):
    assert "nothing to share (does the device have a size? give --size)" in refusal(SharedDisk)

    class Late(SharedDisk):
        def open(self, spec):
            spec.shared(4096)

    made, _ = opened(Late, size=MIB)
    with pytest.raises(
        UblkdError, match=r"open\(\) raised RuntimeError: spec.shared\(\) works in prepare\(\) alone"
    ):
        made.engine_target(0)
    made.close(discard=True)
    assert not list(shm.iterdir())


# ---- in the worker ----


def test_the_worker_opens_and_closes_the_target(capfd):
    calls = []

    class Noted(Disk):
        def open(self, spec):
            calls.append(("open", spec.queue))

        def close(self):
            calls.append("close")
            raise ValueError("too late to matter")

    made, _ = opened(Noted, size=MIB)
    target = made.engine_target(0)
    assert target.ptr and calls == [("open", 0)]
    target.close()
    target.close()
    assert calls == [("open", 0), "close"]
    assert "too late to matter" in capfd.readouterr().err


class Logger:
    def __init__(self):
        self.lines = []

    def error(self, event, **fields):
        self.lines.append((event, fields))


def _raised(text):
    try:
        raise ValueError(text)
    except ValueError as e:
        return e


def test_each_failure_is_logged_once_then_counted(monkeypatch):
    logger, clock = Logger(), [100.0]
    monkeypatch.setattr(control.time, "monotonic", lambda: clock[0])
    errors = control.ErrorLog(logger)
    for n in range(1000):
        errors("read", _raised(str(n)))
    assert len(logger.lines) == 1 and isinstance(logger.lines[0][1]["exc_info"], ValueError)
    errors("write", _raised("x"))
    errors("read", TypeError("from C, without a traceback"))
    assert len(logger.lines) == 3
    clock[0] += control.REPEAT_S
    errors("read", _raised("again"))
    assert logger.lines[3][1]["again"] == 1000
    assert len(logger.lines) == 4
    for n in range(500):
        errors("read", type(f"E{n}", (Exception,), {})())
    assert len(logger.lines) <= control.MAX_FAILURES + 1


# ---- the package ----


def test_public_names():
    for name in ublkd.__all__:
        assert getattr(ublkd, name) is not None, name
    assert set(ublkd.__all__) <= set(dir(ublkd))
    with pytest.raises(AttributeError, match="nonsense"):
        ublkd.nonsense  # noqa: B018


def test_importing_the_package_is_cheap():
    code = "import sys; before = set(sys.modules); import ublkd; print(*sorted(set(sys.modules) - before))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {
        "ublkd._engine",
        "ublkd._pytarget",
        "ublkd.native",
        "structlog",
        "click",
        "cffi",
        "dataclasses",
        "inspect",
    }
    assert "ublkd" in out and not heavy & set(out)


def test_importing_the_base_class_needs_nothing_compiled():
    code = "import sys, ublkd; ublkd.Target; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"ublkd._engine", "ublkd._pytarget"} & set(out)


def test_serve_runs_a_device(monkeypatch):
    calls = []
    fake = types.ModuleType("ublkd.supervisor")
    fake.run_foreground = lambda spec, target: calls.append((spec, target)) or 5
    monkeypatch.setitem(sys.modules, "ublkd.supervisor", fake)
    monkeypatch.setattr(ublkd, "supervisor", fake, raising=False)
    assert ublkd.serve(SharedDisk, size="2M", queues=3) == 5
    spec, target = calls[0]
    assert target._given is SharedDisk and (spec.target, spec.size, spec.queues) == ("python", 2 * MIB, 3)
    assert spec.file == f"{__name__}:SharedDisk" and isinstance(target, control.PythonTarget)
    disk = Disk()
    disk.size = MIB
    ublkd.serve(disk)
    assert calls[1][1].open().size == MIB and calls[1][1]._target is disk
    with pytest.raises(UsageError, match="no subclass of"):
        ublkd.serve(int)


def test_a_script_is_named_by_its_path(script):
    path = script(
        "import ublkd, ublkd.targets.python as p\n"
        "class D(ublkd.Target): pass\n"
        "if __name__ == '__main__': print(p.script_spec(D, {}).file)\n"
    )
    out = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert out == f"{path}:D"
    assert control.load(out).__name__ == "D"


# ---- the examples ----


def test_the_ram_disk_example(shm):
    made = control.PythonTarget(
        DeviceSpec(target="python", file=f"{EXAMPLES}/ram_disk.py:RamDisk", size=MIB, queues=4)
    )
    limits = made.open()
    assert limits.size == MIB and made.capabilities() == {"read", "write", "write_zeroes"}
    made.close(discard=True)


def test_the_mirror_example(tmp_path):
    for name, size in (("a", 3 * MIB), ("b", 2 * MIB + 100)):
        (tmp_path / name).write_bytes(bytes(size))
    params = {name: str(tmp_path / name) for name in "ab"}
    made = control.PythonTarget(
        DeviceSpec(target="python", file=f"{EXAMPLES}/mirror.py:Mirror", queues=2, params=params)
    )
    assert made.open().size == 2 * MIB
    assert made.capabilities() == {"read", "write", "flush", "fua"}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path):
    assert path.read_text().startswith("# SPDX-License-Identifier")
    assert 10 <= sum(bool(line.strip()) for line in path.read_text().splitlines()) <= 30
