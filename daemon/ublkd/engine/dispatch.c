/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <string.h>

#include "dispatch.h"
#include "error.h"
#include "stats.h"

/* 0 if a target may see the request, else the errno to answer it with. */
static int check_request(const struct ublkd_queue *q, const struct ublkd_io *io, uint64_t bytes)
{
	uint64_t size = __atomic_load_n(q->dev_bytes, __ATOMIC_RELAXED);

	switch (io->op) {
	case UBLKD_OP_FLUSH:
		return 0;
	case UBLKD_OP_READ:
	case UBLKD_OP_WRITE:
		if (bytes > q->p.max_io_bytes)
			return -EIO;
		break;
	case UBLKD_OP_DISCARD:
	case UBLKD_OP_WRITE_ZEROES:
		break;
	default:
		return -EOPNOTSUPP;
	}
	if (bytes == 0 || bytes > UINT32_MAX || bytes > size || io->offset > size - bytes)
		return -EIO;
	return 0;
}

/* Does the engine carry io's data between the driver and io->buf? */
static bool carries_data(const struct ublkd_queue *q, const struct ublkd_io *io)
{
	return (q->target->ops->flags & UBLKD_TARGET_WANTS_BUFFER) && !q->tp->needs_buffers && !io->fixed;
}

int ublkd_dispatch_request(struct ublkd_queue *q, uint16_t tag)
{
	struct ublkd_io *io = &q->ios[tag];
	const struct ublksrv_io_desc *iod = &q->iods[tag];
	uint64_t bytes;
	int err;

	if (io->state != UBLKD_IO_DRIVER)
		return ublkd_error(-EPROTO, "queue %u: a request for tag %u, which is in use", q->p.qid, tag);
	io->state = UBLKD_IO_SERVER;
	if (q->drain == UBLKD_DRAIN_HOLD)
		return 0;
	q->in_hand++;
	io->op = iod->op_flags & 0xff;
	io->flags = iod->op_flags;
	/* A sector beyond all bytes must not come round to the front of the device. */
	io->offset = iod->start_sector <= UINT64_MAX >> 9 ? iod->start_sector << 9 : UINT64_MAX;
	bytes = (uint64_t)iod->nr_sectors << 9;
	io->length = io->op == UBLKD_OP_FLUSH ? 0 : (uint32_t)bytes;
	io->start_ns = q->now_ns;
	memset(io->priv, 0, sizeof(io->priv));
	ublkd_stat_add(&q->shm->started, 1);

	err = check_request(q, io, bytes);
	io->fixed = q->tp->registers && (q->target->ops->flags & UBLKD_TARGET_TAKES_FIXED) &&
		    !(io->flags & UBLK_IO_F_NEED_REG_BUF);
	if (!err && io->op == UBLKD_OP_WRITE && carries_data(q, io)) {
		int64_t n = q->tp->pull(q, io, 0, io->buf, io->length);

		err = n < 0 ? (int)n : 0;
	}
	if (err) {
		ublkd_io_complete(q, io, err);
		return 0;
	}
	q->events[q->nr_events++] = (struct ublkd_event){ .io = io, .kind = UBLKD_EVENT_REQUEST };
	return 0;
}

void ublkd_dispatch_gone(struct ublkd_queue *q, uint16_t tag)
{
	struct ublkd_io *io = &q->ios[tag];

	if (io->state != UBLKD_IO_GONE)
		q->live--;
	io->state = UBLKD_IO_GONE;
}

void ublkd_io_complete(struct ublkd_queue *q, struct ublkd_io *io, int32_t res)
{
	/* A second answer would free a tag that may already carry another request. */
	if (io->state != UBLKD_IO_SERVER)
		return;
	if (res > 0 && (uint32_t)res > io->length)
		res = -EIO;
	/* The driver issues the rest of a short transfer again: for ever, if that is all of it. */
	if (res == 0 && (io->op == UBLKD_OP_READ || io->op == UBLKD_OP_WRITE))
		res = -EIO;
	io->result = res;
	io->state = UBLKD_IO_DONE;
	q->done[q->nr_done++] = io;
}

void ublkd_dispatch_done(struct ublkd_queue *q)
{
	uint64_t now;

	if (!q->nr_done)
		return;
	now = ublkd_now_ns();
	for (unsigned i = 0; i < q->nr_done; i++) {
		struct ublkd_io *io = q->done[i];

		if (io->op == UBLKD_OP_READ && io->result > 0 && carries_data(q, io)) {
			int64_t n = q->tp->push(q, io, 0, io->buf, (uint32_t)io->result);

			io->result = (int32_t)n;
		}
		ublkd_stat_complete(q->shm, io, now - io->start_ns);
		io->state = UBLKD_IO_DRIVER;
		q->tp->commit(q, io);
	}
	q->in_hand -= q->nr_done;
	q->nr_done = 0;
}
