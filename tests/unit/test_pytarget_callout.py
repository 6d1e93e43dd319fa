# SPDX-License-Identifier: Apache-2.0
"""The C half of the Python target, driven by a small engine made for it (pytarget_engine.c)."""

from __future__ import annotations

import errno
import gc
import importlib.util
import os
import pathlib
import pickle
import random
import subprocess
import sys
import sysconfig

import cffi
import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENGINE_DIR = ROOT / "daemon" / "ublkd" / "engine"
SANITIZED = os.environ.get("UBLKD_TEST_PYTARGET", "")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]


def _pytarget_module():
    if not SANITIZED:
        from ublkd import _pytarget

        return _pytarget
    spec = importlib.util.spec_from_file_location("ublkd._pytarget", SANITIZED)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pytarget = _pytarget_module()
READ, WRITE, FLUSH = pytarget.READ, pytarget.WRITE, pytarget.FLUSH
DISCARD, WRITE_ZEROES = pytarget.DISCARD, pytarget.WRITE_ZEROES
FUA = 1 << 13
OPERATIONS = ("read", "write", "flush", "discard", "write_zeroes")
BLOCK = 4096
MAX_IO = 4 * BLOCK
PLAIN_READS = 64  # so many must be left as they were given before reads are given straight


@pytest.fixture(scope="session")
def lib(tmp_path_factory):
    ffi = cffi.FFI()
    ffi.cdef("""
        struct ublkd_queue;
        struct ublkd_queue *engine_create(uintptr_t target, unsigned depth, uint32_t max_io, unsigned qid,
                                          bool apart);
        void engine_destroy(struct ublkd_queue *q);
        void engine_request(struct ublkd_queue *q, unsigned tag, unsigned op, uint32_t flags, uint64_t offset,
                            uint32_t length);
        void engine_pass(struct ublkd_queue *q);
        int engine_answer(struct ublkd_queue *q, unsigned tag, int *ret);
        unsigned engine_run_sqes(struct ublkd_queue *q, unsigned max_bytes, int force_res);
        void engine_sqe(struct ublkd_queue *q, unsigned i, unsigned *ret_opcode, uint32_t *ret_flags,
                        uint64_t *ret_ns);
        void *engine_data(struct ublkd_queue *q, unsigned tag);
        void engine_fail_moves(struct ublkd_queue *q, int error);
        unsigned engine_moves(struct ublkd_queue *q, unsigned *ret_straight);
        uint64_t engine_python_entries(struct ublkd_queue *q);
        unsigned engine_double_answers(struct ublkd_queue *q);
    """)
    ffi.set_source(
        "ublkd_test_engine",
        '#include "pytarget_engine.c"\n',
        include_dirs=[str(HERE), str(ENGINE_DIR)],
        extra_compile_args=["-std=gnu11", "-Wall", *(SANITIZE if SANITIZED else ["-O2"])],
    )
    built = ffi.compile(tmpdir=str(tmp_path_factory.mktemp("engine")))
    spec = importlib.util.spec_from_file_location("ublkd_test_engine", built)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Engine:
    """A queue with a target on it. errors has (method, type name, text) of all that was reported.

    apart: as on user copy, the requests' data is elsewhere than the buffers.
    """

    def __init__(self, module, target, depth=8, block_size=512, operations=None, apart=False):
        self.lib, self.ffi = module.lib, module.ffi
        self.errors = []
        self.depth = depth
        self.apart = apart
        if operations is None:
            operations = [op for op in OPERATIONS if hasattr(target, op)]
        address = pytarget.create(target, on_error=self._error, operations=operations, block_size=block_size)
        self.q = self.lib.engine_create(address, depth, MAX_IO, 3, apart)
        assert self.q

    def _error(self, method, exc):
        # Not the exception itself: its traceback holds the handler's frame, and that the request.
        self.errors.append((method, type(exc).__name__, str(exc)))

    def submit(self, tag, op, offset=0, length=BLOCK, flags=0, data=b""):
        if self.apart and op == READ:
            data = b"\xee" * min(length, MAX_IO)  # its pages hold what the kernel had there before
        self.buffer(tag, MAX_IO)[0 : len(data)] = data
        self.lib.engine_request(self.q, tag, op, flags, offset, length)

    def go(self):
        self.lib.engine_pass(self.q)

    def run_io(self, max_bytes=0xFFFFFFFF, result=0):
        """Carry out what is on the ring, deliver it; how many operations that were."""
        n = self.lib.engine_run_sqes(self.q, max_bytes, result)
        self.go()
        return n

    def answer(self, tag=0):
        """The result, or None while the request is open."""
        ret = self.ffi.new("int *")
        return ret[0] if self.lib.engine_answer(self.q, tag, ret) else None

    def one(self, op=READ, tag=0, **kwargs):
        """The answer to one request that arrives alone."""
        self.submit(tag, op, **kwargs)
        self.go()
        return self.answer(tag)

    def sqe(self, i=0):
        opcode, flags, ns = self.ffi.new("unsigned *"), self.ffi.new("uint32_t *"), self.ffi.new("uint64_t *")
        self.lib.engine_sqe(self.q, i, opcode, flags, ns)
        return opcode[0], flags[0], ns[0]

    def buffer(self, tag=0, length=BLOCK):
        """A request's data as the driver has it."""
        return self.ffi.buffer(self.lib.engine_data(self.q, tag), length)

    def moves(self):
        """How often data went to or from a request since the last call: straight, and by way of its buffer."""
        straight = self.ffi.new("unsigned *")
        moves = self.lib.engine_moves(self.q, straight)
        now = (straight[0], moves - straight[0])
        before, self._moves = getattr(self, "_moves", (0, 0)), now
        return now[0] - before[0], now[1] - before[1]

    def fail_moves(self, error):
        """Data can't be had from here on."""
        self.lib.engine_fail_moves(self.q, -error)

    def warm_up(self):
        """From here on reads are given straight, as far as this target allows that."""
        for _ in range(PLAIN_READS):
            assert self.one(READ) == BLOCK
        self.moves()

    def entries(self):
        return self.lib.engine_python_entries(self.q)

    def close(self):
        if self.q:
            assert self.lib.engine_double_answers(self.q) == 0
            self.lib.engine_destroy(self.q)
            self.q = None


@pytest.fixture
def any_engine(lib):
    made = []

    def make(target, **kwargs):
        made.append(Engine(lib, target() if isinstance(target, type) else target, **kwargs))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture(params=["copy", "user-copy"])
def engine(any_engine, request):
    """What a handler sees is the same on all transports."""
    return lambda target, **kwargs: any_engine(target, apart=request.param == "user-copy", **kwargs)


class Memory:
    def __init__(self):
        self.data = bytearray(os.urandom(64 * BLOCK))

    def read(self, req):
        req.copy_from(self.data)

    def write(self, req):
        req.copy_to(self.data)

    write_zeroes = write
    discard = write


def reader(function, **attributes):
    """A target whose read() is this function."""
    return type("T", (), {"read": staticmethod(function), **attributes})()


# ---- results ----


def test_data_crosses_both_ways(engine):
    target = Memory()
    e = engine(target)
    assert e.one(READ, offset=5 * BLOCK, length=2 * BLOCK) == 2 * BLOCK
    assert e.buffer(length=2 * BLOCK)[:] == target.data[5 * BLOCK : 7 * BLOCK]
    data = os.urandom(BLOCK)
    assert e.one(WRITE, offset=63 * BLOCK, data=data) == BLOCK
    assert target.data[63 * BLOCK :] == data
    assert e.errors == []


def test_a_read_stays_inside_its_buffer(engine):
    e = engine(Memory())
    assert e.one(READ, length=512) == 512
    assert e.buffer(length=MAX_IO)[512:] == b"\xee" * (MAX_IO - 512)
    assert e.one(READ, length=MAX_IO) == MAX_IO  # the sanitizers see what lies beyond


@pytest.mark.parametrize("op", [DISCARD, WRITE_ZEROES])
def test_copy_to_stores_zeroes_for_an_operation_without_data(engine, op):
    target = Memory()
    before = bytes(target.data)
    e = engine(target)
    assert e.one(op, offset=BLOCK, length=32 * BLOCK) == 0
    assert target.data == before[:BLOCK] + bytes(32 * BLOCK) + before[33 * BLOCK :]


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        *[(None, 4096), (4096, 4096), (512, 512), (1535, 1024)],
        *[(n, -5) for n in (0, 511, -1, 4097, True, 1 << 80, "x", 3.0)],
    ],
)
def test_what_a_returned_value_means(engine, value, answer):
    e = engine(reader(lambda req: value))
    assert e.one() == answer
    assert len(e.errors) == (answer == -5)
    if e.errors:
        assert e.errors[0][0] == "read" and "returned" in e.errors[0][2]


def test_short_results_end_at_a_logical_block(engine):
    assert engine(reader(lambda req: 6000), block_size=4096).one(length=8192) == 4096


def _raiser(exc):
    def read(req):
        raise exc

    return reader(read)


@pytest.mark.parametrize(
    ("exc", "answer", "reported"),
    [
        (OSError(errno.ENOSPC, "full"), -errno.ENOSPC, False),
        (FileNotFoundError(errno.ENOENT, "gone"), -errno.ENOENT, False),
        (OSError("no number"), -errno.EIO, True),
        (OSError(0, "zero"), -errno.EIO, True),
        (OSError(-5, "negative"), -errno.EIO, True),
        (OSError(1 << 70, "huge"), -errno.EIO, True),
        (ValueError("bad"), -errno.EIO, True),
        (SystemExit(3), -errno.EIO, True),
        (KeyboardInterrupt(), -errno.EIO, True),
    ],
)
def test_what_an_exception_means(engine, exc, answer, reported):
    e = engine(_raiser(exc))
    assert e.one() == answer
    assert [error[:2] for error in e.errors] == ([("read", type(exc).__name__)] if reported else [])
    assert e.one(tag=1) == answer  # and the queue goes on


def test_a_failing_error_callback_harms_nobody(engine, monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append(args.exc_type))
    e = engine(_raiser(ValueError("bad")))
    e.errors = None  # so that _error() raises
    assert e.one() == -errno.EIO
    assert unraisable == [AttributeError]


def test_operations_that_a_target_lacks(engine):
    e = engine(reader(lambda req: None))
    assert e.one(FLUSH, length=0) == 0
    for op in (WRITE, DISCARD, WRITE_ZEROES, 4, 6, 31, 77, 255):
        assert e.one(op) == -errno.EOPNOTSUPP
    assert e.errors == []


def test_only_the_named_operations_are_used(engine):
    e = engine(Memory(), operations={"read"})
    assert e.one(READ) == BLOCK
    assert e.one(WRITE) == -errno.EOPNOTSUPP


def test_fail_beats_the_returned_value(engine):
    def read(req):
        req.fail(errno.ENOSPC if req.tag else OSError(errno.EROFS, "read only"))
        assert req.result < 0
        return req.length

    e = engine(reader(read))
    assert [e.one(tag=0), e.one(tag=1)] == [-errno.EROFS, -errno.ENOSPC]
    for nonsense in (0, -1, 4096, "EIO", OSError("no number")):
        e = engine(reader(lambda req, nonsense=nonsense: req.fail(nonsense)))
        assert e.one() == -errno.EIO
        assert e.errors[0][1] == "ValueError"


# ---- Request ----


def test_what_a_request_says_of_itself(engine):
    seen = []

    class T:
        def read(self, req):
            seen.append(
                (req.op, req.offset, req.length, req.tag, req.queue, req.fua, req.nounmap, req.result)
            )

        write = read
        write_zeroes = read

    e = engine(T)
    e.one(READ, tag=7, offset=1 << 50, length=8192)
    e.one(WRITE, tag=1, offset=512, flags=FUA)
    e.one(WRITE_ZEROES, tag=2, offset=0, length=1 << 31, flags=1 << 15)
    assert seen == [
        (READ, 1 << 50, 8192, 7, 3, False, False, 8192),
        (WRITE, 512, 4096, 1, 3, True, False, 4096),
        (WRITE_ZEROES, 0, 1 << 31, 2, 3, False, True, 0),
    ]


def test_request_and_batch_cannot_be_made_by_hand():
    for cls in (pytarget.Request, pytarget.Batch, pytarget.Operation):
        with pytest.raises(TypeError):
            cls()


@pytest.mark.parametrize(
    "off", [1, BLOCK, -1, -(1 << 70), 1 << 63, (1 << 64) - 1, (1 << 64) - BLOCK, 1 << 64, 1 << 100, "0", 1.0]
)
@pytest.mark.parametrize("method", ["copy_from", "copy_to"])
def test_no_copy_leaves_the_other_buffer(engine, method, off):
    other = bytearray(b"\x55" * BLOCK)

    class T:
        def read(self, req):
            getattr(req, method)(other, off)

        write = read

    e = engine(T)
    assert e.one(WRITE if method == "copy_to" else READ) == -errno.EIO
    assert e.errors[0][1] in ("ValueError", "TypeError")
    assert other == b"\x55" * BLOCK and e.buffer()[:] == b"\xee" * BLOCK


def test_the_offset_can_be_named_or_left_out(engine):
    data = os.urandom(3 * BLOCK)
    calls = iter(
        [
            lambda req: req.copy_from(data),
            lambda req: req.copy_from(data, None),
            lambda req: req.copy_from(data, BLOCK),
            lambda req: req.copy_from(data, off=2 * BLOCK),
            lambda req: req.copy_from(data, offset=0),
            lambda req: req.copy_from(),
            lambda req: req.copy_from(data, 0, off=0),
            lambda req: req.copy_from(off=0),
        ]
    )
    e = engine(reader(lambda req: next(calls)(req)))
    for block in (1, 1, 1, 2):
        assert e.one(offset=BLOCK) == BLOCK
        assert e.buffer()[:] == data[block * BLOCK : (block + 1) * BLOCK]
    for _ in range(4):
        assert e.one() == -errno.EIO
        assert e.errors.pop()[1] == "TypeError"


def test_buffers_that_cannot_take_a_copy(engine):
    e = engine(reader(lambda req: req.copy_from(memoryview(bytes(4 * BLOCK))[::2])))
    assert (e.one(), e.errors[0][1]) == (-errno.EIO, "BufferError")
    e = engine(type("T", (), {"write": lambda self, req: req.copy_to(bytes(BLOCK))}), operations=["write"])
    assert (e.one(WRITE), e.errors[0][1]) == (-errno.EIO, "BufferError")


@pytest.mark.parametrize(
    ("op", "call"),
    [
        (WRITE, lambda req: req.copy_from(bytes(BLOCK))),
        (WRITE, lambda req: req.zero()),
        (WRITE, lambda req: req.pread(0)),
        (FLUSH, lambda req: req.copy_to(bytearray(BLOCK))),
        (DISCARD, lambda req: req.pwrite(0)),
        (DISCARD, lambda req: req.copy_from(bytes(BLOCK))),
    ],
)
def test_methods_that_do_not_fit_the_operation_say_so(engine, op, call):
    e = engine(type("T", (), dict.fromkeys(("write", "flush", "discard"), staticmethod(call))))
    assert e.one(op) == -errno.EIO
    assert "does not apply to a" in e.errors[0][2]


def test_zero(engine):
    e = engine(reader(lambda req: req.zero()))
    assert e.one(length=512) == 512
    assert e.buffer(length=1024)[:] == bytes(512) + b"\xee" * 512


def test_files(engine, tmp_path):
    path = tmp_path / "disk"
    data = os.urandom(2 * BLOCK + 100)
    path.write_bytes(data)

    class T:
        def read(self, req):
            req.pread(file)

        def write(self, req):
            req.pwrite(file.fileno(), off=req.offset + 100)

    with path.open("r+b", buffering=0) as file:
        e = engine(T)
        assert e.one(READ, offset=BLOCK) == BLOCK
        assert e.buffer()[:] == data[BLOCK : 2 * BLOCK]
        # Beyond the end of the file there are zeroes, not what the buffer held.
        assert e.one(READ, offset=2 * BLOCK) == BLOCK
        assert e.buffer()[:] == data[2 * BLOCK :] + bytes(BLOCK - 100)
        for flags in (0, FUA):
            new = os.urandom(BLOCK)
            assert e.one(WRITE, offset=2 * BLOCK, data=new, flags=flags) == BLOCK
            assert path.read_bytes() == data + new
        assert e.errors == []
    assert e.one(READ) == -errno.EIO  # the file object is closed: a ValueError
    assert e.errors[0][1] == "ValueError"


def test_file_errors_keep_their_errno(engine):
    read_end, write_end = os.pipe()
    try:
        assert engine(reader(lambda req: req.pread(read_end))).one() == -errno.ESPIPE
        assert engine(reader(lambda req: req.pread(999999))).one() == -errno.EBADF
        for off in (1 << 63, (1 << 63) - 1, 1 << 64, -1):
            e = engine(reader(lambda req, off=off: req.pread(read_end, off)))
            assert (e.one(), e.errors[0][1]) == (-errno.EIO, "ValueError")
    finally:
        os.close(read_end)
        os.close(write_end)


# ---- what a handler keeps ----


def test_what_the_buffer_holds_is_delivered(engine):
    views = []

    def read(req):
        view = req.buffer
        assert view is req.buffer and len(view) == req.length and not view.readonly
        views.append(id(view))
        view[:4] = b"ABCD"

    e = engine(reader(read))
    assert e.one(length=512) == 512 and e.buffer(length=4)[:] == b"ABCD"
    e.one(length=512)
    assert views[0] == views[1]  # the same length again: no new object
    assert e.one(length=1024) == 1024
    assert e.errors == []


@pytest.mark.parametrize("op", [FLUSH, DISCARD])
def test_operations_without_data_have_an_empty_buffer(engine, op):
    sizes = []
    e = engine(
        type("T", (), dict.fromkeys(("flush", "discard"), lambda self, req: sizes.append(len(req.buffer))))
    )
    assert e.one(op) == 0 and sizes == [0]


def test_a_kept_view_is_dead_once_the_request_is_answered(engine):
    kept = []
    e = engine(reader(lambda req: kept.append(req.buffer)))
    for _ in range(2):
        assert e.one() == BLOCK
    for view in kept:
        with pytest.raises(ValueError, match="released"):
            view[0] = 1
    assert kept[0] is not kept[1] and e.errors == []


@pytest.mark.parametrize(
    "part",
    [lambda view: view[:10], memoryview, lambda view: view.cast("I"), pickle.PickleBuffer],
    ids=["slice", "view", "cast", "export"],
)
def test_a_kept_part_of_the_buffer_fails_the_request(engine, part):
    kept = []
    target = reader(lambda req: kept.append(part(req.buffer)))
    e = engine(target)
    assert e.one() == -errno.EIO
    assert "still in use" in e.errors[0][2]
    kept.clear()
    target.read = lambda req: None
    assert e.one() == -errno.EIO  # still bound to the method found at first
    assert len(e.errors) == 2


def test_a_part_kept_of_a_released_view_fails_the_request(engine):
    kept = []

    def read(req):
        for _ in range(3):
            with req.buffer as view:
                kept.append(view[:10])
        len(req.buffer)

    e = engine(reader(read))
    assert e.one() == -errno.EIO and "still in use" in e.errors.pop()[2]
    kept = type("Dropped", (), {"append": lambda self, part: None})()
    assert e.one() == BLOCK and e.errors == []


def test_parts_that_are_dropped_in_time_are_fine(engine):
    def read(req):
        with req.buffer as view, view[:512] as head:
            head[:] = bytes(512)
        assert len(req.buffer) == BLOCK
        bytes(req.buffer[:10])
        sum(req.buffer)

    e = engine(reader(read))
    assert [e.one(), e.one()] == [BLOCK, BLOCK]
    assert e.errors == []


def test_a_kept_request_is_dead_and_never_becomes_another(engine):
    kept = []
    e = engine(reader(lambda req: kept.append(req)))
    assert e.one(offset=BLOCK) == BLOCK
    assert e.one(offset=2 * BLOCK, length=512) == 512
    first, second = kept
    assert first is not second
    assert (first.offset, first.length, first.result) == (BLOCK, BLOCK, BLOCK)
    assert "answered" in repr(first)
    for call in (
        lambda: first.copy_from(bytes(8 * BLOCK)),
        lambda: first.copy_to(bytearray(8 * BLOCK)),
        lambda: first.zero(),
        lambda: first.buffer,
        lambda: first.pread(0),
        lambda: first.pwrite(0),
        lambda: first.pread_async(0),
        lambda: first.fsync_async(0),
        lambda: first.fail(5),
    ):
        with pytest.raises(ValueError, match="answered already"):
            call()
    e.close()
    with pytest.raises(ValueError, match="answered already"):
        second.zero()


def test_requests_are_reused(engine):
    seen = set()
    e = engine(reader(lambda req: seen.add(id(req))), depth=4)
    for _ in range(50):
        for tag in range(4):
            e.submit(tag, READ)
        e.go()
    assert len(seen) == 4


# ---- data that moves straight ----


def test_writes_go_straight_to_where_they_are_stored(any_engine):
    target = Memory()
    e = any_engine(target, apart=True)
    data = os.urandom(MAX_IO)
    assert e.one(WRITE, offset=BLOCK, length=MAX_IO, data=data) == MAX_IO
    assert target.data[BLOCK : BLOCK + MAX_IO] == data and e.moves() == (1, 0)
    assert e.one(DISCARD, offset=BLOCK) == 0
    assert target.data[BLOCK : 2 * BLOCK] == bytes(BLOCK) and e.moves() == (0, 0)


def test_reads_go_straight_from_where_they_are_stored(any_engine):
    target = Memory()
    e = any_engine(target, apart=True)
    e.warm_up()
    assert e.one(offset=BLOCK, length=MAX_IO) == MAX_IO
    assert e.buffer(length=MAX_IO)[:] == target.data[BLOCK : BLOCK + MAX_IO] and e.moves() == (1, 0)


def test_a_batch_goes_straight(any_engine):
    target = BatchMemory()
    e = any_engine(target, apart=True)
    e.warm_up()
    for tag in (0, 1):
        e.submit(tag, READ, offset=tag * BLOCK)
    e.submit(2, WRITE, offset=2 * BLOCK, data=b"w" * BLOCK)
    e.go()
    assert e.buffer(1)[:] == target.data[BLOCK : 2 * BLOCK]
    assert target.data[2 * BLOCK : 3 * BLOCK] == b"w" * BLOCK and e.moves() == (3, 0)


def test_a_target_that_looks_at_what_it_gave_gets_its_reads_buffered(any_engine):
    """From the first time on: what was pushed can only be had from its source, which may have changed."""
    source, looks = bytearray(b"s" * BLOCK), []

    def read(req):
        req.copy_from(source, 0)
        if looks:
            source[:] = b"t" * BLOCK
            req.copy_to(seen, 0)
            source[:] = b"s" * BLOCK

    seen = bytearray(BLOCK)
    e = any_engine(reader(read), apart=True)
    looks.append(True)
    assert e.one() == BLOCK and e.buffer()[:] == seen == b"s" * BLOCK
    looks.clear()
    for _ in range(2 * PLAIN_READS):
        assert e.one() == BLOCK
    assert e.moves() == (0, 2 * PLAIN_READS + 1)
    # One that never did before has its first look at the source.
    e = any_engine(reader(read), apart=True)
    e.warm_up()
    looks.append(True)
    assert e.one() == BLOCK and e.buffer()[:] == seen == b"t" * BLOCK
    assert e.one() == BLOCK and e.buffer()[:] == seen == b"s" * BLOCK
    assert e.moves() == (1, 2)


def test_what_was_given_and_can_not_be_had_again_is_an_error(any_engine):
    class T:
        look = False

        def read(self, req):
            source = bytearray(BLOCK)
            req.copy_from(source, 0)
            if self.look:
                del source[10:]
                return len(req.buffer)

    target = T()
    e = any_engine(target, apart=True)
    e.warm_up()
    target.look = True
    assert e.one() == -errno.EIO and "outside the buffer of 10 bytes" in e.errors[0][2]
    assert e.one() == BLOCK  # from the second time on it is


def test_no_source_is_kept_beyond_its_request(engine):
    source = bytes(2 * BLOCK)
    before = sys.getrefcount(source)
    e = engine(reader(lambda req: req.copy_from(source, 0)))
    for _ in range(PLAIN_READS + 2):
        assert e.one() == BLOCK
    assert sys.getrefcount(source) == before


@pytest.mark.parametrize("length", [512, BLOCK, MAX_IO])
@pytest.mark.parametrize("fill", ["nothing", "some", "released"])
def test_no_read_shows_what_its_pages_held(engine, fill, length):
    def read(req):
        if fill == "some":
            req.buffer[:100] = b"x" * 100
        elif fill == "released":
            with req.buffer as view:
                view[:100] = b"x" * 100
        return 512

    e = engine(reader(read))
    e.buffer(length=MAX_IO)[:] = bytes(MAX_IO)
    assert e.one(length=length) == 512
    filled = b"" if fill == "nothing" else b"x" * 100
    assert e.buffer(length=512)[:] == filled.ljust(512, b"\0")


@pytest.mark.parametrize("error", [errno.EFAULT, errno.EINVAL])
def test_data_that_can_not_be_moved_is_an_oserror(any_engine, error):
    caught = []

    class T(Memory):
        call = "copy_to"

        def write(self, req):
            try:
                if self.call == "buffer":
                    len(req.buffer)
                elif self.call == "copy_to":
                    req.copy_to(self.data)
                else:
                    getattr(req, self.call)(0)
            except OSError as exc:
                caught.append(exc.errno)
                raise

    target = T()
    e = any_engine(target, apart=True)
    e.warm_up()
    e.fail_moves(error)
    for target.call in ("copy_to", "buffer", "pwrite", "pwrite_async"):
        assert e.one(WRITE) == -error and caught.pop() == error
    assert e.one(READ) == -error
    e.fail_moves(0)
    target.call = "copy_to"
    assert e.one(WRITE) == e.one(READ) == BLOCK and e.errors == []


def test_a_push_that_failed_and_was_ignored_is_made_up_for(any_engine):
    """Otherwise pages that nobody filled would be delivered."""

    class T(Memory):
        def read(self, req):
            try:
                req.copy_from(self.data)
            except OSError:
                e.fail_moves(0)

    e = any_engine(T, apart=True)
    e.warm_up()
    e.fail_moves(errno.EFAULT)
    assert e.one() == BLOCK and e.moves() == (0, 1)
    assert b"\xee" * 16 not in e.buffer()[:]


def test_a_push_in_the_end_can_fail(any_engine):
    e = any_engine(reader(lambda req: req.zero()), apart=True)
    e.fail_moves(errno.EFAULT)
    assert e.one() == -errno.EFAULT and e.errors == []


def test_what_can_not_be_moved_fails_alone_in_a_batch(any_engine):
    class T(BatchMemory):
        def handle(self, batch):
            if len(batch) == 2:
                e.fail_moves(errno.EFAULT)
                batch.copy_to(self.data)
                e.fail_moves(0)
                batch.copy_from(self.data)
            else:
                super().handle(batch)

    e = any_engine(T, apart=True)
    e.submit(0, READ)
    e.submit(1, WRITE)
    e.go()
    assert (e.answer(0), e.answer(1)) == (BLOCK, -errno.EFAULT)
    e.submit(0, READ)
    e.go()
    assert e.answer(0) == BLOCK and e.errors == []


class Script:
    """Handlers that do this and that to a request, by the dice, and write down what they see.

    straight: their reads are given straight, as far as they don't look at them.
    """

    def __init__(self, seed, directory, straight):
        self.dice = random.Random(seed)
        self.seen, self.warm, self.straight = [], True, straight
        self.constant = self.dice.randbytes(8 * BLOCK)
        self.memory = [bytearray(self.dice.randbytes(8 * BLOCK)) for _ in range(3)]
        self.files = []
        for n in range(3):
            (directory / str(n)).write_bytes(self.dice.randbytes(3 * BLOCK + 77))
            self.files.append(os.open(directory / str(n), os.O_RDWR))

    async def serve(self, req):
        if self.warm:
            return req.copy_from(bytes(BLOCK), 0)
        view = None
        for _ in range(self.dice.randrange(9)):
            step = self.dice.choice([s for s in self.steps if req.op == READ or not s.startswith("r_")])
            memory, file = self.dice.choice(self.memory), self.dice.choice(self.files)
            off, broken = self.dice.randrange(9) * 512, self.dice.random() < 0.1
            self.seen.append(step)
            try:
                if step == "r_copy_from":
                    # given straight, it must stay as it was
                    req.copy_from(self.constant if self.straight else memory, 8 * BLOCK if broken else off)
                elif step == "copy_to":
                    req.copy_to(memory, 8 * BLOCK if broken else off)
                elif step == "r_zero":
                    req.zero()
                elif step in ("r_pread", "pwrite"):
                    getattr(req, step.removeprefix("r_"))(-1 if broken else file, off)
                elif step in ("r_pread_async", "pwrite_async"):
                    await getattr(req, step.removeprefix("r_"))(9999 if broken else file, off)
                elif step == "look":
                    self.seen.append(bytes(req.buffer))
                elif step == "view":
                    view = req.buffer
                elif step == "put" and view is not None:
                    view[off % req.length : off % req.length + 3] = b"put"
                elif step == "release":
                    req.buffer.release()
                    view = None
                elif step == "sleep":
                    await pytarget.sleep(0)
            except (OSError, ValueError) as exc:
                self.seen.append(repr(exc))
        if self.dice.random() < 0.2:
            return 512
        if self.dice.random() < 0.1:
            req.fail(errno.ENOSPC)
        return None

    read = write = serve
    steps = (
        *("r_copy_from", "r_copy_from", "r_zero", "r_pread", "r_pread_async", "copy_to", "copy_to", "pwrite"),
        *("pwrite_async", "look", "view", "view", "put", "put", "release", "sleep"),
    )

    def outcome(self):
        for fd in self.files:
            self.seen.append(os.pread(fd, 16 * BLOCK, 0))
            os.close(fd)
        return self.seen, self.memory


@pytest.mark.parametrize("straight", [False, True])
def test_whatever_a_handler_does_it_is_the_same(any_engine, tmp_path, straight):
    """Two requests at a time, on a driver that copies and one that doesn't."""

    def play(seed, apart):
        script = Script(seed, tmp_path, straight)
        e = any_engine(script, apart=apart)
        for tag in (0, 1):
            e.buffer(tag, MAX_IO)[:] = bytes(MAX_IO)
        if straight:
            e.warm_up()
        script.warm = False
        dice, results = random.Random(seed), []
        for tag in (0, 1):
            length, op = dice.choice((512, BLOCK, MAX_IO)), dice.choice((READ, READ, WRITE))
            e.submit(tag, op, length=length, data=dice.randbytes(length) if op == WRITE else b"")
            results.append((tag, op))
        e.go()
        while e.run_io(dice.choice((1000, BLOCK, MAX_IO))):
            pass
        for tag, op in results:
            answer = e.answer(tag)
            script.seen += [answer, e.buffer(tag, max(answer, 0))[:] if op == READ else b""]
        assert not e.errors
        e.close()
        return script.outcome()

    for seed in range(100 if SANITIZED else 1000):
        assert play(seed, apart=False) == play(seed, apart=True), seed


# ---- one entry per pass ----


def test_one_entry_into_python_per_pass(engine):
    e = engine(Memory(), depth=64)
    for tag in range(64):
        e.submit(tag, READ, offset=tag * BLOCK)
    e.go()
    assert e.entries() == 1
    assert all(e.answer(tag) == BLOCK for tag in range(64))


# ---- handle(batch) ----


class BatchMemory(Memory):
    def handle(self, batch):
        batch.copy_from(self.data)
        batch.copy_to(self.data)


def test_a_batch_moves_all_its_data(engine):
    target = BatchMemory()
    before = bytes(target.data)
    e = engine(target)
    e.submit(0, READ, offset=BLOCK)
    e.submit(1, WRITE, offset=2 * BLOCK, data=b"w" * BLOCK)
    e.submit(2, WRITE_ZEROES, offset=3 * BLOCK)
    e.submit(3, FLUSH, length=0)
    e.submit(4, READ, offset=63 * BLOCK)
    e.go()
    assert [e.answer(tag) for tag in range(5)] == [BLOCK, BLOCK, 0, 0, BLOCK]
    assert e.buffer(0)[:] == before[BLOCK : 2 * BLOCK] and e.buffer(4)[:] == before[63 * BLOCK :]
    assert target.data[2 * BLOCK : 4 * BLOCK] == b"w" * BLOCK + bytes(BLOCK)
    assert e.entries() == 1


def test_a_batch_is_a_sequence_and_dies_with_the_pass(engine):
    kept, sizes = [], []

    class T:
        def handle(self, batch):
            sizes.append(len(batch))
            assert [req.tag for req in batch] == list(range(len(batch)))
            assert batch[len(batch) - 1].tag == batch[-1].tag == len(batch) - 1
            with pytest.raises(IndexError):
                batch[len(batch)]
            kept.append(batch)

    e = engine(T, operations=["read"])
    for n in (1, 3):
        for tag in range(n):
            e.submit(tag, READ)
        e.go()
    assert sizes == [1, 3] and [len(batch) for batch in kept] == [0, 0] and kept[0] is not kept[1]
    kept[0].copy_from(b"")
    assert e.errors == []


def test_one_request_of_a_batch_fails_alone(engine):
    class T:
        def handle(self, batch):
            batch[1].fail(errno.ENOSPC)
            batch.copy_from(bytes(BLOCK))

    e = engine(T, operations=["read"])
    for tag, offset in ((0, 0), (1, 1 << 40), (2, 0)):
        e.submit(tag, READ, offset=offset)
    e.go()
    assert [e.answer(tag) for tag in range(3)] == [BLOCK, -errno.ENOSPC, BLOCK]


@pytest.mark.parametrize(
    ("exc", "answer"), [(ValueError("bad"), -errno.EIO), (OSError(errno.EROFS, ""), -errno.EROFS)]
)
def test_an_exception_fails_the_unanswered_requests_of_a_batch(engine, exc, answer):
    class T:
        def handle(self, batch):
            batch[1].fail(errno.ENOSPC)
            raise exc

    e = engine(T, operations=["read"])
    for tag in range(3):
        e.submit(tag, READ)
    e.go()
    assert [e.answer(tag) for tag in range(3)] == [answer, -errno.ENOSPC, answer]
    assert len(e.errors) == (answer == -errno.EIO)


def test_a_batch_copy_out_of_range_fails(engine):
    target = BatchMemory()
    e = engine(target)
    for op in (READ, WRITE, WRITE_ZEROES):
        assert e.one(op, offset=64 * BLOCK - 512) == -errno.EIO
        assert "outside the buffer" in e.errors.pop()[2]


def test_handle_must_return_none(engine):
    class T:
        def handle(self, batch):
            return len(batch)

    e = engine(T, operations=["read"])
    assert e.one() == -errno.EIO
    assert "must return None" in e.errors[0][2]


def test_views_kept_from_a_batch_are_dead(engine):
    kept = []

    class T:
        def handle(self, batch):
            kept.extend(req.buffer for req in batch)

    e = engine(T, operations=["read"])
    assert e.one() == BLOCK
    with pytest.raises(ValueError):
        kept[0][0]


# ---- async handlers ----


def test_a_coroutine_that_never_waits(engine):
    class T:
        async def read(self, req):
            req.zero()

        async def write(self, req):
            return 512

    e = engine(T)
    assert e.one(READ) == BLOCK and e.buffer()[:] == bytes(BLOCK)
    assert e.one(WRITE) == 512


@pytest.mark.parametrize("max_bytes", [BLOCK, 1000])
def test_file_io_from_coroutines(engine, tmp_path, max_bytes):
    path = tmp_path / "disk"
    data = os.urandom(3 * BLOCK + 100)
    path.write_bytes(data)

    class T:
        async def read(self, req):
            await req.pread_async(fd)

        async def write(self, req):
            await req.pwrite_async(fd, off=req.offset)

        async def flush(self, req):
            await req.fsync_async(fd)

    fd = os.open(path, os.O_RDWR)
    try:
        e = engine(T)
        new = os.urandom(BLOCK)
        e.submit(0, READ, offset=BLOCK)
        e.submit(1, READ, offset=3 * BLOCK)
        e.submit(2, WRITE, offset=0, data=new)
        e.submit(3, FLUSH, length=0)
        e.go()
        assert [e.answer(tag) for tag in range(4)] == [None] * 4
        passes = 0
        while e.run_io(max_bytes):
            passes += 1
        assert [e.answer(tag) for tag in range(4)] == [BLOCK, BLOCK, BLOCK, 0]
        assert e.buffer(0)[:] == data[BLOCK : 2 * BLOCK]
        assert e.buffer(1)[:] == data[3 * BLOCK :] + bytes(BLOCK - 100)
        assert path.read_bytes()[:BLOCK] == new
        assert passes == (2 if max_bytes == BLOCK else 5)
        assert e.errors == []
    finally:
        os.close(fd)


def test_interrupted_operations_are_queued_again(engine):
    class T:
        async def read(self, req):
            await req.pread_async(0)

    e = engine(T)
    e.submit(0, READ)
    e.go()
    for again in (-errno.EAGAIN, -errno.EINTR):
        assert e.run_io(result=again) == 1
        assert e.answer() is None
    e.run_io(result=BLOCK)
    assert e.answer() == BLOCK


def test_the_error_of_an_operation_is_raised_where_it_is_awaited(engine):
    class T:
        async def read(self, req):
            try:
                await req.pread_async(0)
            except OSError as e:
                assert e.errno == errno.ENODATA
            await req.pread_async(0)

        async def write(self, req):
            await req.pwrite_async(0)

    e = engine(T)
    e.submit(0, READ)
    e.submit(1, WRITE)
    e.go()
    e.run_io(result=-errno.ENODATA)
    assert (e.answer(0), e.answer(1)) == (None, -errno.ENODATA)
    e.run_io(result=-errno.ENXIO)
    assert e.answer(0) == -errno.ENXIO
    assert e.errors == []


def test_a_write_that_gets_nowhere_ends(engine):
    e = engine(
        type("T", (), {"write": staticmethod(lambda req: _await(req.pwrite_async(0)))}), operations=["write"]
    )
    e.submit(0, WRITE)
    e.go()
    q = e.lib.engine_run_sqes(e.q, 0, 0)  # writes of 0 bytes to fd 0
    assert q == 1
    e.go()
    assert e.answer() in (-errno.EIO, -errno.EBADF, -errno.ESPIPE)


async def _await(operation):
    await operation


def test_fua_reaches_the_ring(engine):
    class T:
        async def write(self, req):
            await req.pwrite_async(0)

    e = engine(T)
    for flags, rw_flags in ((FUA, 2), (0, 0)):  # RWF_DSYNC
        e.submit(0, WRITE, flags=flags)
        e.go()
        assert e.sqe()[:2] == (23, rw_flags)  # IORING_OP_WRITE
        e.run_io(result=BLOCK)
        assert e.answer() == BLOCK


def test_sleep(engine):
    class T:
        async def read(self, req):
            await pytarget.sleep(2.25)
            await pytarget.sleep(0)
            return 512

    e = engine(T)
    e.submit(0, READ)
    e.go()
    assert e.sqe()[::2] == (11, 2_250_000_000)  # IORING_OP_TIMEOUT
    assert e.run_io() == 1 and e.run_io() == 1
    assert e.answer() == 512
    for nonsense in (-1, float("nan"), float("inf"), 1e10, "x"):
        with pytest.raises((ValueError, TypeError)):
            pytarget.sleep(nonsense)


def test_coroutines_overlap(engine):
    order = []

    class T:
        async def read(self, req):
            order.append(("start", req.tag))
            for _ in range(3 - req.tag):
                await pytarget.sleep(1)
            order.append(("end", req.tag))

    e = engine(T)
    for tag in range(3):
        e.submit(tag, READ)
    e.go()
    assert order == [("start", 0), ("start", 1), ("start", 2)]
    while e.run_io():
        pass
    assert order[3:] == [("end", 2), ("end", 1), ("end", 0)]


class Foreign:
    def __await__(self):
        yield "something"


def test_a_foreign_awaitable_is_refused_at_its_line(engine):
    class T:
        async def read(self, req):
            await Foreign()

    e = engine(T)
    assert e.one() == -errno.EIO
    assert "can only await ublkd's own operations; what was awaited gave str" in e.errors[0][2]


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_coroutine_that_ignores_the_refusal_still_fails(engine, stubborn):
    ended = []

    class T:
        async def read(self, req):
            try:
                try:
                    await Foreign()
                except RuntimeError:
                    if stubborn:
                        await Foreign()
                return 512
            finally:
                ended.append(True)

    e = engine(T)
    assert e.one() == -errno.EIO
    assert "can only await" in e.errors[0][2] and ended == [True]


def test_an_operation_of_another_request_is_refused(engine):
    stolen = []

    class T:
        async def read(self, req):
            if not stolen:
                stolen.append(req.pread_async(0))
                await pytarget.sleep(1)
            else:
                await stolen[0]

    e = engine(T)
    e.submit(0, READ)
    e.submit(1, READ)
    e.go()
    assert e.answer(1) == -errno.EIO
    assert "of its own request" in e.errors[0][2]
    e.run_io()
    assert e.answer(0) == BLOCK


def test_an_operation_is_awaited_once(engine):
    class T:
        async def read(self, req):
            operation = pytarget.sleep(1)
            await operation
            await operation

    e = engine(T)
    e.submit(0, READ)
    e.go()
    e.run_io()
    assert e.answer() == -errno.EIO
    assert "awaited already" in e.errors[0][2]


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_a_forgotten_await_fails_the_request(engine, kind):
    class T:
        def read(self, req):
            req.pread_async(0)

        async def write(self, req):
            req.pwrite_async(0)

    e = engine(T)
    assert e.one(READ if kind == "plain" else WRITE) == -errno.EIO
    assert "never awaited" in e.errors[0][2]


def test_views_survive_an_await_but_not_the_answer(engine):
    kept = []

    class T:
        async def read(self, req):
            view = req.buffer
            await pytarget.sleep(1)
            view[:2] = b"ok"
            kept.append(view)

    e = engine(T)
    e.submit(0, READ)
    e.go()
    e.run_io()
    assert e.answer() == BLOCK and e.buffer(length=2)[:] == b"ok"
    with pytest.raises(ValueError):
        kept[0][0]


def test_one_coroutine_for_two_requests_breaks_nothing(engine):
    shared = []

    async def work():
        await pytarget.sleep(1)

    def read(req):
        if not shared:
            shared.append(work())
        return shared[0]

    e = engine(reader(read))
    e.submit(0, READ)
    e.submit(1, READ)
    e.go()
    while e.run_io():
        pass
    assert sorted([e.answer(0), e.answer(1)]) == [-errno.EIO, -errno.EIO]


def test_close_ends_what_is_suspended(engine):
    events = []

    class T:
        async def read(self, req):
            try:
                await pytarget.sleep(1)
            finally:
                events.append("closed")

        async def write(self, req):
            try:
                await pytarget.sleep(1)
            finally:
                raise ValueError("on the way out")

    e = engine(T)
    e.submit(0, READ)
    e.submit(1, WRITE)
    e.go()
    e.close()
    assert events == ["closed"]
    assert e.errors == [("write", "ValueError", "on the way out")]


# ---- creation ----


def test_what_create_refuses():
    with pytest.raises(TypeError):
        pytarget.create(Memory())
    with pytest.raises(AttributeError, match="flush"):
        pytarget.create(Memory(), on_error=print, operations=["flush"])
    with pytest.raises(ValueError):
        pytarget.create(Memory(), on_error=print, operations=["read"], block_size=0)


def test_destroy_drops_the_target():
    target = Memory()
    before = sys.getrefcount(target)
    address = pytarget.create(target, on_error=print, operations=["read"])
    assert sys.getrefcount(target) > before
    pytarget.destroy(address)
    assert sys.getrefcount(target) == before


# ---- leaks ----


class Everything(Memory):
    """Every path that makes and drops objects."""

    def __init__(self):
        super().__init__()
        self.last = None

    def read(self, req):
        which = req.offset // BLOCK % 8
        if which == 0:
            req.copy_from(self.data, 0)
        elif which == 1:
            req.buffer[:4] = b"abcd"
        elif which == 2:
            self.last = req
        elif which == 3:
            self.last = req.buffer
        elif which == 4:
            raise ValueError(req)
        elif which == 5:
            raise OSError(errno.EROFS, "no")
        elif which == 6:
            req.pread_async(0)
        else:
            return self.wait(req)
        return None

    async def wait(self, req):
        await pytarget.sleep(0)
        if req.tag % 3 == 0:
            await Foreign()
        if req.tag % 3 == 1:
            raise ValueError(req)


@pytest.mark.parametrize("target", [Everything, BatchMemory])
def test_a_hundred_thousand_requests_leave_nothing_behind(engine, target):
    depth = 32
    e = engine(target, depth=depth)

    def run(requests):
        for n in range(requests // depth):
            for tag in range(depth):
                e.submit(tag, READ, offset=(tag + n) % 16 * BLOCK, length=512 << tag % 3)
            e.go()
            while e.run_io():
                pass
            e.errors.clear()

    run(20_000)
    gc.collect()
    blocks, objects, resident = sys.getallocatedblocks(), len(gc.get_objects()), _resident_kib()
    run(10_000 if SANITIZED else 100_000)
    gc.collect()
    assert sys.getallocatedblocks() - blocks < 500
    assert len(gc.get_objects()) - objects < 50
    if not SANITIZED:
        assert _resident_kib() - resident < 2048


def _resident_kib():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") // 1024


@pytest.mark.skipif(bool(SANITIZED), reason="this is that run")
def test_all_of_this_under_the_sanitizers(tmp_path):
    """Builds the module with ASan and UBSan and runs this file on it."""
    runtime = _library("libasan.so")
    if not os.path.isabs(runtime):
        pytest.skip("gcc has no address sanitizer here")
    module = tmp_path / "_pytarget.so"
    subprocess.run(
        [
            *("gcc", "-std=gnu11", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wno-missing-field-initializers"),
            *("-Werror", *SANITIZE, f"-I{sysconfig.get_paths()['include']}", f"-I{ENGINE_DIR}"),
            *(ENGINE_DIR / "target_python.c", "-o", module),
        ],
        check=True,
    )
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={
            **os.environ,
            "UBLKD_TEST_PYTARGET": str(module),
            "LD_PRELOAD": f"{runtime} {_library('libubsan.so')}",
            "PYTHONMALLOC": "malloc",
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-5000:]


def _library(name):
    return subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
