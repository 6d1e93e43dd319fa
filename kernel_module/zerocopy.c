// SPDX-License-Identifier: GPL-2.0-only
/*
 * Requests in the table of registered buffers of a server's ring, put there by
 * a command of its own or by the delivery of the request (UBLK_F_AUTO_BUF_REG).
 *
 * Whatever the ring does with a request's pages it does before it gives them
 * back, so each place in a table is a user of the request, which ends after the
 * last of them has gone, and each pins the file through which its queue is
 * served: a queue has no next server before the rings of the last one are done.
 */
#include <linux/file.h>

#include "driver.h"

#ifdef UBLK_HAVE_URING_BVEC

/* From io_uring, whoever makes it let go of the buffer: a command, a new table, the end of the ring. */
static void ublk_buffer_returned(void *priv)
{
	struct request *req = priv;
	struct ublk_queue *q = req->mq_hctx->driver_data;
	struct file *filp = q->owner->filp;	/* the one that is pinned, hence still the owner */

	ublk_req_put(q, req);
	fput(filp);
}

/* Into the table of the command's ring. The caller uses the request, too. */
static int ublk_buffer_lend(struct request *req, unsigned int index, struct io_uring_cmd *cmd,
			    unsigned int issue_flags)
{
	struct ublk_request *data = blk_mq_rq_to_pdu(req);
	int err;

	refcount_inc(&data->ref);
	get_file(cmd->file);
	err = io_buffer_register_bvec(cmd, req, ublk_buffer_returned, index, issue_flags);
	if (unlikely(err))
		ublk_buffer_returned(req);
	return err;
}

/* By any task, and into any ring, of the server whose request it is. */
int ublk_buffer_register(struct ublk_queue *q, unsigned int tag, u64 index, struct io_uring_cmd *cmd,
			 unsigned int issue_flags)
{
	enum ublk_io_state state = READ_ONCE(q->ios[tag].state);
	struct request *req;
	int err = -EINVAL;

	if (READ_ONCE(q->owner) != cmd->file->private_data)
		return -EINVAL;
	req = ublk_req_get(q, tag);
	if (!req)
		return !q->batch && (state == UBLK_IO_ARMED || state == UBLK_IO_DISPATCHED) ? -EBUSY : -EINVAL;
	if (ublk_has(q->ub, UBLK_F_SUPPORT_ZERO_COPY) && index <= UINT_MAX &&
	    (ublk_req_fills(req) || ublk_req_drains(req)))
		err = ublk_buffer_lend(req, index, cmd, issue_flags);
	ublk_req_put(q, req);
	return err;
}

int ublk_buffer_unregister(struct ublk_device *ub, u64 index, struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	if (!ublk_has(ub, UBLK_F_SUPPORT_ZERO_COPY) || index > UINT_MAX)
		return -EINVAL;
	return io_buffer_unregister_bvec(cmd, index, issue_flags);
}

/* Where in the ring's table the next request goes. False if the server asks for what there is not. */
bool ublk_place_by_index(struct ublk_device *ub, u64 addr, struct ublk_place *place)
{
	struct ublk_auto_buf_reg reg = ublk_sqe_addr_to_auto_buf_reg(addr);

	if (!ublk_has(ub, UBLK_F_AUTO_BUF_REG))
		return true;
	if (reg.reserved0 || reg.reserved1 || (reg.flags & ~UBLK_AUTO_BUF_REG_F_MASK))
		return false;
	place->index = reg.index;
	place->fallback = reg.flags & UBLK_AUTO_BUF_REG_FALLBACK;
	return true;
}

/* A request that is about to go to the server. False if it can't go, as its pages can't. */
bool ublk_auto_register(struct ublk_queue *q, unsigned int tag, struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	struct ublk_io *io = &q->ios[tag];

	if (!(ublk_req_fills(io->req) || ublk_req_drains(io->req)))
		return true;
	if (likely(!ublk_buffer_lend(io->req, io->place.index, cmd, issue_flags))) {
		io->ring = io_uring_cmd_ctx_handle(cmd);
		return true;
	}
	if (!io->place.fallback)
		return false;
	q->descs[tag].op_flags |= UBLK_IO_F_NEED_REG_BUF;
	return true;
}

/* Its answer, or it did not get there. Only a command of the same ring gets at the table. */
void ublk_auto_unregister(struct ublk_io *io, struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	if (io->ring == io_uring_cmd_ctx_handle(cmd))
		io_buffer_unregister_bvec(cmd, io->place.index, issue_flags);
	io->ring = NULL;
}

#endif /* UBLK_HAVE_URING_BVEC */
