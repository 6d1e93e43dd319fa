# SPDX-License-Identifier: Apache-2.0
"""The judge of kernel logs."""

from __future__ import annotations

import pytest

from vm import dmesg

SPLATS = [
    "WARNING: CPU: 1 PID: 77 at block/blk-mq.c:300 blk_mq_unquiesce_queue+0x4a/0x50",
    "WARNING: block/blk-mq.c:300 at blk_mq_unquiesce_queue+0x4a/0x50, CPU#1: fio/77",
    "WARNING: possible circular locking dependency detected",
    "BUG: kernel NULL pointer dereference, address: 0000000000000010",
    "BUG: sleeping function called from invalid context at mm/slab.h:300",
    "kernel BUG at drivers/block/ublk_drv.c:900!",
    "Oops: 0000 [#1] PREEMPT SMP",
    "Oops: general protection fault, probably for non-canonical address 0xdead: 0000 [#1]",
    "INFO: task fio:77 blocked for more than 120 seconds.",
    "BUG: KASAN: slab-use-after-free in ublk_ch_release+0x10/0x20",
    "UBSAN: array-index-out-of-bounds in drivers/block/ublk_drv.c:12:3",
    "watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [fio:77]",
    "rcu: INFO: rcu_preempt self-detected stall on CPU",
    "refcount_t: underflow; use-after-free.",
    "list_del corruption. prev->next should be ffff",
    "[ BUG: Invalid wait context ]",
    "BUG kmalloc-64 (Tainted: G           OE     ): Poison overwritten",
    "ODEBUG: free active (active state 0) object: ffff object type: timer_list hint: nothing+0x0/0x10 [bugs]",
]

CLEAN = [
    "Spectre V2 : WARNING: Unprivileged eBPF is enabled with eIBRS on, data leaks possible!",
    "UBSAN: array-index-out-of-bounds in /build/linux-7.2.12/io_uring/rsrc.c:1070:12",
    "block ublkb0: the capability attribute has been deprecated.",
    "I/O error, dev ublkb0, sector 0 op 0x0:(READ) flags 0x0 phys_seg 1 prio class 0",
    "kmemleak: Kernel memory leak detector initialized (mem pool available: 15681)",
    "ODEBUG: selftest passed",
    "ima: No TPM chip found, activating TPM-bypass!",
    "EXT4-fs warning (device ublkb0): ext4_end_bio:343: I/O error 10 writing to inode 12",
]


@pytest.mark.parametrize("text", SPLATS)
@pytest.mark.parametrize("prefix", ["", "[   12.345678] ", "<4>[   12.345678] ", "[   12.345678][  T77] "])
def test_kernel_bug_is_found(prefix: str, text: str) -> None:
    assert dmesg.find_splats([prefix + text]) == [prefix + text]


@pytest.mark.parametrize("text", CLEAN)
def test_ordinary_line_is_clean(text: str) -> None:
    assert dmesg.find_splats([f"[    1.000000] {text}"]) == []


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("io_uring/io_uring.h:137 io_get_cqe_overflow", "Workqueue: iou_exit io_ring_exit_work"),
        ("block/fops.c:496 blkdev_map_blocks", " blkdev_writepages+0x55/0x70"),
        ("fs/iomap/buffered-io.c:1889 iomap_writepages", " blkdev_writepages+0x55/0x70"),
    ],
)
def test_a_warning_of_the_kernel_s_own_is_harmless_only_in_its_place(where: str, reason: str) -> None:
    warning = f"WARNING: CPU: 1 PID: 37 at {where}+0x375/0x3e0"
    trace = [warning, "Modules linked in: ublkd_drv(O)", reason, "Call Trace:"]
    assert dmesg.find_splats(trace) == dmesg.excerpt(trace) == []
    assert dmesg.find_splats([*trace, warning, "Call Trace:"]) == [warning]


def test_records_become_dmesg_lines() -> None:
    raw = "6,339,5140900,-;NET: up\n SUBSYSTEM=net\n4,340,12000001,c;a\\x0ab\\x09c\n6,341,13"
    assert dmesg.format_records(raw) == ["[    5.140900] NET: up", "[   12.000001] a", "[   12.000001] b\tc"]


def test_excerpt_shows_the_first_trace_and_every_later_splat() -> None:
    lines = [
        "fine",
        "WARNING: CPU: 0 PID: 1 at a.c:1",
        "Call Trace:",
        "[    1.0] RAX: 0000",
        "x",
        "BUG: again",
    ]
    assert dmesg.excerpt(lines, after=3) == [lines[1], lines[2], lines[5]]
    assert dmesg.excerpt(["fine"]) == []


def test_idle_cpus_are_left_out_of_backtraces() -> None:
    lines = ["sysrq: Show backtrace"]
    lines += ["NMI backtrace for cpu 0", "CPU: 0 PID: 0 Comm: swapper/0 Not tainted", " idle"]
    lines += ["NMI backtrace for cpu 1", "CPU: 1 PID: 9 Comm: fio Not tainted", " busy"]
    assert dmesg.without_idle_cpus(lines) == [lines[0], *lines[4:]]


def test_a_trace_keeps_the_place_and_loses_the_registers() -> None:
    place = "[    1.000000] RIP: 0010:ublk_queue_rq+0x1c1/0x7d0 [ublk_drv]"
    lines = [place, "[    1.000000] RIP: 0033:0x7f0000000000", "[    1.000000] RAX: 0000 RBX: 0000 RCX: 0000"]
    assert dmesg.without_registers(lines) == [place]
