/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "dispatch.h"
#include "error.h"
#include "ring.h"
#include "stats.h"

static struct ublkd_io *queue_io(struct ublkd_queue *q, unsigned tag)
{
	return &q->ios[tag];
}

static unsigned queue_depth(const struct ublkd_queue *q)
{
	return q->p.depth;
}

static unsigned queue_qid(const struct ublkd_queue *q)
{
	return q->p.qid;
}

static uint32_t queue_max_io_bytes(const struct ublkd_queue *q)
{
	return q->p.max_io_bytes;
}

static struct ublkd_shm_queue *queue_shm(struct ublkd_queue *q)
{
	return q->shm;
}

static bool queue_driver_copies(const struct ublkd_queue *q)
{
	return q->tp->needs_buffers;
}

static int64_t io_pull(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, void *dst, uint32_t len)
{
	return q->tp->pull(q, io, off, dst, len);
}

static int64_t io_push(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, const void *src, uint32_t len)
{
	return q->tp->push(q, io, off, src, len);
}

const struct ublkd_services ublkd_services = {
	.size = sizeof(ublkd_services),
	.complete = ublkd_io_complete,
	.pull = io_pull,
	.push = io_push,
	.sqe = ublkd_queue_sqe,
	.sqe_own = ublkd_sqe_own,
	.io = queue_io,
	.depth = queue_depth,
	.qid = queue_qid,
	.max_io_bytes = queue_max_io_bytes,
	.shm = queue_shm,
	.driver_copies = queue_driver_copies,
};

void ublkd_sqe_own(struct ublkd_queue *q, struct io_uring_sqe *sqe, struct ublkd_io *io, uint8_t slot)
{
	sqe->user_data = ublkd_ud_pack(UBLKD_UD_TARGET, io->tag, slot);
	q->targets_inflight++;
}

int ublkd_queue_register_file(struct ublkd_queue *q, int fd)
{
	int ret;

	if (q->nr_files == UBLKD_NR_FILES)
		return -ENFILE;
	ret = io_uring_register_files_update(&q->ring, q->nr_files, &fd, 1);
	return ret < 0 ? ret : (int)q->nr_files++;
}

static int register_files(struct ublkd_queue *q)
{
	int fds[UBLKD_NR_FILES];
	int ret;

	for (unsigned i = 0; i < UBLKD_NR_FILES; i++)
		fds[i] = -1;
	/*
	 * More than speed: should we die, the ring keeps the device's file until
	 * the target's I/O has ended, and the driver takes no new server before.
	 */
	fds[UBLKD_FILE_CDEV] = q->p.cdev_fd;
	ret = io_uring_register_files(&q->ring, fds, UBLKD_NR_FILES);
	if (ret < 0)
		return ublkd_error(ret, "cannot register files with io_uring: %s", strerror(-ret));
	q->nr_files = UBLKD_FILE_CDEV + 1;
	return 0;
}

static int check_params(const struct ublkd_queue_params *p, const struct ublkd_target *target)
{
	if (!p->depth || p->depth > UBLK_MAX_QUEUE_DEPTH || !p->max_io_bytes || !p->cmdbuf || p->cdev_fd < 0)
		return ublkd_error(-EINVAL, "bad queue parameters");
	if (p->shares > 1 && (p->share >= p->shares || p->shares > p->depth))
		return ublkd_error(-EINVAL, "share %u of %u of %u tags", p->share, p->shares, p->depth);
	if (target->ops->abi != UBLKD_TARGET_ABI || target->ops->size < sizeof(struct ublkd_target_ops))
		return ublkd_error(-EINVAL, "target %s was built for another engine", target->ops->name);
	return 0;
}

static int alloc_tags(struct ublkd_queue *q)
{
	unsigned depth = q->p.depth;
	/* At worst every tag has a request and all the target's SQEs complete in one pass. */
	unsigned max_events = depth * (1 + q->target->ops->sqes_per_io);

	q->ios = calloc(depth, sizeof(*q->ios));
	q->events = calloc(max_events, sizeof(*q->events));
	q->done = calloc(depth, sizeof(struct ublkd_io *));
	if (!q->ios || !q->events || !q->done)
		return ublkd_error(-ENOMEM, "no memory for %u tags", depth);
	if (q->tp->needs_buffers || (q->target->ops->flags & UBLKD_TARGET_WANTS_BUFFER)) {
		int ret = ublkd_buffers_init(&q->buffers, depth, q->p.max_io_bytes);

		if (ret < 0)
			return ret;
	}
	for (unsigned tag = 0; tag < depth; tag++) {
		q->ios[tag].tag = (uint16_t)tag;
		q->ios[tag].buf = ublkd_buffers_get(&q->buffers, tag);
	}
	q->live = (depth - q->p.share + q->p.shares - 1) / q->p.shares;
	return 0;
}

static int attach_shm(struct ublkd_queue *q)
{
	struct ublkd_shm_header *header = q->p.shm;
	const uint32_t slot = (uint32_t)q->p.qid * q->p.shares + q->p.share;

	if (!header) {
		q->own_shm = calloc(1, sizeof(*q->own_shm));
		if (!q->own_shm)
			return ublkd_error(-ENOMEM, "no memory for counters");
		q->shm = q->own_shm;
		q->dev_bytes = &q->p.dev_bytes;
		return 0;
	}
	if (header->magic != UBLKD_SHM_MAGIC || header->version != UBLKD_SHM_VERSION ||
	    header->slot_bytes != sizeof(struct ublkd_shm_queue) || slot >= header->nr_slots)
		return ublkd_error(-EINVAL, "the statistics segment is not of this version");
	q->shm = (struct ublkd_shm_queue *)((char *)header + header->header_bytes) + slot;
	q->dev_bytes = &header->dev_bytes;
	return 0;
}

int ublkd_queue_create_on(const struct ublkd_queue_params *params, const struct ublkd_transport *tp,
			  struct ublkd_target *target, struct ublkd_queue **ret)
{
	struct ublkd_queue *q;
	unsigned entries;
	int err = check_params(params, target);

	if (err < 0)
		return err;
	q = calloc(1, sizeof(*q));
	if (!q)
		return ublkd_error(-ENOMEM, "no memory for a queue");
	q->p = *params;
	if (!q->p.shares)
		q->p.shares = 1;
	q->tp = tp;
	q->target = target;
	q->carries = (target->ops->flags & (UBLKD_TARGET_WANTS_BUFFER | UBLKD_TARGET_MOVES_DATA)) ==
			     UBLKD_TARGET_WANTS_BUFFER &&
		     !tp->needs_buffers;
	q->fixes = (target->ops->flags & UBLKD_TARGET_TAKES_FIXED) && tp->registers;
	q->iods = params->cmdbuf;
	q->ring.ring_fd = -1;
	q->wait.most_ns = q->wait.next_ns = params->poll_us * 1000ull;
	target->sv = &ublkd_services;

	err = attach_shm(q);
	if (err < 0)
		goto fail;
	err = alloc_tags(q);
	if (err < 0)
		goto fail;
	/* Room for every tag's command and target I/O at once, the wake poll, and what a transport has of its own. */
	entries = q->live * (1 + target->ops->sqes_per_io) + 1 + UBLKD_TRANSPORT_CQES;
	err = ublkd_ring_init(&q->ring, q->live + 1, entries, params->poll_us ? IORING_SETUP_TASKRUN_FLAG : 0);
	if (err < 0) {
		q->ring.ring_fd = -1;
		goto fail;
	}
	err = register_files(q);
	if (err < 0)
		goto fail;
	io_uring_register_ring_fd(&q->ring); /* saves a lookup per pass; older kernels just lack it */
	if (target->ops->open) {
		err = target->ops->open(target, q);
		if (err < 0)
			goto fail;
	}
	q->opened = true;
	ublkd_stat_set(&q->shm->pid, (uint64_t)getpid());
	/* What a worker before us never answered is not in our hands. */
	ublkd_stat_set(&q->shm->started, q->shm->completed);
	ublkd_stat_set(&q->shm->stage, UBLKD_SHM_ENGINE);
	*ret = q;
	return 0;
fail:
	ublkd_queue_destroy(q);
	return err;
}

int ublkd_queue_create(const struct ublkd_queue_params *params, struct ublkd_target *target,
		       struct ublkd_queue **ret)
{
	switch (params->transport) {
	case UBLKD_TRANSPORT_COPY:
		return ublkd_queue_create_on(params, &ublkd_transport_copy, target, ret);
	case UBLKD_TRANSPORT_USER_COPY:
		return ublkd_queue_create_on(params, &ublkd_transport_user_copy, target, ret);
	case UBLKD_TRANSPORT_ZERO_COPY:
		return ublkd_queue_create_on(params, &ublkd_transport_zero_copy, target, ret);
	case UBLKD_TRANSPORT_USER_COPY | UBLKD_TRANSPORT_BATCH:
		return ublkd_queue_create_on(params, &ublkd_transport_batch_user_copy, target, ret);
	case UBLKD_TRANSPORT_ZERO_COPY | UBLKD_TRANSPORT_BATCH:
		return ublkd_queue_create_on(params, &ublkd_transport_batch_zero_copy, target, ret);
	default:
		return ublkd_error(-EINVAL, "unknown transport %u", params->transport);
	}
}

void ublkd_queue_destroy(struct ublkd_queue *q)
{
	if (!q)
		return;
	if (q->opened && q->target->ops->close)
		q->target->ops->close(q->target, q);
	if (q->ring.ring_fd >= 0)
		io_uring_queue_exit(&q->ring);
	if (q->tp->close)
		q->tp->close(q);
	/*
	 * The kernel tears the ring down in the background: I/O that is under way
	 * goes on, from and to these buffers, which are then left to it. The
	 * process has given up its queue and is about to end.
	 */
	if (!q->targets_inflight)
		ublkd_buffers_exit(&q->buffers);
	free(q->own_shm);
	free(q->done);
	free(q->events);
	free(q->ios);
	free(q);
}

void ublkd_target_destroy(struct ublkd_target *target)
{
	if (target)
		target->ops->destroy(target);
}

static void arm_wake(struct ublkd_queue *q)
{
	struct io_uring_sqe *sqe;

	if (q->wake_armed || q->p.wake_fd < 0)
		return;
	sqe = ublkd_queue_sqe(q);
	io_uring_prep_poll_add(sqe, q->p.wake_fd, POLLIN);
	sqe->user_data = ublkd_ud_pack(UBLKD_UD_WAKE, 0, 0);
	q->wake_armed = true;
}

static void handle_wake(struct ublkd_queue *q)
{
	uint64_t count;

	q->wake_armed = false;
	/* That nothing is there is no fault: somebody else emptied it. */
	if (read(q->p.wake_fd, &count, sizeof(count)) < 0)
		return;
	q->woken = (uint16_t)count;
	if (count >= UBLKD_WAKE_SERVE)
		q->drain = UBLKD_DRAIN_NOT;
	else if (count >= UBLKD_WAKE_DRAIN_IDLE)
		q->drain = UBLKD_DRAIN_IDLE;
	else if (count >= UBLKD_WAKE_DRAIN)
		q->drain = UBLKD_DRAIN_HOLD;
}

static int reap(struct ublkd_queue *q)
{
	struct io_uring_cqe *cqe;
	unsigned head, n = 0;
	int ret = 0;

	q->now_ns = ublkd_now_ns();
	ublkd_stat_set(&q->shm->heartbeat_ns, q->now_ns);
	io_uring_for_each_cqe(&q->ring, head, cqe) {
		uint64_t ud = cqe->user_data;
		uint16_t tag = ublkd_ud_tag(ud);
		int err = 0;

		n++;
		switch (ublkd_ud_kind(ud)) {
		case UBLKD_UD_CMD:
			err = q->tp->cqe(q, tag, cqe->res, cqe->flags);
			break;
		case UBLKD_UD_TARGET:
			q->targets_inflight--;
			q->events[q->nr_events++] = (struct ublkd_event){
				.io = &q->ios[tag],
				.res = cqe->res,
				.kind = UBLKD_EVENT_CQE,
				.slot = ublkd_ud_slot(ud),
			};
			break;
		case UBLKD_UD_WAKE:
			handle_wake(q);
			break;
		}
		if (err < 0 && !ret)
			ret = err;
	}
	io_uring_cq_advance(&q->ring, n);
	ublkd_stat_set(&q->shm->started, q->shm->completed + q->in_hand);
	return ret;
}

/* One pass: submit, wait, reap everything, let the target work, commit. */
static int queue_pass(struct ublkd_queue *q)
{
	int ret;

	arm_wake(q);
	ublkd_stat_set(&q->shm->stage, UBLKD_SHM_WAITING);
	ret = q->wait.most_ns ? ublkd_wait_polling(q) : io_uring_submit_and_wait(&q->ring, 1);
	ublkd_stat_set(&q->shm->stage, UBLKD_SHM_ENGINE);
	if (ret < 0 && ret != -EINTR && ret != -EAGAIN && ret != -EBUSY)
		return ublkd_error(ret, "queue %u: io_uring_enter: %s", q->p.qid, strerror(-ret));
	ublkd_stat_add(&q->shm->passes, 1);
	ret = reap(q);
	if (q->nr_events) {
		q->target->ops->handle(q->target, q, q->events, q->nr_events);
		q->nr_events = 0;
	}
	ublkd_dispatch_done(q);
	if (q->tp->flush)
		q->tp->flush(q);
	return ret;
}

static bool is_drained(const struct ublkd_queue *q)
{
	return q->drain && !q->in_hand;
}

int ublkd_queue_fetch(struct ublkd_queue *q)
{
	int ret;

	if (q->armed)
		return 0;
	q->armed = true;
	/* Submitted in one call, which no signal interrupts: a worker that is killed has fetched all of its tags or none. */
	ret = q->tp->arm(q);
	if (ret < 0)
		return ret;
	ret = io_uring_submit(&q->ring);
	if (ret < 0)
		return ublkd_error(ret, "queue %u: cannot fetch: %s", q->p.qid, strerror(-ret));
	return 0;
}

int ublkd_queue_run(struct ublkd_queue *q)
{
	int ret = ublkd_queue_fetch(q);

	q->woken = false;
	while (!ret && !q->woken && !is_drained(q) && (q->live || q->targets_inflight))
		ret = queue_pass(q);
	ublkd_stat_add(&q->shm->run_returns, 1);
	if (ret < 0)
		return ret;
	if (is_drained(q) && q->live) {
		/* The last answers: without waiting, which could bring new requests. */
		ret = io_uring_submit(&q->ring);
		return ret < 0 ? ublkd_error(ret, "queue %u: io_uring_enter: %s", q->p.qid, strerror(-ret)) :
				 UBLKD_RUN_DRAINED;
	}
	return q->live || q->targets_inflight ? UBLKD_RUN_WAKE : UBLKD_RUN_DONE;
}
