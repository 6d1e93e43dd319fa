# SPDX-License-Identifier: Apache-2.0
"""Offsets of the statistics segment: engine/layout.h in Python. A test compares the two."""

MAGIC = 0x3154415453424B55
VERSION = 1
HEADER_BYTES = 4096

# struct ublkd_shm_header: magic, version, header_bytes, slot_bytes, nr_slots, dev_id, depth,
# supervisor_pid, start_ns, dev_bytes, shares, reserved
HEADER_FORMAT = "<Q6I3Q2I"
SUPERVISOR_PID_OFFSET = 32
DEV_BYTES_OFFSET = 48

OPS = ("read", "write", "flush", "discard", "write_zeroes", "other")
HIST_BUCKETS = 104

# struct ublkd_shm_queue, before its counters
QUEUE_WORDS = (
    "pid",
    "heartbeat_ns",
    "passes",
    "started",
    "completed",
    "fua",
    "python_entries",
    "run_returns",
    "retries",
    "stage",
    "polled",
)
# enum ublkd_shm_stage
STAGE_WAITING, STAGE_ENGINE, STAGE_PYTHON = range(3)
QUEUE_HEAD_WORDS = 16
COUNTER_WORDS = 4 + HIST_BUCKETS
SLOT_WORDS = QUEUE_HEAD_WORDS + len(OPS) * COUNTER_WORDS
SLOT_BYTES = SLOT_WORDS * 8


def segment_bytes(slots: int) -> int:
    """Size of the segment of a device with that many workers."""
    return HEADER_BYTES + slots * SLOT_BYTES


def name_of(dev_id: int) -> str:
    """Name of a device's segment: a file below /dev/shm."""
    return f"ublkd-{dev_id}"


def bucket_bounds(index: int) -> tuple[int, int]:
    """The latencies [low, high) in ns that histogram bucket index counts; layout.h has the rule."""
    if index == 0:
        return 0, 1024
    e, quarter = divmod(index - 1, 4)
    base = 1 << (e + 10)
    return base + quarter * base // 4, base + (quarter + 1) * base // 4
