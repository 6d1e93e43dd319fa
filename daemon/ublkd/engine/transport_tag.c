/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The transports with one command per tag: COMMIT_AND_FETCH answers a request
 * and its CQE brings the next. They differ in who moves the data.
 */
#include <errno.h>
#include <string.h>

#include "dispatch.h"
#include "error.h"

static void queue_cmd(struct ublkd_queue *q, uint32_t cmd_op, const struct ublkd_io *io, int32_t result)
{
	struct io_uring_sqe *sqe = ublkd_queue_sqe(q);
	struct ublksrv_io_cmd cmd = {
		.q_id = q->p.qid,
		.tag = io->tag,
		.result = result,
		/* Must be zero where the server copies, even if it has a buffer. */
		.addr = q->tp->needs_buffers ? (uintptr_t)io->buf : 0,
	};

	io_uring_prep_rw(IORING_OP_URING_CMD, sqe, UBLKD_FILE_CDEV, NULL, 0, 0);
	sqe->off = cmd_op;
	if (q->tp->registers)
		sqe->addr = io->tag | UBLK_AUTO_BUF_REG_FALLBACK << 16;
	sqe->flags = IOSQE_FIXED_FILE;
	sqe->user_data = ublkd_ud_pack(UBLKD_UD_CMD, io->tag, 0);
	/* The command's payload begins at byte 48 of any SQE; liburing 2.3 has no name for it in C. */
	memcpy((char *)sqe + 48, &cmd, sizeof(cmd));
}

static int tag_arm(struct ublkd_queue *q)
{
	for (unsigned tag = q->p.share; tag < q->p.depth; tag += q->p.shares)
		queue_cmd(q, UBLK_U_IO_FETCH_REQ, &q->ios[tag], 0);
	return 0;
}

static void tag_commit(struct ublkd_queue *q, struct ublkd_io *const *ios, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		queue_cmd(q, UBLK_U_IO_COMMIT_AND_FETCH_REQ, ios[i], ios[i]->result);
}

static int tag_cqe(struct ublkd_queue *q, uint16_t tag, int32_t res, uint32_t flags)
{
	(void)flags;
	if (res == UBLK_IO_RES_OK)
		return ublkd_dispatch_requests(q, &tag, 1);
	if (res == UBLK_IO_RES_ABORT) {
		ublkd_dispatch_gone(q, tag);
		return 0;
	}
	return ublkd_error(res < 0 ? res : -EPROTO, "queue %u: the driver answered a command of tag %u with %d (%s)",
			   q->p.qid, tag, res, res < 0 ? strerror(-res) : "not asked for");
}

const struct ublkd_transport ublkd_transport_copy = {
	.name = "copy",
	.needs_buffers = true,
	.arm = tag_arm,
	.cqe = tag_cqe,
	.commit = tag_commit,
	.pull = ublkd_copy_pull,
	.push = ublkd_copy_push,
};

const struct ublkd_transport ublkd_transport_user_copy = {
	.name = "user-copy",
	.arm = tag_arm,
	.cqe = tag_cqe,
	.commit = tag_commit,
	.pull = ublkd_user_copy_pull,
	.push = ublkd_user_copy_push,
};

static int zero_copy_arm(struct ublkd_queue *q)
{
	int ret = ublkd_register_requests(q);

	return ret < 0 ? ret : tag_arm(q);
}

/* Where the pages could not be registered the server copies: such a device has user copy too. */
const struct ublkd_transport ublkd_transport_zero_copy = {
	.name = "zero-copy",
	.registers = true,
	.arm = zero_copy_arm,
	.cqe = tag_cqe,
	.commit = tag_commit,
	.pull = ublkd_user_copy_pull,
	.push = ublkd_user_copy_push,
};
