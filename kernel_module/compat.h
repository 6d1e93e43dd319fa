/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What differs between the kernels that we build for. The switches come from
 * conftest.sh; releases are named as documentation only.
 */
#ifndef UBLKD_COMPAT_H
#define UBLKD_COMPAT_H

#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/uio.h>

#include "conftest.h"

/* Before 6.6 the commands of io_uring had no header of their own. */
#ifdef UBLK_HAVE_URING_CMD_HEADER
#include <linux/io_uring/cmd.h>
#else
#include <linux/io_uring.h>
#endif

/*
 * The payload: 6.1 points to it, later kernels to the entry, 7.x checks its
 * type. It is memory that user space can write: read each field once.
 */
static inline const void *ublk_uring_payload(struct io_uring_cmd *cmd)
{
#if defined(UBLK_HAVE_URING_SQE_CMD)
	return io_uring_sqe_cmd(cmd->sqe);
#elif defined(UBLK_HAVE_URING_SQE_CMD_TYPED)
	return (const void *)cmd->sqe->cmd;
#else
	return cmd->cmd;
#endif
}

/* Since 6.7 io_uring tells when the task or ring of a pending command goes away. */
#ifdef UBLK_HAVE_URING_CANCELABLE
#define UBLK_URING_CANCELS	true

static inline bool ublk_uring_is_cancel(unsigned int issue_flags)
{
	return issue_flags & IO_URING_F_CANCEL;
}

static inline void ublk_uring_mark_cancelable(struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	io_uring_cmd_mark_cancelable(cmd, issue_flags);
}
#else
#define UBLK_URING_CANCELS	false

static inline bool ublk_uring_is_cancel(unsigned int issue_flags)
{
	return false;
}

static inline void ublk_uring_mark_cancelable(struct io_uring_cmd *cmd, unsigned int issue_flags)
{
}
#endif

/* Since 6.18 or so a command's second result is gone from all but the big form. */
static inline void ublk_uring_done(struct io_uring_cmd *cmd, int res, unsigned int issue_flags)
{
#ifdef UBLK_HAVE_URING_DONE_32
	io_uring_cmd_done(cmd, res, issue_flags);
#else
	io_uring_cmd_done(cmd, res, 0, issue_flags);
#endif
}

/* What user space gave beside the payload, with UBLK_F_AUTO_BUF_REG and UBLK_F_BATCH_IO: of 6.15 and later. */
static inline u64 ublk_uring_addr(struct io_uring_cmd *cmd)
{
#if defined(UBLK_HAVE_URING_BVEC) || defined(UBLK_HAVE_URING_MULTISHOT)
	return READ_ONCE(cmd->sqe->addr);
#else
	return 0;
#endif
}

/* 6.19 changed what a callback in the submitter's task is given. */
#ifdef UBLK_HAVE_URING_TW_REQ
#define UBLK_TASK_CALLBACK(name)						\
	static void name##_on(struct io_uring_cmd *cmd, unsigned int issue_flags);	\
	static void name(struct io_tw_req tw_req, io_tw_token_t tw)		\
	{									\
		name##_on(io_uring_cmd_from_tw(tw_req), IO_URING_CMD_TASK_WORK_ISSUE_FLAGS);	\
	}									\
	static void name##_on(struct io_uring_cmd *cmd, unsigned int issue_flags)
#else
#define UBLK_TASK_CALLBACK(name)						\
	static void name(struct io_uring_cmd *cmd, unsigned int issue_flags)
#endif

/* 6.1 has only the vector form of an iterator over user memory; the vector must live as long. */
struct ublk_user_iter {
	struct iov_iter iter;
	struct iovec vec;
};

static inline int ublk_user_iter_init(struct ublk_user_iter *user, int dir, u64 addr, size_t len)
{
#ifdef UBLK_HAVE_IMPORT_UBUF
	return import_ubuf(dir, u64_to_user_ptr(addr), len, &user->iter);
#else
	return import_single_range(dir, u64_to_user_ptr(addr), len, &user->vec, &user->iter);
#endif
}

/* 6.14 made merging the default and dropped the flag. */
#ifdef UBLK_HAVE_SHOULD_MERGE
#define UBLK_TAG_SET_FLAGS	BLK_MQ_F_SHOULD_MERGE
#else
#define UBLK_TAG_SET_FLAGS	0
#endif

/* Before 6.3 the flags of a mapping were changed in place. */
static inline void ublk_vma_never_writable(struct vm_area_struct *vma)
{
#ifdef UBLK_HAVE_VM_FLAGS_CLEAR
	vm_flags_clear(vma, VM_MAYWRITE);
#else
	vma->vm_flags &= ~VM_MAYWRITE;
#endif
}

/* Limits since 6.11, setters in 6.1; what lies between is not offered zoned devices. */
#if defined(UBLK_HAVE_ZONED_LIMITS) || defined(UBLK_HAVE_ZONED_SETTERS)
#define UBLK_HAVE_ZONED		1

static inline int ublk_revalidate_disk_zones(struct gendisk *disk)
{
#ifdef UBLK_HAVE_ZONED_LIMITS
	return blk_revalidate_disk_zones(disk);
#else
	return blk_revalidate_disk_zones(disk, NULL);
#endif
}

/* What a report of zones hands on: 6.19 or so put it into a structure of the block layer's own. */
struct ublk_zone_args {
#ifdef UBLK_HAVE_REPORT_ZONES_ARGS
	struct blk_report_zones_args *core;
#else
	report_zones_cb fn;
	void *data;
#endif
};

/* 6.16 dropped the queue, which the request knows. */
static inline int ublk_rq_map_kern(struct request *req, void *data, unsigned int bytes, gfp_t gfp)
{
#ifdef UBLK_HAVE_RQ_MAP_KERN_QUEUE
	return blk_rq_map_kern(req->q, req, data, bytes, gfp);
#else
	return blk_rq_map_kern(req, data, bytes, gfp);
#endif
}
#endif

/* 6.3 replaced the user namespace of a mount by its own kind of map. */
static inline int ublk_inode_permission(struct inode *inode, int mask)
{
#ifdef UBLK_HAVE_MNT_IDMAP
	return inode_permission(&nop_mnt_idmap, inode, mask);
#else
	return inode_permission(&init_user_ns, inode, mask);
#endif
}

#endif
