/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note OR MIT */
/*
 * The ublk interface: what /dev/ublk-control and /dev/ublkcN understand.
 *
 * One header for both sides, driver and server. Names and layouts are those of
 * mainline Linux, up to and including 7.2, so that programs written against the
 * kernel's own header compile against this one. A driver may know less than is
 * declared here: ask it (UBLK_U_CMD_GET_FEATURES) instead of guessing.
 *
 * Users of the UBLK_U_* opcodes include <linux/ioctl.h> for the encoding macros.
 */
#ifndef UBLK_UAPI_H
#define UBLK_UAPI_H

#include <linux/types.h>

/*
 * Control commands: IORING_OP_URING_CMD on /dev/ublk-control, opcode in
 * sqe->cmd_op, struct ublksrv_ctrl_cmd in the second half of a 128-byte SQE.
 *
 * The bare numbers are what drivers before 6.4 take, and only they; later ones
 * take the encoded form below and may refuse the bare one.
 */
#define UBLK_CMD_GET_QUEUE_AFFINITY	0x01
#define UBLK_CMD_GET_DEV_INFO		0x02
#define UBLK_CMD_ADD_DEV		0x04
#define UBLK_CMD_DEL_DEV		0x05
#define UBLK_CMD_START_DEV		0x06
#define UBLK_CMD_STOP_DEV		0x07
#define UBLK_CMD_SET_PARAMS		0x08
#define UBLK_CMD_GET_PARAMS		0x09
#define UBLK_CMD_START_USER_RECOVERY	0x10
#define UBLK_CMD_END_USER_RECOVERY	0x11
#define UBLK_CMD_GET_DEV_INFO2		0x12

/* data[0]: queue; addr/len: buffer for a CPU mask, whole 64-bit words */
#define UBLK_U_CMD_GET_QUEUE_AFFINITY \
	_IOR('u', UBLK_CMD_GET_QUEUE_AFFINITY, struct ublksrv_ctrl_cmd)
/* addr/len: struct ublksrv_ctrl_dev_info, filled in */
#define UBLK_U_CMD_GET_DEV_INFO \
	_IOR('u', UBLK_CMD_GET_DEV_INFO, struct ublksrv_ctrl_cmd)
/* addr/len: struct ublksrv_ctrl_dev_info, in: the wish, out: what was granted */
#define UBLK_U_CMD_ADD_DEV \
	_IOWR('u', UBLK_CMD_ADD_DEV, struct ublksrv_ctrl_cmd)
/* stops the device if need be; returns once its number is free again */
#define UBLK_U_CMD_DEL_DEV \
	_IOWR('u', UBLK_CMD_DEL_DEV, struct ublksrv_ctrl_cmd)
/* data[0]: pid of the server; returns once every queue is being served */
#define UBLK_U_CMD_START_DEV \
	_IOWR('u', UBLK_CMD_START_DEV, struct ublksrv_ctrl_cmd)
#define UBLK_U_CMD_STOP_DEV \
	_IOWR('u', UBLK_CMD_STOP_DEV, struct ublksrv_ctrl_cmd)
/* addr/len: struct ublk_params; before the start only */
#define UBLK_U_CMD_SET_PARAMS \
	_IOWR('u', UBLK_CMD_SET_PARAMS, struct ublksrv_ctrl_cmd)
/* addr/len: struct ublk_params whose len the caller has filled in */
#define UBLK_U_CMD_GET_PARAMS \
	_IOR('u', UBLK_CMD_GET_PARAMS, struct ublksrv_ctrl_cmd)
/* -EBUSY until the dead server's file and mappings are gone */
#define UBLK_U_CMD_START_USER_RECOVERY \
	_IOWR('u', UBLK_CMD_START_USER_RECOVERY, struct ublksrv_ctrl_cmd)
/* as START_DEV, for the new server */
#define UBLK_U_CMD_END_USER_RECOVERY \
	_IOWR('u', UBLK_CMD_END_USER_RECOVERY, struct ublksrv_ctrl_cmd)
/* as GET_DEV_INFO; the buffer begins with the path of /dev/ublkcN */
#define UBLK_U_CMD_GET_DEV_INFO2 \
	_IOR('u', UBLK_CMD_GET_DEV_INFO2, struct ublksrv_ctrl_cmd)
/* addr/len: 8 bytes for the UBLK_F_* that the driver knows; no device */
#define UBLK_U_CMD_GET_FEATURES		_IOR('u', 0x13, struct ublksrv_ctrl_cmd)
/* as DEL_DEV, without the wait */
#define UBLK_U_CMD_DEL_DEV_ASYNC	_IOR('u', 0x14, struct ublksrv_ctrl_cmd)
/* data[0]: new size in sectors */
#define UBLK_U_CMD_UPDATE_SIZE		_IOWR('u', 0x15, struct ublksrv_ctrl_cmd)
/* data[0]: time-out in milliseconds, 0 for none */
#define UBLK_U_CMD_QUIESCE_DEV		_IOWR('u', 0x16, struct ublksrv_ctrl_cmd)
/* stops a disk that nobody has open, -EBUSY otherwise */
#define UBLK_U_CMD_TRY_STOP_DEV		_IOWR('u', 0x17, struct ublksrv_ctrl_cmd)
/* addr: struct ublk_shmem_buf_reg; the result is the buffer's index */
#define UBLK_U_CMD_REG_BUF		_IOWR('u', 0x18, struct ublksrv_ctrl_cmd)
/* data[0]: index of the buffer */
#define UBLK_U_CMD_UNREG_BUF		_IOWR('u', 0x19, struct ublksrv_ctrl_cmd)

/*
 * Extension of ublkd's own driver (UBLK_F_SHARDS). addr/len: array of struct
 * ublk_queue_state, filled in from queue 0 on; the result is how many.
 */
#define UBLK_U_CMD_GET_QUEUE_STATES	_IOR('u', 0x60, struct ublksrv_ctrl_cmd)

#define UBLK_FEATURES_LEN	8

/*
 * I/O commands: IORING_OP_URING_CMD on /dev/ublkcN with struct ublksrv_io_cmd.
 * FETCH_REQ offers a tag for the first time; COMMIT_AND_FETCH_REQ answers its
 * request and offers it again; NEED_GET_DATA names the buffer for a write
 * whose data has not been copied yet.
 */
#define UBLK_IO_FETCH_REQ		0x20
#define UBLK_IO_COMMIT_AND_FETCH_REQ	0x21
#define UBLK_IO_NEED_GET_DATA		0x22
#define UBLK_IO_REGISTER_IO_BUF		0x23
#define UBLK_IO_UNREGISTER_IO_BUF	0x24

#define UBLK_U_IO_FETCH_REQ \
	_IOWR('u', UBLK_IO_FETCH_REQ, struct ublksrv_io_cmd)
#define UBLK_U_IO_COMMIT_AND_FETCH_REQ \
	_IOWR('u', UBLK_IO_COMMIT_AND_FETCH_REQ, struct ublksrv_io_cmd)
#define UBLK_U_IO_NEED_GET_DATA \
	_IOWR('u', UBLK_IO_NEED_GET_DATA, struct ublksrv_io_cmd)
/* addr: index in the ring's table of registered buffers */
#define UBLK_U_IO_REGISTER_IO_BUF \
	_IOWR('u', UBLK_IO_REGISTER_IO_BUF, struct ublksrv_io_cmd)
#define UBLK_U_IO_UNREGISTER_IO_BUF \
	_IOWR('u', UBLK_IO_UNREGISTER_IO_BUF, struct ublksrv_io_cmd)

/* The same for many tags at once, with struct ublk_batch_io (UBLK_F_BATCH_IO). */
#define UBLK_U_IO_PREP_IO_CMDS		_IOWR('u', 0x25, struct ublk_batch_io)
#define UBLK_U_IO_COMMIT_IO_CMDS	_IOWR('u', 0x26, struct ublk_batch_io)
#define UBLK_U_IO_FETCH_IO_CMDS		_IOWR('u', 0x27, struct ublk_batch_io)

/* Results of an I/O command. After ABORT the tag must not be offered again. */
#define UBLK_IO_RES_OK			0
#define UBLK_IO_RES_NEED_GET_DATA	1
#define UBLK_IO_RES_ABORT		(-ENODEV)

/*
 * Offsets on /dev/ublkcN. mmap: queue q's request descriptors are at
 * UBLKSRV_CMD_BUF_OFFSET plus q times the room of UBLK_MAX_QUEUE_DEPTH of them,
 * rounded up to pages. pread and pwrite (UBLK_F_USER_COPY): request data is at
 * UBLKSRV_IO_BUF_OFFSET plus queue, tag and byte offset in these bit fields.
 */
#define UBLKSRV_CMD_BUF_OFFSET		0
#define UBLKSRV_IO_BUF_OFFSET		0x80000000

#define UBLK_MAX_QUEUE_DEPTH		4096

#define UBLK_IO_BUF_OFF			0
#define UBLK_IO_BUF_BITS		25
#define UBLK_IO_BUF_BITS_MASK		((1ULL << UBLK_IO_BUF_BITS) - 1)

#define UBLK_TAG_OFF			UBLK_IO_BUF_BITS
#define UBLK_TAG_BITS			16
#define UBLK_TAG_BITS_MASK		((1ULL << UBLK_TAG_BITS) - 1)

#define UBLK_QID_OFF			(UBLK_TAG_OFF + UBLK_TAG_BITS)
#define UBLK_QID_BITS			12
#define UBLK_QID_BITS_MASK		((1ULL << UBLK_QID_BITS) - 1)

#define UBLK_MAX_NR_QUEUES		(1U << UBLK_QID_BITS)

#define UBLKSRV_IO_BUF_TOTAL_BITS	(UBLK_QID_OFF + UBLK_QID_BITS)
#define UBLKSRV_IO_BUF_TOTAL_SIZE	(1ULL << UBLKSRV_IO_BUF_TOTAL_BITS)

/* Selects a request's integrity data instead of its data. */
#define UBLK_INTEGRITY_FLAG_OFF		62
#define UBLKSRV_IO_INTEGRITY_FLAG	(1ULL << UBLK_INTEGRITY_FLAG_OFF)

/* Device flags: asked for and granted in ADD_DEV; unknown ones are dropped. */

/* request pages can be put into the server ring's table of registered buffers */
#define UBLK_F_SUPPORT_ZERO_COPY	(1ULL << 0)
/* completions always go through task work; a driver from 6.4 on always says so */
#define UBLK_F_URING_CMD_COMP_IN_TASK	(1ULL << 1)
/* a write's buffer is named after its request was seen */
#define UBLK_F_NEED_GET_DATA		(1ULL << 2)
/* the device outlives its server: new I/O waits for the next one */
#define UBLK_F_USER_RECOVERY		(1ULL << 3)
/* and what the dead server held is given to the next one again */
#define UBLK_F_USER_RECOVERY_REISSUE	(1ULL << 4)
/* made by a user without CAP_SYS_ADMIN, who owns it */
#define UBLK_F_UNPRIVILEGED_DEV		(1ULL << 5)
/* the driver understands UBLK_U_* opcodes */
#define UBLK_F_CMD_IOCTL_ENCODE		(1ULL << 6)
/* the server moves data by pread and pwrite on /dev/ublkcN */
#define UBLK_F_USER_COPY		(1ULL << 7)
#define UBLK_F_ZONED			(1ULL << 8)
/* with USER_RECOVERY: I/O fails, instead of waiting, while there is no server */
#define UBLK_F_USER_RECOVERY_FAIL_IO	(1ULL << 9)
#define UBLK_F_UPDATE_SIZE		(1ULL << 10)
/* registered buffers are set up and torn down by FETCH and COMMIT themselves */
#define UBLK_F_AUTO_BUF_REG		(1ULL << 11)
#define UBLK_F_QUIESCE			(1ULL << 12)
/* each tag, instead of each queue, belongs to the task that fetched it */
#define UBLK_F_PER_IO_DAEMON		(1ULL << 13)
/* any task with the file may register a request's buffer */
#define UBLK_F_BUF_REG_OFF_DAEMON	(1ULL << 14)
#define UBLK_F_BATCH_IO			(1ULL << 15)
/* integrity data beside the data; needs USER_COPY */
#define UBLK_F_INTEGRITY		(1ULL << 16)
/* the driver understands TRY_STOP_DEV */
#define UBLK_F_SAFE_STOP_DEV		(1ULL << 17)
/* the start does not look for partitions; a later rescan still may */
#define UBLK_F_NO_AUTO_PART_SCAN	(1ULL << 18)
/* no copy for direct I/O from memory that client and server share */
#define UBLK_F_SHMEM_ZC			(1ULL << 19)

/*
 * Extension of ublkd's own driver, far from the kernel's bits; needs
 * USER_RECOVERY. Any number of processes may open and map the char device. A
 * queue belongs to the file through which it was fetched. When that file is
 * released, its process having died, this queue alone loses its server:
 * requests are dealt with as USER_RECOVERY says, and the next process that
 * fetches all its tags serves it from that moment on, without a control
 * command. The device as a whole is quiesced once no queue has a server.
 */
#define UBLK_F_SHARDS			(1ULL << 48)

/* device state */
#define UBLK_S_DEV_DEAD		0
#define UBLK_S_DEV_LIVE		1
#define UBLK_S_DEV_QUIESCED	2
#define UBLK_S_DEV_FAIL_IO	3

/* payload of a control command */
struct ublksrv_ctrl_cmd {
	__u32	dev_id;
	__u16	queue_id;	/* 0xffff if the command is not about a queue */
	__u16	len;		/* bytes at addr */
	__u64	addr;
	__u64	data[1];	/* the command's inline argument */
	/*
	 * Unprivileged devices and GET_DEV_INFO2: so many bytes at addr, NUL
	 * included, are the path of /dev/ublkcN; the buffer proper follows.
	 */
	__u16	dev_path_len;
	__u16	pad;
	__u32	reserved;
};

struct ublksrv_ctrl_dev_info {
	__u16	nr_hw_queues;
	__u16	queue_depth;
	__u16	state;		/* UBLK_S_DEV_* */
	__u16	pad0;

	__u32	max_io_buf_bytes;
	__u32	dev_id;

	__s32	ublksrv_pid;	/* the server's, -1 if there is none */
	__u32	pad1;

	__u64	flags;		/* UBLK_F_* */

	__u64	ublksrv_flags;	/* the server's own; the driver only keeps it */

	__u32	owner_uid;	/* who added the device */
	__u32	owner_gid;
	__u64	reserved1;
	__u64	reserved2;
};

/* Block operations: bits 0-7 of ublksrv_io_desc.op_flags. */
#define UBLK_IO_OP_READ			0
#define UBLK_IO_OP_WRITE		1
#define UBLK_IO_OP_FLUSH		2
#define UBLK_IO_OP_DISCARD		3
#define UBLK_IO_OP_WRITE_SAME		4
#define UBLK_IO_OP_WRITE_ZEROES		5
#define UBLK_IO_OP_ZONE_OPEN		10
#define UBLK_IO_OP_ZONE_CLOSE		11
#define UBLK_IO_OP_ZONE_FINISH		12
#define UBLK_IO_OP_ZONE_APPEND		13
#define UBLK_IO_OP_ZONE_RESET_ALL	14
#define UBLK_IO_OP_ZONE_RESET		15
/* answered with an array of struct blk_zone (linux/blkzoned.h) as its data */
#define UBLK_IO_OP_REPORT_ZONES		18

/* Request flags, at their place in op_flags. */
#define UBLK_IO_F_FAILFAST_DEV		(1U << 8)
#define UBLK_IO_F_FAILFAST_TRANSPORT	(1U << 9)
#define UBLK_IO_F_FAILFAST_DRIVER	(1U << 10)
#define UBLK_IO_F_META			(1U << 11)
#define UBLK_IO_F_FUA			(1U << 13)
#define UBLK_IO_F_NOUNMAP		(1U << 15)
#define UBLK_IO_F_SWAP			(1U << 16)
/* automatic registration failed: the server has to register the buffer */
#define UBLK_IO_F_NEED_REG_BUF		(1U << 17)
#define UBLK_IO_F_INTEGRITY		(1U << 18)
/* addr is UBLK_SHMEM_ZC_*: a place in a buffer given to REG_BUF */
#define UBLK_IO_F_SHMEM_ZC		(1U << 19)

/* One request, written by the driver, one per tag, in the mapped memory. */
struct ublksrv_io_desc {
	__u32	op_flags;

	union {
		__u32	nr_sectors;
		__u32	nr_zones;	/* REPORT_ZONES */
	};

	__u64	start_sector;

	__u64	addr;	/* the server's buffer for this tag */
};

static inline __u8 ublksrv_get_op(const struct ublksrv_io_desc *iod)
{
	return iod->op_flags & 0xff;
}

/* Shifted down: UBLK_IO_F_* are masks for op_flags itself, not for this value. */
static inline __u32 ublksrv_get_flags(const struct ublksrv_io_desc *iod)
{
	return iod->op_flags >> 8;
}

/* payload of an I/O command */
struct ublksrv_io_cmd {
	__u16	q_id;
	__u16	tag;
	__s32	result;		/* COMMIT: bytes done or -errno */

	union {
		__u64	addr;	/* the tag's buffer, or an index of a registered one */
		__u64	zone_append_lba;
	};
};

/*
 * What sqe->addr of FETCH and COMMIT holds with UBLK_F_AUTO_BUF_REG:
 * index | flags << 16, the rest zero.
 */
struct ublk_auto_buf_reg {
	__u16	index;
	__u8	flags;
	__u8	reserved0;
	__u32	reserved1;
};

/* if registration fails, deliver the request with UBLK_IO_F_NEED_REG_BUF */
#define UBLK_AUTO_BUF_REG_FALLBACK	(1 << 0)
#define UBLK_AUTO_BUF_REG_F_MASK	UBLK_AUTO_BUF_REG_FALLBACK

static inline __u64 ublk_auto_buf_reg_to_sqe_addr(const struct ublk_auto_buf_reg *reg)
{
	return (__u64)reg->index | (__u64)reg->flags << 16 | (__u64)reg->reserved0 << 24 |
	       (__u64)reg->reserved1 << 32;
}

static inline struct ublk_auto_buf_reg ublk_sqe_addr_to_auto_buf_reg(__u64 sqe_addr)
{
	struct ublk_auto_buf_reg reg = {
		.index = (__u16)sqe_addr,
		.flags = (__u8)(sqe_addr >> 16),
		.reserved0 = (__u8)(sqe_addr >> 24),
		.reserved1 = (__u32)(sqe_addr >> 32),
	};

	return reg;
}

/* Head of one element of PREP_IO_CMDS and COMMIT_IO_CMDS. */
struct ublk_elem_header {
	__u16	tag;
	__u16	buf_index;	/* UBLK_F_AUTO_BUF_REG */
	__s32	result;		/* COMMIT */
};

/* payload of a batch command */
struct ublk_batch_io {
	__u16	q_id;
/* after each element's head come a zone's LBA, a buffer's address (first), or both */
#define UBLK_BATCH_F_HAS_ZONE_LBA		(1 << 0)
#define UBLK_BATCH_F_HAS_BUF_ADDR		(1 << 1)
#define UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK	(1 << 2)
	__u16	flags;
	__u16	nr_elem;
	__u8	elem_bytes;	/* size of one element; 2 for FETCH */
	__u8	reserved;
	__u64	reserved2;
};

/* argument of REG_BUF */
struct ublk_shmem_buf_reg {
	__u64	addr;		/* in the caller's memory, page aligned */
	__u64	len;		/* bytes, whole pages, at most 4 GiB */
#define UBLK_SHMEM_BUF_READ_ONLY	(1 << 0)
	__u32	flags;
	__u32	reserved;
};

#define UBLK_SHMEM_ZC_OFF_MASK	0xffffffffULL
#define UBLK_SHMEM_ZC_IDX_OFF	32
#define UBLK_SHMEM_ZC_IDX_MASK	0xffffULL

static inline __u64 ublk_shmem_zc_addr(__u16 index, __u32 offset)
{
	return (__u64)index << UBLK_SHMEM_ZC_IDX_OFF | offset;
}

static inline __u16 ublk_shmem_zc_index(__u64 addr)
{
	return (addr >> UBLK_SHMEM_ZC_IDX_OFF) & UBLK_SHMEM_ZC_IDX_MASK;
}

static inline __u32 ublk_shmem_zc_offset(__u64 addr)
{
	return addr & UBLK_SHMEM_ZC_OFF_MASK;
}

/* how one queue is doing */
struct ublk_queue_state {
#define UBLK_QUEUE_ORPHANED	0	/* no server: may be fetched */
#define UBLK_QUEUE_FETCHING	1	/* not served yet, or waiting for START or END_RECOVERY */
#define UBLK_QUEUE_SERVED	2
#define UBLK_QUEUE_LEAVING	3	/* its server is going */
	__u32	state;
	__s32	pid;		/* of its server, as the caller sees it, or -1 */
	__u32	generation;	/* how many servers it has had */
	__u16	fetched;	/* tags */
	__u16	inflight;	/* requests that its server has */
};

struct ublk_param_basic {
#define UBLK_ATTR_READ_ONLY		(1 << 0)
#define UBLK_ATTR_ROTATIONAL		(1 << 1)
#define UBLK_ATTR_VOLATILE_CACHE	(1 << 2)
#define UBLK_ATTR_FUA			(1 << 3)	/* only with VOLATILE_CACHE */
	__u32	attrs;
	__u8	logical_bs_shift;	/* 9 .. page shift */
	__u8	physical_bs_shift;
	__u8	io_opt_shift;
	__u8	io_min_shift;

	__u32	max_sectors;		/* of one request */
	__u32	chunk_sectors;

	__u64	dev_sectors;
	__u64	virt_boundary_mask;
};

struct ublk_param_discard {
	__u32	discard_alignment;	/* bytes */

	__u32	discard_granularity;	/* bytes, not 0 */
	__u32	max_discard_sectors;

	__u32	max_write_zeroes_sectors;
	__u16	max_discard_segments;	/* 1 if discard is offered */
	__u16	reserved0;
};

/* read-only: GET_PARAMS fills it in, SET_PARAMS refuses it */
struct ublk_param_devt {
	__u32	char_major;
	__u32	char_minor;
	__u32	disk_major;	/* known once the device has started */
	__u32	disk_minor;
};

struct ublk_param_zoned {
	__u32	max_open_zones;
	__u32	max_active_zones;
	__u32	max_zone_append_sectors;
	__u8	reserved[20];
};

struct ublk_param_dma_align {
	__u32	alignment;	/* mask: alignment - 1 */
	__u8	pad[4];
};

#define UBLK_MIN_SEGMENT_SIZE	4096

/* none of the three may be 0 */
struct ublk_param_segment {
	__u64	seg_boundary_mask;
	__u32	max_segment_size;
	__u16	max_segments;
	__u8	pad[2];
};

struct ublk_param_integrity {
	__u32	flags;			/* LBMD_PI_CAP_* of linux/fs.h */
	__u16	max_integrity_segments;	/* 0: no limit */
	__u8	interval_exp;
	__u8	metadata_size;		/* not 0 */
	__u8	pi_offset;
	__u8	csum_type;		/* LBMD_PI_CSUM_* */
	__u8	tag_size;
	__u8	pad[5];
};

struct ublk_params {
	/*
	 * Of the whole structure as the caller knows it. It grows from release
	 * to release: the driver reads and writes what both sides know.
	 */
	__u32	len;
#define UBLK_PARAM_TYPE_BASIC		(1 << 0)
#define UBLK_PARAM_TYPE_DISCARD		(1 << 1)
#define UBLK_PARAM_TYPE_DEVT		(1 << 2)
#define UBLK_PARAM_TYPE_ZONED		(1 << 3)
#define UBLK_PARAM_TYPE_DMA_ALIGN	(1 << 4)
#define UBLK_PARAM_TYPE_SEGMENT		(1 << 5)
#define UBLK_PARAM_TYPE_INTEGRITY	(1 << 6)
	__u32	types;		/* which of the following count */

	struct ublk_param_basic		basic;
	struct ublk_param_discard	discard;
	struct ublk_param_devt		devt;
	struct ublk_param_zoned		zoned;
	struct ublk_param_dma_align	dma;
	struct ublk_param_segment	seg;
	struct ublk_param_integrity	integrity;
};

/* The layouts are an ABI: a size that changed is a defect, on either side. */
#ifdef __cplusplus
#define UBLK_UAPI_SIZE(type, size) static_assert(sizeof(struct type) == (size), #type)
#else
#define UBLK_UAPI_SIZE(type, size) _Static_assert(sizeof(struct type) == (size), #type)
#endif
UBLK_UAPI_SIZE(ublksrv_ctrl_cmd, 32);
UBLK_UAPI_SIZE(ublksrv_ctrl_dev_info, 64);
UBLK_UAPI_SIZE(ublksrv_io_desc, 24);
UBLK_UAPI_SIZE(ublksrv_io_cmd, 16);
UBLK_UAPI_SIZE(ublk_auto_buf_reg, 8);
UBLK_UAPI_SIZE(ublk_elem_header, 8);
UBLK_UAPI_SIZE(ublk_batch_io, 16);
UBLK_UAPI_SIZE(ublk_shmem_buf_reg, 24);
UBLK_UAPI_SIZE(ublk_queue_state, 16);
UBLK_UAPI_SIZE(ublk_param_basic, 32);
UBLK_UAPI_SIZE(ublk_param_discard, 20);
UBLK_UAPI_SIZE(ublk_param_devt, 16);
UBLK_UAPI_SIZE(ublk_param_zoned, 32);
UBLK_UAPI_SIZE(ublk_param_dma_align, 8);
UBLK_UAPI_SIZE(ublk_param_segment, 16);
UBLK_UAPI_SIZE(ublk_param_integrity, 16);
UBLK_UAPI_SIZE(ublk_params, 152);
#undef UBLK_UAPI_SIZE

#endif
