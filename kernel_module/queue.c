// SPDX-License-Identifier: GPL-2.0-only
/*
 * Queues towards the block layer: requests come in, and end.
 */
#include <linux/sched/signal.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "driver.h"

#define UBLK_RETRY_MS	10

static const struct {
	blk_opf_t from;
	u32 to;
} ublk_req_flags[] = {
	{ REQ_FAILFAST_DEV, UBLK_IO_F_FAILFAST_DEV },
	{ REQ_FAILFAST_TRANSPORT, UBLK_IO_F_FAILFAST_TRANSPORT },
	{ REQ_FAILFAST_DRIVER, UBLK_IO_F_FAILFAST_DRIVER },
	{ REQ_META, UBLK_IO_F_META },
	{ REQ_FUA, UBLK_IO_F_FUA },
	{ REQ_NOUNMAP, UBLK_IO_F_NOUNMAP },
	{ REQ_SWAP, UBLK_IO_F_SWAP },
};

#define UBLK_REQ_FLAGS (REQ_FAILFAST_MASK | REQ_META | REQ_FUA | REQ_NOUNMAP | REQ_SWAP)

static u32 ublk_flags_of(blk_opf_t flags)
{
	unsigned int i;
	u32 to = 0;

	if (likely(!(flags & UBLK_REQ_FLAGS)))
		return 0;
	for (i = 0; i < ARRAY_SIZE(ublk_req_flags); i++)
		if (flags & ublk_req_flags[i].from)
			to |= ublk_req_flags[i].to;
	return to;
}

static int ublk_op_of(const struct request *req)
{
	switch (req_op(req)) {
	case REQ_OP_READ:
		return UBLK_IO_OP_READ;
	case REQ_OP_WRITE:
		return UBLK_IO_OP_WRITE;
	case REQ_OP_FLUSH:
		return UBLK_IO_OP_FLUSH;
	case REQ_OP_DISCARD:
		return UBLK_IO_OP_DISCARD;
	case REQ_OP_WRITE_ZEROES:
		return UBLK_IO_OP_WRITE_ZEROES;
	/* of zoned devices only */
	case REQ_OP_ZONE_OPEN:
		return UBLK_IO_OP_ZONE_OPEN;
	case REQ_OP_ZONE_CLOSE:
		return UBLK_IO_OP_ZONE_CLOSE;
	case REQ_OP_ZONE_FINISH:
		return UBLK_IO_OP_ZONE_FINISH;
	case REQ_OP_ZONE_APPEND:
		return UBLK_IO_OP_ZONE_APPEND;
	case REQ_OP_ZONE_RESET_ALL:
		return UBLK_IO_OP_ZONE_RESET_ALL;
	case REQ_OP_ZONE_RESET:
		return UBLK_IO_OP_ZONE_RESET;
	case REQ_OP_DRV_IN:
		return UBLK_IO_OP_REPORT_ZONES;
	default:
		return -1;
	}
}

void ublk_kick(struct gendisk *disk)
{
	blk_mq_kick_requeue_list(disk->queue);
}

static bool ublk_parks(struct ublk_device *ub)
{
	lockdep_assert_held(&ub->lock);
	return ublk_may_recover(ub) && !ublk_has(ub, UBLK_F_USER_RECOVERY_FAIL_IO) && !ub->force_abort &&
	       !ub->checking_zones;
}

static blk_status_t ublk_no_server(struct ublk_device *ub)
{
	return ublk_has(ub, UBLK_F_USER_RECOVERY_FAIL_IO) ? BLK_STS_TARGET : BLK_STS_IOERR;
}

/* Under ub->lock, so that whoever lifts the reason to park finds the request on the list. */
static void ublk_park(struct ublk_queue *q, struct request *req)
{
	blk_mq_requeue_request(req, false);
	/* somebody serves already: the list was sent for without this one */
	if (q->up)
		blk_mq_delay_kick_requeue_list(req->q, UBLK_RETRY_MS);
}

/*
 * End a request without the server, or park it on the requeue list until there
 * is one. `delivered`: the server has seen it, and a write may be done already.
 */
void ublk_abort(struct ublk_queue *q, struct request *req, bool delivered)
{
	struct ublk_device *ub = q->ub;
	bool park;

	spin_lock(&ub->lock);
	park = ublk_parks(ub) && (!delivered || ublk_has(ub, UBLK_F_USER_RECOVERY_REISSUE));
	if (park)
		ublk_park(q, req);
	spin_unlock(&ub->lock);
	if (!park)
		blk_mq_end_request(req, delivered ? BLK_STS_IOERR : ublk_no_server(ub));
}

/* A new request that finds nobody. */
static blk_status_t ublk_divert(struct ublk_queue *q, struct request *req)
{
	struct ublk_device *ub = q->ub;
	bool park;

	spin_lock(&ub->lock);
	park = ublk_parks(ub);
	if (park)
		ublk_park(q, req);
	spin_unlock(&ub->lock);
	return park ? BLK_STS_OK : ublk_no_server(ub);
}

/* The request goes to the server, which is told what it is. */
static void ublk_begin(struct ublk_queue *q, struct request *req, int op)
{
	struct ublksrv_io_desc *desc = &q->descs[req->tag];
	struct ublk_request *data = blk_mq_rq_to_pdu(req);

	refcount_set(&data->ref, 1);
	desc->op_flags = op | ublk_flags_of(req->cmd_flags);
	if (unlikely(op == UBLK_IO_OP_REPORT_ZONES)) {
		desc->nr_zones = data->zones;
		desc->start_sector = data->zone_sector;
	} else {
		desc->nr_sectors = blk_rq_sectors(req);
		desc->start_sector = blk_rq_pos(req);
	}
	blk_mq_start_request(req);
}

static blk_status_t ublk_take_request(struct blk_mq_hw_ctx *hctx, const struct blk_mq_queue_data *bd)
{
	struct ublk_queue *q = hctx->driver_data;
	struct request *req = bd->rq;
	struct ublk_io *io = &q->ios[req->tag];
	struct io_uring_cmd *cmd;
	int op = ublk_op_of(req);

	if (unlikely(op < 0))
		return BLK_STS_NOTSUPP;

	spin_lock(&io->lock);
	if (unlikely(!q->up || io->state != UBLK_IO_ARMED)) {
		spin_unlock(&io->lock);
		return ublk_divert(q, req);
	}
	io->state = UBLK_IO_DISPATCHED;
	io->req = req;
	if (q->batch) {
		/* from then on it may be on its way */
		ublk_begin(q, req, op);
		cmd = ublk_batch_add(q, req->tag);
		spin_unlock(&io->lock);
		if (cmd)
			ublk_batch_wake(cmd);
		return BLK_STS_OK;
	}
	cmd = io->cmd;
	spin_unlock(&io->lock);
	ublk_begin(q, req, op);
	ublk_dispatch(cmd);
	return BLK_STS_OK;
}

/*
 * A server that doesn't answer. That of an unprivileged device is not allowed
 * to keep others waiting; for the rest it is as the administrator wants it.
 * Its death then takes care of the request.
 */
static enum blk_eh_timer_return ublk_request_late(struct request *req)
{
	struct ublk_queue *q = req->mq_hctx->driver_data;
	struct ublk_device *ub = q->ub;
	struct ublk_io *io = &q->ios[req->tag];
	struct task_struct *task = NULL;

	if (!ublk_has(ub, UBLK_F_UNPRIVILEGED_DEV) && !READ_ONCE(ub->io_timeout))
		return BLK_EH_RESET_TIMER;
	spin_lock(&io->lock);
	if (io->req == req && io->task)
		task = get_task_struct(io->task);
	spin_unlock(&io->lock);
	if (task) {
		send_sig(SIGKILL, task, 0);
		put_task_struct(task);
	}
	return BLK_EH_RESET_TIMER;
}

static int ublk_bind_hctx(struct blk_mq_hw_ctx *hctx, void *driver_data, unsigned int index)
{
	struct ublk_device *ub = driver_data;

	hctx->driver_data = ub->queues[index];
	return 0;
}

const struct blk_mq_ops ublk_blk_mq_ops = {
	.queue_rq = ublk_take_request,
	.init_hctx = ublk_bind_hctx,
	.timeout = ublk_request_late,
};

/* An answer to the request. What the server says is not believed. */
static void ublk_end_committed(struct request *req, int res)
{
	unsigned int bytes = blk_rq_bytes(req);

	if (res < 0) {
		blk_mq_end_request(req, errno_to_blk_status(res));
		return;
	}
	if (!ublk_req_has_data(req)) {
		blk_mq_end_request(req, BLK_STS_OK);
		return;
	}
	if (likely(res >= bytes)) {
		blk_mq_end_request(req, BLK_STS_OK);
		return;
	}
	/* a part: the rest is asked for again, unless that would go on for ever */
	res = round_down(res, queue_logical_block_size(req->q));
	if (!res) {
		blk_mq_end_request(req, BLK_STS_IOERR);
		return;
	}
	if (blk_update_request(req, BLK_STS_OK, res))
		blk_mq_requeue_request(req, true);
	else
		__blk_mq_end_request(req, BLK_STS_OK);
}

static void ublk_end(struct ublk_queue *q, struct request *req)
{
	struct ublk_request *data = blk_mq_rq_to_pdu(req);

	if (unlikely(ublk_has(q->ub, UBLK_F_SHMEM_ZC)))
		ublk_shmem_put(q->ub, req);
	if (likely(data->end == UBLK_END_COMMIT))
		ublk_end_committed(req, data->res);
	else
		ublk_abort(q, req, true);
}

/* End a request that the server had, now or when the last system call lets go of its pages. */
void ublk_finish(struct ublk_queue *q, struct request *req, enum ublk_end end, int res)
{
	struct ublk_request *data = blk_mq_rq_to_pdu(req);

	data->end = end;
	data->res = res;
	ublk_req_put(q, req);
}

void ublk_req_put(struct ublk_queue *q, struct request *req)
{
	struct ublk_request *data = blk_mq_rq_to_pdu(req);

	if (refcount_dec_and_test(&data->ref))
		ublk_end(q, req);
}

int ublk_alloc_queues(struct ublk_device *ub)
{
	unsigned int depth = ub->info.queue_depth;
	unsigned int i, tag;

	ub->queues = kvcalloc(ub->info.nr_hw_queues, sizeof(*ub->queues), GFP_KERNEL);
	if (!ub->queues)
		return -ENOMEM;
	for (i = 0; i < ub->info.nr_hw_queues; i++) {
		struct ublk_queue *q = kvzalloc(struct_size(q, ios, depth), GFP_KERNEL);

		if (!q)
			return -ENOMEM;
		ub->queues[i] = q;
		q->ub = ub;
		q->id = i;
		q->depth = depth;
		for (tag = 0; tag < depth; tag++)
			spin_lock_init(&q->ios[tag].lock);
		/* whole pages, zeroed, as they are for user space to map */
		q->descs = vmalloc_user(ublk_descs_size(depth));
		if (!q->descs)
			return -ENOMEM;
		if (ublk_has(ub, UBLK_F_BATCH_IO) && ublk_batch_alloc(q))
			return -ENOMEM;
	}
	return 0;
}

void ublk_free_queues(struct ublk_device *ub)
{
	unsigned int i, tag;

	if (!ub->queues)
		return;
	for (i = 0; i < ub->info.nr_hw_queues; i++) {
		struct ublk_queue *q = ub->queues[i];

		if (!q)
			continue;
		for (tag = 0; tag < q->depth; tag++)
			if (q->ios[tag].task)
				put_task_struct(q->ios[tag].task);
		ublk_batch_free(q);
		vfree(q->descs);
		kvfree(q);
	}
	kvfree(ub->queues);
}
