/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The transports with commands for many tags at once (UBLK_F_BATCH_IO, Linux
 * 7.0): PREP gives the driver all tags, one multishot FETCH brings the tags of
 * new requests, in buffers that we provide, and one COMMIT carries the answers
 * of a pass. Who moves the data is as in transport_tag.c.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>

#include "dispatch.h"
#include "error.h"

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif

#ifndef IORING_URING_CMD_MULTISHOT
#define IORING_URING_CMD_MULTISHOT (1U << 1)
#endif

/* Which command a CQE is of, in the place of its tag. */
enum { CMD_PREP, CMD_FETCH, CMD_COMMIT };

#define BUFFER_GROUP 0
/* Most tags that the driver puts in one buffer. */
#define BUFFER_TAGS 128
/* Every request could come in a buffer of its own; where they run out, the others come after the next pass. */
#define MAX_BUFFERS 64
/*
 * Answers per COMMIT. The driver copies 480 bytes of them at a time, so that a
 * COMMIT whose memory can't be read answers nothing and fails; of a longer one
 * it could leave out the end, and say so in a success.
 */
#define COMMIT_MAX 60
/* Without a request in between. As long as no CQE is lost, a FETCH finds a buffer the next time. */
#define MAX_STARVED 16

struct ublkd_batch {
	/*
	 * Answers, where the driver reads them when a COMMIT is submitted: a ring
	 * of depth elements. A tag has no second answer before the driver has read
	 * the first, so what it did not read yet is never overwritten.
	 */
	struct ublk_elem_header *elems;
	unsigned put;        /* where the next goes */
	unsigned nr_waiting; /* the last so many are in no COMMIT yet */
	unsigned sq_mark;    /* the submission queue's tail behind the last command that reads them */

	struct io_uring_buf_ring *ring; /* mapped, with the buffers behind it */
	uint16_t *tags;
	size_t map_bytes;
	unsigned nr_buffers;
	unsigned buffer_tags;

	unsigned starved;
	bool fetching; /* a FETCH is with the driver */
	bool gone;     /* it gives no more requests out */
};

static struct io_uring_sqe *queue_cmd(struct ublkd_queue *q, uint32_t cmd_op, struct ublk_batch_io cmd,
				      const void *elems, uint16_t which)
{
	struct io_uring_sqe *sqe = ublkd_queue_sqe(q);

	cmd.q_id = q->p.qid;
	io_uring_prep_rw(IORING_OP_URING_CMD, sqe, UBLKD_FILE_CDEV, elems, 0, 0);
	sqe->off = cmd_op;
	sqe->flags = IOSQE_FIXED_FILE;
	sqe->user_data = ublkd_ud_pack(UBLKD_UD_CMD, which, 0);
	/* As in transport_tag.c. */
	memcpy((char *)sqe + 48, &cmd, sizeof(cmd));
	return sqe;
}

static struct io_uring_sqe *queue_elems(struct ublkd_queue *q, uint32_t cmd_op, unsigned first, unsigned n,
					uint16_t which)
{
	struct ublkd_batch *b = q->batch;
	struct ublk_batch_io cmd = {
		.flags = q->tp->registers ? UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK : 0,
		.nr_elem = (uint16_t)n,
		.elem_bytes = sizeof(*b->elems),
	};
	struct io_uring_sqe *sqe = queue_cmd(q, cmd_op, cmd, b->elems + first, which);

	b->sq_mark = q->ring.sq.sqe_tail;
	return sqe;
}

static void queue_fetch(struct ublkd_queue *q)
{
	struct ublk_batch_io cmd = { .elem_bytes = sizeof(uint16_t) };
	struct io_uring_sqe *sqe = queue_cmd(q, UBLK_U_IO_FETCH_IO_CMDS, cmd, NULL, CMD_FETCH);

	sqe->flags |= IOSQE_BUFFER_SELECT;
	sqe->buf_group = BUFFER_GROUP;
	sqe->rw_flags = IORING_URING_CMD_MULTISHOT;
	q->batch->fetching = true;
}

static uint16_t *buffer(const struct ublkd_batch *b, unsigned id)
{
	return b->tags + (size_t)id * b->buffer_tags;
}

static void provide(struct ublkd_batch *b, unsigned id)
{
	io_uring_buf_ring_add(b->ring, buffer(b, id), b->buffer_tags * (unsigned)sizeof(uint16_t), (unsigned short)id,
			      io_uring_buf_ring_mask(b->nr_buffers), 0);
	io_uring_buf_ring_advance(b->ring, 1);
}

/*
 * Where no other process has anything. When a server has ended, Linux 7.2 gives
 * its FETCH the requests that came meanwhile in a kernel thread, and writes their
 * tags to our addresses there (ublk_batch_tw_cb, by io_cancel_local_task_work):
 * into whatever process's memory that thread happens to run on. Workers are
 * forked from one supervisor, and would all have their buffers at the same place.
 * Where nothing is, the write fails, and the requests go back to be issued again.
 */
static void *map_apart(size_t bytes)
{
	/* Between what programs and what the kernel's own choice of addresses use; the second for small address spaces. */
	static const uint64_t spans[][2] = { { 1ull << 45, 1ull << 45 }, { 1ull << 36, 1ull << 36 } };
	void *map = MAP_FAILED;

	for (unsigned try = 0; try < 16 && map == MAP_FAILED; try++) {
		const uint64_t *span = spans[try / 8];
		uint64_t random;
		void *at;

		if (getrandom(&random, sizeof(random), 0) != sizeof(random))
			return MAP_FAILED;
		at = (void *)(uintptr_t)(span[0] + (random % span[1] & ~0xffffull));
		map = mmap(at, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	}
	return map;
}

static int make_buffers(struct ublkd_queue *q)
{
	struct ublkd_batch *b = q->batch;
	struct io_uring_buf_reg reg = { .bgid = BUFFER_GROUP };
	size_t ring_bytes;
	void *map;
	int ret;

	b->buffer_tags = q->p.depth < BUFFER_TAGS ? q->p.depth : BUFFER_TAGS;
	for (b->nr_buffers = 1; b->nr_buffers < q->p.depth && b->nr_buffers < MAX_BUFFERS;)
		b->nr_buffers *= 2;
	ring_bytes = b->nr_buffers * sizeof(struct io_uring_buf);
	b->map_bytes = ring_bytes + (size_t)b->nr_buffers * b->buffer_tags * sizeof(uint16_t);
	map = map_apart(b->map_bytes);
	if (map == MAP_FAILED)
		return ublkd_error(-ENOMEM, "no memory for lists of tags");
	b->ring = map;
	b->tags = (uint16_t *)((char *)map + ring_bytes);
	io_uring_buf_ring_init(b->ring);
	reg.ring_addr = (uintptr_t)map;
	reg.ring_entries = b->nr_buffers;
	ret = io_uring_register_buf_ring(&q->ring, &reg, 0);
	if (ret < 0)
		return ublkd_error(ret, "queue %u: cannot register buffers with io_uring: %s", q->p.qid, strerror(-ret));
	for (unsigned id = 0; id < b->nr_buffers; id++)
		provide(b, id);
	return 0;
}

static void add_elem(struct ublkd_queue *q, uint16_t tag, int32_t result)
{
	struct ublkd_batch *b = q->batch;

	b->elems[b->put] = (struct ublk_elem_header){
		.tag = tag,
		.buf_index = q->tp->registers ? tag : 0,
		.result = result,
	};
	b->put = b->put + 1 == q->p.depth ? 0 : b->put + 1;
}

static int batch_arm(struct ublkd_queue *q)
{
	int ret;

	/* PREP takes a queue's tags all at once, and a FETCH brings any of them. */
	if (q->p.shares > 1)
		return ublkd_error(-EINVAL, "one worker serves a queue with batches");
	q->batch = calloc(1, sizeof(*q->batch));
	if (!q->batch)
		return ublkd_error(-ENOMEM, "no memory for batches");
	q->batch->elems = calloc(q->p.depth, sizeof(*q->batch->elems));
	if (!q->batch->elems)
		return ublkd_error(-ENOMEM, "no memory for batches");
	ret = make_buffers(q);
	if (ret < 0)
		return ret;
	for (unsigned tag = 0; tag < q->p.depth; tag++)
		add_elem(q, (uint16_t)tag, 0);
	queue_elems(q, UBLK_U_IO_PREP_IO_CMDS, 0, q->p.depth, CMD_PREP);
	queue_fetch(q);
	return 0;
}

static int batch_zero_copy_arm(struct ublkd_queue *q)
{
	int ret = ublkd_register_requests(q);

	return ret < 0 ? ret : batch_arm(q);
}

static void batch_close(struct ublkd_queue *q)
{
	struct ublkd_batch *b = q->batch;

	if (!b)
		return;
	/* A FETCH that is torn down in the background has its buffers until the process ends. */
	if (b->ring && !b->fetching)
		munmap(b->ring, b->map_bytes);
	free(b->elems);
	free(b);
	q->batch = NULL;
}

/* The driver gives no tag out again: those that we don't hold are gone. */
static void idle_tags_gone(struct ublkd_queue *q)
{
	for (unsigned tag = 0; tag < q->p.depth; tag++)
		if (q->ios[tag].state == UBLKD_IO_DRIVER)
			ublkd_dispatch_gone(q, (uint16_t)tag);
}

static int take_tags(struct ublkd_queue *q, unsigned id, unsigned bytes)
{
	struct ublkd_batch *b = q->batch;
	int ret;

	if (id >= b->nr_buffers || bytes > b->buffer_tags * sizeof(uint16_t) || bytes % sizeof(uint16_t))
		return ublkd_error(-EPROTO, "queue %u: the driver filled buffer %u with %u bytes", q->p.qid, id, bytes);
	ret = ublkd_dispatch_requests(q, buffer(b, id), bytes / (unsigned)sizeof(uint16_t));
	provide(b, id);
	return ret;
}

static int fetch_cqe(struct ublkd_queue *q, int32_t res, uint32_t flags)
{
	struct ublkd_batch *b = q->batch;
	int ret = 0;

	if (!(flags & IORING_CQE_F_MORE))
		b->fetching = false;
	if (flags & IORING_CQE_F_BUFFER) {
		ret = take_tags(q, flags >> IORING_CQE_BUFFER_SHIFT, res > 0 ? (unsigned)res : 0);
		b->starved = 0;
	} else if (res > 0) {
		return ublkd_error(-EPROTO, "queue %u: the driver brought tags without a buffer", q->p.qid);
	}
	if (res == UBLK_IO_RES_ABORT) {
		b->gone = true;
		idle_tags_gone(q);
		return ret;
	}
	if (res == -ENOBUFS ? ++b->starved > MAX_STARVED : res < 0)
		return ublkd_error(res, "queue %u: the driver ended the fetching of requests: %s", q->p.qid,
				   strerror(-res));
	return ret;
}

static int batch_cqe(struct ublkd_queue *q, uint16_t which, int32_t res, uint32_t flags)
{
	if (which == CMD_FETCH)
		return fetch_cqe(q, res, flags);
	if (res < 0)
		return ublkd_error(res, "queue %u: the driver did not %s: %s", q->p.qid,
				   which == CMD_PREP ? "take the tags" : "take answers", strerror(-res));
	/* The tags of this COMMIT were ours when the others went. */
	if (which == CMD_COMMIT && q->batch->gone)
		idle_tags_gone(q);
	return 0;
}

static bool all_read(const struct ublkd_queue *q)
{
	return io_uring_sq_ready(&q->ring) <= q->ring.sq.sqe_tail - q->batch->sq_mark;
}

static void batch_commit(struct ublkd_queue *q, struct ublkd_io *const *ios, unsigned n)
{
	struct ublkd_batch *b = q->batch;

	/* From the front, if that is free: a COMMIT can't go round the end. */
	if (!b->nr_waiting && all_read(q))
		b->put = 0;
	for (unsigned i = 0; i < n; i++)
		add_elem(q, ios[i]->tag, ios[i]->result);
	b->nr_waiting += n;
}

static void batch_flush(struct ublkd_queue *q)
{
	struct ublkd_batch *b = q->batch;
	const unsigned depth = q->p.depth;

	while (b->nr_waiting) {
		const unsigned first = (b->put + depth - b->nr_waiting) % depth;
		unsigned n = b->nr_waiting < COMMIT_MAX ? b->nr_waiting : COMMIT_MAX;
		struct io_uring_sqe *sqe;

		if (n > depth - first)
			n = depth - first;
		sqe = queue_elems(q, UBLK_U_IO_COMMIT_IO_CMDS, first, n, CMD_COMMIT);
		/* Its CQE would end the wait for requests. When there are no more of these, it is what we wait for. */
		if (!b->gone)
			sqe->flags |= IOSQE_CQE_SKIP_SUCCESS;
		b->nr_waiting -= n;
	}
	if (!b->fetching && !b->gone)
		queue_fetch(q);
}

const struct ublkd_transport ublkd_transport_batch_user_copy = {
	.name = "user-copy, batched",
	.arm = batch_arm,
	.cqe = batch_cqe,
	.commit = batch_commit,
	.flush = batch_flush,
	.close = batch_close,
	.pull = ublkd_user_copy_pull,
	.push = ublkd_user_copy_push,
};

const struct ublkd_transport ublkd_transport_batch_zero_copy = {
	.name = "zero-copy, batched",
	.registers = true,
	.arm = batch_zero_copy_arm,
	.cqe = batch_cqe,
	.commit = batch_commit,
	.flush = batch_flush,
	.close = batch_close,
	.pull = ublkd_user_copy_pull,
	.push = ublkd_user_copy_push,
};
