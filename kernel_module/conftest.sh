#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
#
# Which of the interfaces that changed over time has the kernel we build for?
# Distributions backport, so nothing here looks at a version: each feature is a
# few lines that compile or don't, with the compiler and flags of the kernel.
#
#   conftest.sh OUTPUT COMPILER FLAG...

output=$1
shift
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

# check NAME COMPILER FLAG... <C
check() {
	name=$1
	shift
	{
		printf '#include <linux/module.h>\n'
		cat
	} >"$work/$name.c"
	if "$@" -Werror=implicit-function-declaration -Werror=incompatible-pointer-types \
		-Werror=int-conversion -Wno-unused -Wno-missing-prototypes -Wno-missing-declarations \
		-fsyntax-only "$work/$name.c" >"$work/$name.log" 2>&1; then
		printf '#define UBLK_HAVE_%s 1\n' "$name"
	else
		printf '/* no %s */\n' "$name"
	fi
}

all() {
	check NOTHING "$@" <<'C'
C
	check URING_CMD_HEADER "$@" <<'C'
#include <linux/io_uring/cmd.h>
C
	check URING_SQE_CMD "$@" <<'C'
#include <linux/io_uring/cmd.h>
const void *f(struct io_uring_cmd *c) { return io_uring_sqe_cmd(c->sqe); }
C
	check URING_SQE_CMD_TYPED "$@" <<'C'
#include <linux/io_uring/cmd.h>
const struct io_uring_sqe *f(struct io_uring_cmd *c) { return io_uring_sqe_cmd(c->sqe, struct io_uring_sqe); }
C
	check URING_CANCELABLE "$@" <<'C'
#include <linux/io_uring/cmd.h>
void f(struct io_uring_cmd *c) { io_uring_cmd_mark_cancelable(c, IO_URING_F_CANCEL); }
C
	check URING_TW_REQ "$@" <<'C'
#include <linux/io_uring/cmd.h>
static void cb(struct io_tw_req r, io_tw_token_t t) { }
void f(struct io_uring_cmd *c) { io_uring_cmd_complete_in_task(c, cb); }
C
	check URING_DONE_32 "$@" <<'C'
#include <linux/io_uring/cmd.h>
void f(struct io_uring_cmd *c) { io_uring_cmd_done(c, 0, 0u); }
C
	check URING_BVEC "$@" <<'C'
#include <linux/io_uring/cmd.h>
static void r(void *p) { }
int f(struct io_uring_cmd *c, struct request *q)
{
	return io_uring_cmd_ctx_handle(c) ? io_buffer_register_bvec(c, q, r, 0u, 0u) : io_buffer_unregister_bvec(c, 0u, 0u);
}
C
	check URING_MULTISHOT "$@" <<'C'
#include <linux/io_uring/cmd.h>
bool f(struct io_uring_cmd *c, size_t *n)
{
	struct io_br_sel s = io_uring_cmd_buffer_select(c, 0u, n, 0u);

	return s.addr && (c->flags & IORING_URING_CMD_MULTISHOT) && io_uring_mshot_cmd_post_cqe(c, &s, 0u);
}
C
	check IMPORT_UBUF "$@" <<'C'
#include <linux/uio.h>
int f(void __user *p, struct iov_iter *i) { return import_ubuf(ITER_DEST, p, 1, i); }
C
	check ALLOC_DISK_LIMITS "$@" <<'C'
#include <linux/blk-mq.h>
void *f(struct blk_mq_tag_set *s, struct queue_limits *l) { return blk_mq_alloc_disk(s, l, NULL); }
C
	check LIMIT_FEATURES "$@" <<'C'
#include <linux/blkdev.h>
void f(struct queue_limits *l) { l->features |= BLK_FEAT_WRITE_CACHE | BLK_FEAT_FUA; }
C
	check SHOULD_MERGE "$@" <<'C'
#include <linux/blk-mq.h>
int f(void) { return BLK_MQ_F_SHOULD_MERGE; }
C
	check ZONED_LIMITS "$@" <<'C'
#include <linux/blkdev.h>
#ifndef CONFIG_BLK_DEV_ZONED
#error no zoned devices
#endif
int f(struct gendisk *d, struct queue_limits *l)
{
	l->features |= BLK_FEAT_ZONED;
	l->max_open_zones = 1;
	return blk_revalidate_disk_zones(d);
}
C
	check ZONED_SETTERS "$@" <<'C'
#include <linux/blkdev.h>
#ifndef CONFIG_BLK_DEV_ZONED
#error no zoned devices
#endif
int f(struct gendisk *d)
{
	disk_set_zoned(d, BLK_ZONED_HM);
	blk_queue_required_elevator_features(d->queue, ELEVATOR_F_ZBD_SEQ_WRITE);
	return blk_revalidate_disk_zones(d, NULL);
}
C
	check HW_ZONE_APPEND "$@" <<'C'
#include <linux/blkdev.h>
void f(struct queue_limits *l) { l->max_hw_zone_append_sectors = 1; }
C
	check REPORT_ZONES_ARGS "$@" <<'C'
#include <linux/blkdev.h>
int f(struct gendisk *d, struct blk_zone *z, struct blk_report_zones_args *a) { return disk_report_zone(d, z, 0, a); }
C
	check RQ_MAP_KERN_QUEUE "$@" <<'C'
#include <linux/blk-mq.h>
int f(struct request *r, void *p) { return blk_rq_map_kern(r->q, r, p, 1, GFP_KERNEL); }
C
	check OPEN_DISK "$@" <<'C'
#include <linux/blkdev.h>
static int o(struct gendisk *d, blk_mode_t m) { return 0; }
struct block_device_operations ops = { .open = o };
C
	check VM_FLAGS_CLEAR "$@" <<'C'
#include <linux/mm.h>
void f(struct vm_area_struct *v) { vm_flags_clear(v, VM_MAYWRITE); }
C
	check MNT_IDMAP "$@" <<'C'
#include <linux/fs.h>
int f(struct inode *i) { return inode_permission(&nop_mnt_idmap, i, 0); }
C
}

all "$@" >"$work/out"
if ! grep -q 'UBLK_HAVE_NOTHING' "$work/out"; then
	echo "conftest.sh: not even an empty file compiles:" >&2
	head -20 "$work/NOTHING.log" >&2
	exit 1
fi
{
	printf '/* SPDX-License-Identifier: GPL-2.0-only */\n/* Made by conftest.sh for this kernel. */\n'
	grep -v NOTHING "$work/out"
} >"$output.new" && mv "$output.new" "$output"
