/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <string.h>

#include "dispatch.h"
#include "error.h"
#include "stats.h"

/* Sectors here are of 512 bytes, as the driver counts. */
#define SECTOR_SHIFT 9

/* 0 if a target may see the request, else the errno to answer it with. dev_sectors: what the device has. */
static inline int check_request(const struct ublkd_queue *q, const struct ublksrv_io_desc *iod, uint64_t dev_sectors)
{
	const uint32_t sectors = iod->nr_sectors;
	uint32_t most;

	switch (iod->op_flags & 0xff) {
	case UBLKD_OP_FLUSH:
		return 0;
	case UBLKD_OP_READ:
	case UBLKD_OP_WRITE:
		most = q->p.max_io_bytes >> SECTOR_SHIFT;
		break;
	case UBLKD_OP_DISCARD:
	case UBLKD_OP_WRITE_ZEROES:
		most = UINT32_MAX >> SECTOR_SHIFT;
		break;
	default:
		return -EOPNOTSUPP;
	}
	if (sectors == 0 || sectors > most || sectors > dev_sectors || iod->start_sector > dev_sectors - sectors)
		return -EIO;
	return 0;
}

/* Does the engine carry io's data between the driver and io->buf? */
static bool carries_data(const struct ublkd_queue *q, const struct ublkd_io *io)
{
	return q->carries && !io->fixed;
}

static inline int dispatch(struct ublkd_queue *q, uint16_t tag, uint64_t dev_sectors)
{
	struct ublkd_io *io = &q->ios[tag];
	const struct ublksrv_io_desc iod = q->iods[tag];
	int err;

	if (io->state != UBLKD_IO_DRIVER)
		return ublkd_error(-EPROTO, "queue %u: a request for tag %u, which is in use", q->p.qid, tag);
	io->state = UBLKD_IO_SERVER;
	if (q->drain == UBLKD_DRAIN_HOLD)
		return 0;
	q->in_hand++;
	io->op = iod.op_flags & 0xff;
	io->flags = iod.op_flags;
	io->offset = iod.start_sector << SECTOR_SHIFT;
	io->length = io->op == UBLKD_OP_FLUSH ? 0 : iod.nr_sectors << SECTOR_SHIFT;
	io->start_ns = q->now_ns;
	memset(io->priv, 0, sizeof(io->priv));

	err = check_request(q, &iod, dev_sectors);
	io->fixed = q->fixes && !(io->flags & UBLK_IO_F_NEED_REG_BUF);
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

int ublkd_dispatch_requests(struct ublkd_queue *q, const uint16_t *tags, unsigned n)
{
	const uint64_t dev_sectors = __atomic_load_n(q->dev_bytes, __ATOMIC_RELAXED) >> SECTOR_SHIFT;
	int ret = 0;

	for (unsigned i = 0; i < n; i++) {
		int err;

		if (tags[i] < q->p.depth)
			err = dispatch(q, tags[i], dev_sectors);
		else
			err = ublkd_error(-EPROTO, "queue %u: a request for tag %u, which there is not", q->p.qid,
					  tags[i]);
		if (err < 0 && !ret)
			ret = err;
	}
	return ret;
}

void ublkd_dispatch_gone(struct ublkd_queue *q, uint16_t tag)
{
	struct ublkd_io *io = &q->ios[tag];

	if (io->state != UBLKD_IO_GONE)
		q->live--;
	io->state = UBLKD_IO_GONE;
}

/*
 * Answers, one after the other in q->done from number i on, of requests of one
 * operation that arrived together: of a pass over a fast target's, all. They
 * are counted as one. Returns the number of the next.
 */
static unsigned finish_run(struct ublkd_queue *q, unsigned i, uint64_t now)
{
	const struct ublkd_io *first = q->done[i];
	struct ublkd_io *io = q->done[i];
	struct ublkd_stat_run run = { .op = first->op, .ns = now - first->start_ns };

	do {
		if (io->op == UBLKD_OP_READ && io->result > 0 && carries_data(q, io)) {
			int64_t n = q->tp->push(q, io, 0, io->buf, (uint32_t)io->result);

			io->result = (int32_t)n;
		}
		run.ios++;
		run.bytes += io->length;
		run.errors += io->result < 0;
		run.fua += (io->flags & UBLKD_RQ_FUA) != 0;
		io->state = UBLKD_IO_DRIVER;
		if (++i == q->nr_done)
			break;
		io = q->done[i];
	} while (io->op == first->op && io->start_ns == first->start_ns);
	ublkd_stat_complete(q->shm, run);
	return i;
}

void ublkd_dispatch_done(struct ublkd_queue *q)
{
	uint64_t now;

	if (!q->nr_done)
		return;
	now = ublkd_now_ns();
	for (unsigned i = 0; i < q->nr_done;)
		i = finish_run(q, i, now);
	q->tp->commit(q, q->done, q->nr_done);
	q->in_hand -= q->nr_done;
	q->nr_done = 0;
}
