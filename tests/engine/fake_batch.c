/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The driver of transport_batch.c, between the engine and the kernel: liburing's
 * calls to submit are wrapped. Commands to the char device are carried out here
 * and go on as NOPs; what they are to give, and FETCH's CQEs, which come by
 * NOPs of their own, is written over the NOPs' CQEs before the engine looks.
 */
#include <sys/syscall.h>
#include <unistd.h>

#include "fake.h"

/* As the driver has them. */
enum { DRIVER_TAGS = 128, COMMIT_CHUNK_BYTES = 480 };

static struct fake *current;
static bool owned[UBLK_MAX_QUEUE_DEPTH]; /* tags that the server has */
/* What is to be written over CQEs, in their order. */
static struct {
	int32_t res;
	uint32_t flags;
} patches[2 * UBLK_MAX_QUEUE_DEPTH];

int __real_io_uring_submit(struct io_uring *ring);
int __wrap_io_uring_submit(struct io_uring *ring);
int __real_io_uring_submit_and_wait(struct io_uring *ring, unsigned n);
int __wrap_io_uring_submit_and_wait(struct io_uring *ring, unsigned n);
int __real_io_uring_register_buf_ring(struct io_uring *ring, struct io_uring_buf_reg *reg, unsigned flags);
int __wrap_io_uring_register_buf_ring(struct io_uring *ring, struct io_uring_buf_reg *reg, unsigned flags);

void fake_batch_begin(struct fake *f)
{
	struct fake_batch *b = &f->batch;

	*b = (struct fake_batch){
		.below = b->below,
		.prep_error = b->prep_error,
		.commit_error = b->commit_error,
		.fetch_error = b->fetch_error,
		.false_tags = b->false_tags,
		.nr_false_tags = b->nr_false_tags,
		.stop_after = b->stop_after,
		.one_by_one = b->one_by_one,
	};
	memset(owned, 0, sizeof(owned));
	current = f;
}

int __wrap_io_uring_register_buf_ring(struct io_uring *ring, struct io_uring_buf_reg *reg, unsigned flags)
{
	struct fake_batch *b = &current->batch;

	b->ring = (struct io_uring_buf_ring *)(uintptr_t)reg->ring_addr;
	b->nr_buffers = reg->ring_entries;
	CHECK_EQ(b->nr_buffers & (b->nr_buffers - 1), 0);
	/* The kernel's own list stays unused, but may not be had on a kernel that runs this: that is not the question. */
	__real_io_uring_register_buf_ring(ring, reg, flags);
	return 0;
}

static uint64_t below(const struct fake_batch *b, uint64_t n)
{
	return b->below ? b->below(n) : 0;
}

static void patch(struct fake_batch *b, int32_t res, uint32_t flags)
{
	const unsigned size = sizeof(patches) / sizeof(patches[0]);

	CHECK(b->patch_tail - b->patch_head < size);
	patches[b->patch_tail % size].res = res;
	patches[b->patch_tail++ % size].flags = flags;
}

static void become_nop(struct io_uring_sqe *sqe, uint64_t user_data, bool skip)
{
	io_uring_prep_nop(sqe);
	sqe->user_data = user_data;
	sqe->flags = skip ? IOSQE_CQE_SKIP_SUCCESS : 0;
}

static void check_elems(const struct fake *f, const struct ublk_batch_io *cmd)
{
	CHECK_EQ(cmd->elem_bytes, 8);
	CHECK(cmd->nr_elem >= 1 && cmd->nr_elem <= f->p.depth);
	CHECK_EQ(cmd->flags, f->q->tp->registers ? UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK : 0);
}

static int do_prep(struct fake *f, const struct ublk_batch_io *cmd, const struct ublk_elem_header *elems)
{
	bool seen[UBLK_MAX_QUEUE_DEPTH] = { false };

	f->batch.preps++;
	check_elems(f, cmd);
	CHECK(!f->batch.prepared);
	CHECK_EQ(cmd->nr_elem, f->p.depth);
	for (unsigned i = 0; i < cmd->nr_elem; i++) {
		CHECK(elems[i].tag < f->p.depth && !seen[elems[i].tag]);
		CHECK(!f->q->tp->registers || elems[i].buf_index == elems[i].tag);
		seen[elems[i].tag] = true;
	}
	if (f->batch.prep_error)
		return f->batch.prep_error;
	f->batch.prepared = true;
	if (f->q->tp->registers) {
		struct iovec *vecs = fake_map_pages(f);

		CHECK_EQ(io_uring_register_buffers_update_tag(&f->q->ring, 0, vecs, NULL, f->p.depth), f->p.depth);
		free(vecs);
	}
	return 0;
}

static int do_commit(struct fake *f, const struct ublk_batch_io *cmd, const struct ublk_elem_header *elems)
{
	struct fake_batch *b = &f->batch;

	check_elems(f, cmd);
	/* What is longer could be taken in part, and nobody would hear of it. */
	CHECK(cmd->nr_elem * 8 <= COMMIT_CHUNK_BYTES);
	if (cmd->nr_elem > b->most_commit)
		b->most_commit = cmd->nr_elem;
	if (b->commits++ && b->commit_error)
		return b->commit_error;
	for (unsigned i = 0; i < cmd->nr_elem; i++) {
		const unsigned tag = elems[i].tag;

		CHECK(tag < f->p.depth && owned[tag]);
		CHECK(!f->q->tp->registers || elems[i].buf_index == tag);
		owned[tag] = false;
		b->nr_owned--;
		fake_answered(f, tag, elems[i].result);
	}
	return cmd->nr_elem * 8;
}

/* A command on the char device; it leaves a NOP. */
static void do_cmd(struct fake *f, struct io_uring_sqe *sqe)
{
	struct fake_batch *b = &f->batch;
	const struct ublk_elem_header *elems = (const void *)(uintptr_t)sqe->addr;
	const uint64_t user_data = sqe->user_data;
	bool skip = sqe->flags & IOSQE_CQE_SKIP_SUCCESS;
	struct ublk_batch_io cmd;
	int res;

	memcpy(&cmd, (char *)sqe + 48, sizeof(cmd));
	CHECK(sqe->flags & IOSQE_FIXED_FILE);
	CHECK_EQ(cmd.q_id, f->p.qid);
	switch (sqe->off) {
	case UBLK_U_IO_PREP_IO_CMDS:
		res = do_prep(f, &cmd, elems);
		break;
	case UBLK_U_IO_COMMIT_IO_CMDS:
		res = do_commit(f, &cmd, elems);
		break;
	case UBLK_U_IO_FETCH_IO_CMDS:
		CHECK_EQ(cmd.elem_bytes, 2);
		CHECK_EQ(cmd.flags, 0);
		CHECK(sqe->flags & IOSQE_BUFFER_SELECT);
		CHECK(sqe->rw_flags & 2); /* multishot */
		CHECK(!b->fetching);
		b->fetches++;
		b->fetching = b->prepared;
		b->fetch_ud = user_data;
		skip = true;
		res = b->prepared ? 0 : -ENODEV;
		break;
	default:
		check_failed(__FILE__, __LINE__, "command %llx", (unsigned long long)sqe->off);
	}
	if (!skip || res < 0)
		patch(b, res, 0);
	become_nop(sqe, user_data, skip && res >= 0);
}

/* A CQE of FETCH; false if there is no room for it now. */
static bool post(struct fake *f, int32_t res, uint32_t flags)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&f->q->ring);

	if (!sqe)
		return false;
	become_nop(sqe, f->batch.fetch_ud, false);
	patch(&f->batch, res, flags);
	f->batch.fetching = flags & IORING_CQE_F_MORE;
	return true;
}

static unsigned fill(struct fake *f, uint16_t *list, unsigned room)
{
	struct fake_batch *b = &f->batch;
	const unsigned depth = f->p.depth, start = (unsigned)below(b, depth);
	unsigned most = b->one_by_one ? 1 : room < DRIVER_TAGS ? room : DRIVER_TAGS, n = 0;

	if (b->below && b->below(2))
		most = 1 + (unsigned)b->below(most);
	if (b->false_tags) {
		memcpy(list, b->false_tags, b->nr_false_tags * 2);
		b->false_tags = NULL;
		return b->nr_false_tags;
	}
	for (unsigned i = 0; i < depth && n < most; i++) {
		const unsigned tag = (start + i) % depth;

		if (owned[tag] || (b->stop_after && f->next >= b->stop_after) || !fake_deliver(f, tag))
			continue;
		owned[tag] = true;
		b->nr_owned++;
		list[n++] = (uint16_t)tag;
	}
	return n;
}

/* Requests for the tags that are free, as long as there are some and it suits. */
static void deliver(struct fake *f)
{
	struct fake_batch *b = &f->batch;

	while (b->fetching && io_uring_sq_space_left(&f->q->ring)) {
		const bool all_given = f->next == f->nr_requests || (b->stop_after && f->next >= b->stop_after);
		struct io_uring_buf *buf;
		uint32_t flags;
		unsigned n;

		if (b->fetch_error) {
			post(f, b->fetch_error, 0);
			return;
		}
		if (all_given) {
			if (!f->hold && (b->stop_after || !b->nr_owned))
				post(f, -ENODEV, 0);
			return;
		}
		if (b->nr_owned == f->p.depth)
			return;
		if (b->below && b->nr_owned && !b->below(8))
			return;
		if (b->head == b->ring->tail) {
			b->starved++;
			post(f, -ENOBUFS, 0);
			return;
		}
		buf = &b->ring->bufs[b->head & (b->nr_buffers - 1)];
		n = fill(f, (uint16_t *)(uintptr_t)buf->addr, buf->len / 2);
		if (!n)
			return;
		b->head++;
		flags = IORING_CQE_F_BUFFER | (uint32_t)buf->bid << IORING_CQE_BUFFER_SHIFT;
		/* Now and then the kernel ends a multishot by its own. */
		if (!b->below || b->below(16))
			flags |= IORING_CQE_F_MORE;
		CHECK(post(f, (int32_t)(n * 2), flags));
	}
}

/* Of what the kernel has not taken yet, the first n. How many of them are the target's? */
static unsigned do_cmds(struct fake *f, unsigned n)
{
	struct io_uring_sq *sq = &f->q->ring.sq;
	unsigned nr_targets = 0;

	for (unsigned i = *sq->khead; i != sq->sqe_tail && n; i++, n--) {
		struct io_uring_sqe *sqe = &sq->sqes[i & *sq->kring_mask];

		if (sqe->opcode == IORING_OP_URING_CMD && sqe->fd == UBLKD_FILE_CDEV)
			do_cmd(f, sqe);
		/* The driver's pages begin at 0, ours somewhere. */
		else if (sqe->opcode == IORING_OP_READ_FIXED || sqe->opcode == IORING_OP_WRITE_FIXED)
			sqe->addr += (uintptr_t)f->pages[sqe->buf_index];
		nr_targets += ublkd_ud_kind(sqe->user_data) == UBLKD_UD_TARGET;
	}
	return nr_targets;
}

/*
 * Submit the first n of what is queued, which liburing has no call for, and
 * wait for an end of the target's I/O, so that there are answers while others
 * are not submitted.
 */
static int submit_some(struct fake *f, unsigned n)
{
	struct io_uring_sq *sq = &f->q->ring.sq;
	unsigned tail = *sq->ktail;
	const unsigned wait = do_cmds(f, n) ? 1 : 0;

	for (; sq->sqe_head != sq->sqe_tail; sq->sqe_head++)
		sq->array[tail++ & *sq->kring_mask] = sq->sqe_head & *sq->kring_mask;
	__atomic_store_n(sq->ktail, tail, __ATOMIC_RELEASE);
	return (int)syscall(SYS_io_uring_enter, f->q->ring.ring_fd, n, wait, wait ? IORING_ENTER_GETEVENTS : 0, NULL, 0);
}

static void patch_cqes(struct fake *f)
{
	struct fake_batch *b = &f->batch;
	struct io_uring_cq *cq = &f->q->ring.cq;
	const unsigned tail = __atomic_load_n(cq->ktail, __ATOMIC_ACQUIRE);
	const unsigned size = sizeof(patches) / sizeof(patches[0]);

	for (; b->seen != tail; b->seen++) {
		struct io_uring_cqe *cqe = &cq->cqes[b->seen & *cq->kring_mask];

		if (ublkd_ud_kind(cqe->user_data) != UBLKD_UD_CMD)
			continue;
		CHECK(b->patch_head != b->patch_tail);
		cqe->res = patches[b->patch_head % size].res;
		cqe->flags = patches[b->patch_head++ % size].flags;
	}
}

static bool is_ours(const struct io_uring *ring)
{
	return current && current->q && ring == &current->q->ring && current->batch.ring;
}

static int submit(struct io_uring *ring, unsigned wait)
{
	struct fake *f = current;
	int ret;

	/* It may get nothing done, or only a part of it, and what was queued stays. */
	if (f->batch.prepared && f->batch.below && !f->batch.below(16))
		return wait ? -EINTR : -EBUSY;
	if (f->batch.prepared && f->batch.below && !f->batch.below(4)) {
		ret = submit_some(f, (unsigned)f->batch.below(io_uring_sq_ready(ring) + 1));
		patch_cqes(f);
		return ret;
	}
	do_cmds(f, io_uring_sq_ready(ring));
	ret = __real_io_uring_submit(ring);
	if (ret >= 0) {
		deliver(f);
		ret = wait ? __real_io_uring_submit_and_wait(ring, wait) : __real_io_uring_submit(ring);
	}
	patch_cqes(f);
	return ret;
}

int __wrap_io_uring_submit(struct io_uring *ring)
{
	return is_ours(ring) ? submit(ring, 0) : __real_io_uring_submit(ring);
}

int __wrap_io_uring_submit_and_wait(struct io_uring *ring, unsigned n)
{
	return is_ours(ring) ? submit(ring, n) : __real_io_uring_submit_and_wait(ring, n);
}
