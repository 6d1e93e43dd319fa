# SPDX-License-Identifier: Apache-2.0
"""shm/layout.py against engine/layout.h and engine/stats.h, by way of a C compiler."""

import ctypes
import pathlib
import shutil
import struct
import subprocess

import pytest

from ublkd.shm import layout

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENGINE = ROOT / "daemon" / "ublkd" / "engine"

HEADER_FIELDS = (
    "magic",
    "version",
    "header_bytes",
    "slot_bytes",
    "nr_slots",
    "dev_id",
    "depth",
    "supervisor_pid",
    "start_ns",
    "dev_bytes",
    "shares",
    "reserved",
)

SOURCE = """
#include <stddef.h>
#include "layout.h"
#include "stats.h"

uint64_t constant(int i)
{
	static const uint64_t values[] = {
		UBLKD_SHM_MAGIC, UBLKD_SHM_VERSION, UBLKD_SHM_HEADER_BYTES, UBLKD_SHM_HIST_BUCKETS, UBLKD_SHM_NR_OPS,
		sizeof(struct ublkd_shm_header), sizeof(struct ublkd_shm_queue), sizeof(struct ublkd_shm_counters),
		offsetof(struct ublkd_shm_queue, op), offsetof(struct ublkd_shm_counters, hist),
	};

	return values[i];
}

unsigned bucket(uint64_t ns)
{
	return ublkd_stat_bucket(ns);
}
"""


@pytest.fixture(scope="session")
def clib(tmp_path_factory):
    cc = shutil.which("cc") or shutil.which("gcc")
    if cc is None:
        pytest.skip("no C compiler")
    where = tmp_path_factory.mktemp("layout")
    offsets = [
        f"size_t header_{name}(void) {{ return offsetof(struct ublkd_shm_header, {name}); }}"
        for name in HEADER_FIELDS
    ]
    offsets += [
        f"size_t queue_{name}(void) {{ return offsetof(struct ublkd_shm_queue, {name}); }}"
        for name in layout.QUEUE_WORDS
    ]
    offsets += [
        f"size_t counters_{name}(void) {{ return offsetof(struct ublkd_shm_counters, {name}); }}"
        for name in ("ios", "bytes", "errors", "lat_ns", "hist")
    ]
    offsets += [f"size_t op_{name}(void) {{ return UBLKD_SHM_{name.upper()}; }}" for name in layout.OPS]
    (where / "layout.c").write_text(SOURCE + "\n".join(offsets) + "\n")
    out = where / "layout.so"
    flags = ["-std=gnu11", "-shared", "-fPIC", f"-I{ENGINE}"]
    subprocess.run([cc, *flags, "-o", str(out), str(where / "layout.c")], check=True)
    lib = ctypes.CDLL(str(out))
    lib.constant.restype = ctypes.c_uint64
    lib.bucket.argtypes = [ctypes.c_uint64]
    return lib


def test_constants(clib):
    constants = [clib.constant(i) for i in range(10)]
    assert constants == [
        layout.MAGIC,
        layout.VERSION,
        layout.HEADER_BYTES,
        layout.HIST_BUCKETS,
        len(layout.OPS),
        struct.calcsize(layout.HEADER_FORMAT),
        layout.SLOT_BYTES,
        layout.COUNTER_WORDS * 8,
        layout.QUEUE_HEAD_WORDS * 8,
        4 * 8,
    ]


def test_header_fields_are_where_the_format_has_them(clib):
    codes = []
    for part in ("Q", "I" * 6, "Q" * 3, "I" * 2):
        codes += list(part)
    assert layout.HEADER_FORMAT == "<Q6I3Q2I"
    offset = 0
    for name, code in zip(HEADER_FIELDS, codes, strict=True):
        assert getattr(clib, f"header_{name}")() == offset, name
        offset += struct.calcsize(code)
    assert clib.header_dev_bytes() == layout.DEV_BYTES_OFFSET


def test_queue_words_in_order(clib):
    for i, name in enumerate(layout.QUEUE_WORDS):
        assert getattr(clib, f"queue_{name}")() == i * 8, name


def test_operations_and_counters_in_order(clib):
    for i, name in enumerate(layout.OPS):
        assert getattr(clib, f"op_{name}")() == i, name
    for i, name in enumerate(("ios", "bytes", "errors", "lat_ns", "hist")):
        assert getattr(clib, f"counters_{name}")() == i * 8, name


def test_bucket_bounds_agree(clib):
    last = layout.HIST_BUCKETS - 1
    end = 0
    for i in range(layout.HIST_BUCKETS):
        low, high = layout.bucket_bounds(i)
        assert low == end, "buckets follow each other without a gap"
        end = high
        assert clib.bucket(low) == i
        assert clib.bucket(high - 1) == i
        assert clib.bucket((low + high) // 2) == i
    for ns in (end, end * 2, 2**64 - 1):
        assert clib.bucket(ns) == last


def test_segment_bytes():
    assert layout.segment_bytes(1) == layout.HEADER_BYTES + layout.SLOT_BYTES
    assert layout.segment_bytes(4) - layout.segment_bytes(3) == layout.SLOT_BYTES
    assert layout.SLOT_BYTES % 64 == 0
