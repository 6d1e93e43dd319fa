# SPDX-License-Identifier: Apache-2.0
"""The statistics segment: made by Segment, filled here as an engine would, read by the reader."""

import os
import pathlib
import struct

import pytest

from ublkd.errors import UblkdError
from ublkd.shm import layout, reader
from ublkd.shm.segment import Segment

DEV_ID = 900_000_000 + os.getpid()  # no device has such a number


@pytest.fixture
def segment():
    made = Segment(DEV_ID, 2, 64, 1 << 30)
    yield made
    made.unlink()
    made.buf.release()


def put(segment, queue, word, value):
    offset = layout.HEADER_BYTES + queue * layout.SLOT_BYTES + layout.QUEUE_WORDS.index(word) * 8
    struct.pack_into("<Q", segment.buf, offset, value)


def put_counters(segment, queue, op, ios, nbytes, errors, lat_ns, buckets):
    base = layout.HEADER_BYTES + queue * layout.SLOT_BYTES
    base += (layout.QUEUE_HEAD_WORDS + layout.OPS.index(op) * layout.COUNTER_WORDS) * 8
    struct.pack_into("<4Q", segment.buf, base, ios, nbytes, errors, lat_ns)
    for bucket, count in buckets.items():
        struct.pack_into("<Q", segment.buf, base + 32 + bucket * 8, count)


def test_fresh_segment(segment):
    assert os.stat(segment.path).st_size == layout.segment_bytes(2)
    assert os.stat(segment.path).st_blocks * 512 >= layout.segment_bytes(2), "a page of it is not there yet"
    assert os.stat(segment.path).st_mode & 0o777 == 0o644
    snap = reader.snapshot(DEV_ID)
    assert (snap["id"], snap["size"], snap["depth"], len(snap["queues"])) == (DEV_ID, 1 << 30, 64, 2)
    for queue, slot in enumerate(snap["queues"]):
        assert (slot["queue"], slot["worker"]) == (queue, 0)
        assert slot["in_flight"] == 0
        assert slot["ops"] == {op: reader.zero() for op in layout.OPS}


def test_counters_come_back(segment):
    put(segment, 1, "pid", 4711)
    put(segment, 1, "started", 12)
    put(segment, 1, "completed", 9)
    put(segment, 1, "retries", 3)
    put_counters(segment, 1, "write", 9, 9 * 4096, 1, 90_000, {0: 4, 17: 4, 103: 1})
    put_counters(segment, 0, "write", 1, 512, 0, 100, {0: 1})
    snap = reader.snapshot(DEV_ID)
    one = snap["queues"][1]
    assert (one["pid"], one["in_flight"], one["retries"], one["fua"]) == (4711, 3, 3, 0)
    write = one["ops"]["write"]
    assert (write["ios"], write["bytes"], write["errors"], write["lat_ns"]) == (9, 9 * 4096, 1, 90_000)
    assert {i: n for i, n in enumerate(write["hist"]) if n} == {0: 4, 17: 4, 103: 1}
    assert one["ops"]["read"] == reader.zero()
    total = reader.total(snap)["write"]
    assert (total["ios"], total["bytes"], total["hist"][0]) == (10, 9 * 4096 + 512, 5)


def test_delta(segment):
    put(segment, 0, "passes", 100)
    put_counters(segment, 0, "read", 10, 10 * 512, 0, 1000, {5: 10})
    old = reader.snapshot(DEV_ID)
    put(segment, 0, "passes", 130)
    put_counters(segment, 0, "read", 15, 15 * 512, 2, 1700, {5: 11, 6: 4})
    new = reader.snapshot(DEV_ID)
    change = reader.delta(new, old)
    assert change["seconds"] > 0
    assert change["queues"][0]["passes"] == 30
    read = change["queues"][0]["ops"]["read"]
    assert (read["ios"], read["bytes"], read["errors"], read["lat_ns"]) == (5, 5 * 512, 2, 700)
    assert (read["hist"][5], read["hist"][6], sum(read["hist"])) == (1, 4, 5)


def test_read_between_start_and_completion_is_never_negative(segment):
    put(segment, 0, "started", 7)
    put(segment, 0, "completed", 8)
    assert reader.snapshot(DEV_ID)["queues"][0]["in_flight"] == 0


def test_resize(segment):
    segment.set_dev_bytes(5 << 20)
    assert segment.dev_bytes() == 5 << 20
    assert reader.snapshot(DEV_ID)["size"] == 5 << 20


def test_second_segment_of_a_number_replaces_what_was_left(segment):
    put(segment, 0, "started", 7)
    again = Segment(DEV_ID, 1, 8, 4096)
    try:
        snap = reader.snapshot(DEV_ID)
        assert len(snap["queues"]) == 1
        assert snap["queues"][0]["started"] == 0
    finally:
        again.unlink()
        again.unlink()  # a second time does no harm
        again.buf.release()


def test_workers_that_share_queues():
    made = Segment(DEV_ID, 2, 64, 4096, shares=3)
    try:
        put(made, 4, "pid", 11)
        snap = reader.snapshot(DEV_ID)
        assert snap["workers_per_queue"] == 3
        names = [(slot["queue"], slot["worker"]) for slot in snap["queues"]]
        assert names == [(q, w) for q in (0, 1) for w in range(3)]
        assert [slot["pid"] for slot in snap["queues"]] == [0, 0, 0, 0, 11, 0]
        # as many counters, but of other workers
        again = Segment(DEV_ID, 3, 64, 4096, shares=2, go_on=True)
        assert reader.snapshot(DEV_ID)["queues"][4]["pid"] == 0
        put(again, 4, "pid", 12)
        more = Segment(DEV_ID, 3, 64, 4096, shares=2, go_on=True)
        assert reader.snapshot(DEV_ID)["queues"][4]["pid"] == 12
        more.buf.release()
        again.buf.release()
    finally:
        made.unlink()
        made.buf.release()


def test_segment_of_a_version_without_shares(segment):
    struct.pack_into("<I", segment.buf, struct.calcsize("<Q6I3Q"), 0)
    assert [(slot["queue"], slot["worker"]) for slot in reader.snapshot(DEV_ID)["queues"]] == [(0, 0), (1, 0)]


def header(version):
    return struct.pack(layout.HEADER_FORMAT, layout.MAGIC, version, 4096, layout.SLOT_BYTES, 1, *[0] * 7)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"\0" * 8192,
        os.urandom(layout.segment_bytes(1)),
        header(layout.VERSION + 1),
        header(layout.VERSION),  # and no slot behind it
    ],
)
def test_no_counters_of_ours(content):
    path = pathlib.Path(f"/dev/shm/{layout.name_of(DEV_ID)}")
    path.write_bytes(content)
    try:
        with pytest.raises(UblkdError) as e:
            reader.snapshot(DEV_ID)
        assert str(path) in e.value.message
        assert e.value.hint
    finally:
        path.unlink()


def test_no_segment():
    with pytest.raises(UblkdError, match="has no counters"):
        reader.snapshot(DEV_ID)


def test_percentiles():
    assert reader.percentile([0] * layout.HIST_BUCKETS, 99) == 0.0
    hist = [0] * layout.HIST_BUCKETS
    hist[10] = 100
    low, high = layout.bucket_bounds(10)
    assert reader.percentile(hist, 50) == pytest.approx((low + high) / 2)
    assert low <= reader.percentile(hist, 1) < reader.percentile(hist, 99) <= high
    hist[40] = 1
    slow, _ = layout.bucket_bounds(40)
    assert reader.percentile(hist, 99) <= high
    assert reader.percentile(hist, 99.9) >= slow
    values = [reader.percentile(hist, p / 10) for p in range(1001)]
    assert values == sorted(values)
