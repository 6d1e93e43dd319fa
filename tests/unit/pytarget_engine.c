/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Plays the engine for the Python target: gives it the services of target.h,
 * delivers requests, records answers and carries out what it queues on the
 * ring when told to, whole or in part. Apart from the buffers, as on user copy,
 * a request's data is where only pull and push reach it, and these know a
 * write from a read. Built by test_pytarget_callout.py.
 */
#include <errno.h>
#include <liburing.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "layout.h"
#include "target.h"

struct pending {
	struct io_uring_sqe sqe;
	struct ublkd_io *io;
	uint8_t slot;
};

struct ublkd_queue {
	struct ublkd_target *target;
	struct ublkd_services sv;
	struct ublkd_shm_queue shm;
	unsigned depth, qid;
	uint32_t max_io;
	struct ublkd_io *ios;
	bool apart;       /* the driver does not copy */
	char **pages;     /* per tag: the request's data; if not apart, the buffer */
	int move_error;   /* what pull and push fail with */
	unsigned moves;   /* by them */
	unsigned straight; /* of these, not to or from the tag's buffer */
	int *answers;     /* per tag */
	char *answered;   /* per tag: 0 open, 1 answered */
	unsigned double_answers;
	struct ublkd_event *events;
	unsigned nr_events;
	struct pending *sqes;
	unsigned nr_sqes;
};

static void sv_complete(struct ublkd_queue *q, struct ublkd_io *io, int32_t res)
{
	if (q->answered[io->tag])
		q->double_answers++;
	q->answered[io->tag] = 1;
	q->answers[io->tag] = res;
}

/* May it be? Then 0, or what it is to fail with. */
static int64_t move(struct ublkd_queue *q, struct ublkd_io *io, unsigned op, uint32_t off, const void *mem,
		    uint32_t len)
{
	if (!q->apart || io->op != op || q->answered[io->tag] || off > io->length || len > io->length - off)
		abort();
	if (q->move_error)
		return q->move_error;
	q->moves++;
	q->straight += mem != (char *)io->buf + off;
	return 0;
}

static int64_t sv_pull(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, void *dst, uint32_t len)
{
	int64_t err = move(q, io, UBLKD_OP_WRITE, off, dst, len);

	if (err)
		return err;
	memcpy(dst, q->pages[io->tag] + off, len);
	return len;
}

static int64_t sv_push(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, const void *src, uint32_t len)
{
	int64_t err = move(q, io, UBLKD_OP_READ, off, src, len);

	if (err)
		return err;
	memcpy(q->pages[io->tag] + off, src, len);
	return len;
}

static bool sv_driver_copies(const struct ublkd_queue *q)
{
	return !q->apart;
}

static struct io_uring_sqe *sv_sqe(struct ublkd_queue *q)
{
	struct io_uring_sqe *sqe = &q->sqes[q->nr_sqes].sqe;

	memset(sqe, 0, sizeof(*sqe));
	return sqe;
}

static void sv_sqe_own(struct ublkd_queue *q, struct io_uring_sqe *sqe, struct ublkd_io *io, uint8_t slot)
{
	struct pending *p = &q->sqes[q->nr_sqes++];

	if (sqe != &p->sqe || q->nr_sqes > q->depth)
		abort();
	p->io = io;
	p->slot = slot;
}

static struct ublkd_io *sv_io(struct ublkd_queue *q, unsigned tag)
{
	return &q->ios[tag];
}

static unsigned sv_depth(const struct ublkd_queue *q)
{
	return q->depth;
}

static unsigned sv_qid(const struct ublkd_queue *q)
{
	return q->qid;
}

static uint32_t sv_max_io_bytes(const struct ublkd_queue *q)
{
	return q->max_io;
}

static struct ublkd_shm_queue *sv_shm(struct ublkd_queue *q)
{
	return &q->shm;
}

void engine_destroy(struct ublkd_queue *q)
{
	if (q->target) {
		if (q->target->ops->close)
			q->target->ops->close(q->target, q);
		q->target->ops->destroy(q->target);
	}
	for (unsigned i = 0; i < q->depth; i++) {
		free(q->ios[i].buf);
		if (q->apart)
			free(q->pages[i]);
	}
	free(q->pages);
	free(q->ios);
	free(q->answers);
	free(q->answered);
	free(q->events);
	free(q->sqes);
	free(q);
}

/* Takes over the target at this address; NULL if it refuses to open. */
struct ublkd_queue *engine_create(uintptr_t target, unsigned depth, uint32_t max_io, unsigned qid, bool apart)
{
	struct ublkd_queue *q = calloc(1, sizeof(*q));
	struct ublkd_target *t = (struct ublkd_target *)target;

	q->sv = (struct ublkd_services){
		.size = sizeof(q->sv), .complete = sv_complete, .pull = sv_pull, .push = sv_push,
		.sqe = sv_sqe, .sqe_own = sv_sqe_own, .io = sv_io, .depth = sv_depth, .qid = sv_qid,
		.max_io_bytes = sv_max_io_bytes, .shm = sv_shm, .driver_copies = sv_driver_copies,
	};
	q->depth = depth;
	q->qid = qid;
	q->max_io = max_io;
	q->apart = apart;
	q->pages = calloc(depth, sizeof(*q->pages));
	q->ios = calloc(depth, sizeof(*q->ios));
	q->answers = calloc(depth, sizeof(*q->answers));
	q->answered = calloc(depth, 1);
	q->events = calloc(2 * depth, sizeof(*q->events));
	q->sqes = calloc(depth + 1, sizeof(*q->sqes));
	for (unsigned i = 0; i < depth; i++) {
		q->ios[i].tag = (uint16_t)i;
		/* Exactly max_io bytes each: a sanitizer then sees the first byte beyond. */
		q->ios[i].buf = malloc(max_io);
		memset(q->ios[i].buf, 0, max_io);
		q->pages[i] = apart ? malloc(max_io) : q->ios[i].buf;
		memset(q->pages[i], 0xee, max_io);
	}
	t->sv = &q->sv;
	if (t->ops->size != sizeof(*t->ops) || t->ops->abi != UBLKD_TARGET_ABI ||
	    !(t->ops->flags & UBLKD_TARGET_WANTS_BUFFER) || t->ops->open(t, q) < 0) {
		engine_destroy(q);
		return NULL;
	}
	q->target = t;
	return q;
}

/* Arrives with the next pass. */
void engine_request(struct ublkd_queue *q, unsigned tag, unsigned op, uint32_t flags, uint64_t offset,
		    uint32_t length)
{
	struct ublkd_io *io = &q->ios[tag];

	io->offset = offset;
	io->length = length;
	io->flags = flags | op;
	io->op = (uint8_t)op;
	memset(io->priv, 0, sizeof(io->priv));
	q->answered[tag] = 0;
	q->events[q->nr_events++] = (struct ublkd_event){ .io = io, .kind = UBLKD_EVENT_REQUEST };
}

void engine_pass(struct ublkd_queue *q)
{
	unsigned n = q->nr_events;

	q->nr_events = 0;
	if (n)
		q->target->ops->handle(q->target, q, q->events, n);
}

/* 1 and the result, or 0 while the request is open. */
int engine_answer(struct ublkd_queue *q, unsigned tag, int *ret)
{
	*ret = q->answers[tag];
	return q->answered[tag];
}

static int execute(const struct io_uring_sqe *sqe, unsigned max_bytes)
{
	unsigned len = sqe->len < max_bytes ? sqe->len : max_bytes;
	ssize_t n;

	switch (sqe->opcode) {
	case IORING_OP_READ:
		n = pread(sqe->fd, (void *)(uintptr_t)sqe->addr, len, (off_t)sqe->off);
		break;
	case IORING_OP_WRITE:
		n = pwrite(sqe->fd, (void *)(uintptr_t)sqe->addr, len, (off_t)sqe->off);
		break;
	case IORING_OP_FSYNC:
		n = fdatasync(sqe->fd);
		break;
	case IORING_OP_TIMEOUT:
		return -ETIME;
	default:
		return -EINVAL;
	}
	return n < 0 ? -errno : (int)n;
}

/*
 * Complete all that was queued; the results arrive with the next pass. At most
 * max_bytes are moved per transfer; force_res, if not 0, is the result of all.
 */
unsigned engine_run_sqes(struct ublkd_queue *q, unsigned max_bytes, int force_res)
{
	unsigned n = q->nr_sqes;

	for (unsigned i = 0; i < n; i++) {
		struct pending *p = &q->sqes[i];

		q->events[q->nr_events++] = (struct ublkd_event){
			.io = p->io,
			.res = force_res ? force_res : execute(&p->sqe, max_bytes),
			.kind = UBLKD_EVENT_CQE,
			.slot = p->slot,
		};
	}
	q->nr_sqes = 0;
	return n;
}

/* Opcode, rw_flags and, for a timeout, nanoseconds of the i-th SQE queued. */
void engine_sqe(struct ublkd_queue *q, unsigned i, unsigned *ret_opcode, uint32_t *ret_flags, uint64_t *ret_ns)
{
	const struct io_uring_sqe *sqe = &q->sqes[i].sqe;
	const struct __kernel_timespec *ts = (const void *)(uintptr_t)sqe->addr;

	*ret_opcode = sqe->opcode;
	*ret_flags = (uint32_t)sqe->rw_flags;
	*ret_ns = sqe->opcode == IORING_OP_TIMEOUT ? (uint64_t)ts->tv_sec * 1000000000ull + (uint64_t)ts->tv_nsec : 0;
}

/* A request's data, as the driver has it. */
void *engine_data(struct ublkd_queue *q, unsigned tag)
{
	return q->pages[tag];
}

void engine_fail_moves(struct ublkd_queue *q, int error)
{
	q->move_error = error;
}

/* Pulls and pushes, and how many of them passed the tag's buffer by. */
unsigned engine_moves(struct ublkd_queue *q, unsigned *ret_straight)
{
	*ret_straight = q->straight;
	return q->moves;
}

uint64_t engine_python_entries(struct ublkd_queue *q)
{
	return q->shm.python_entries;
}

unsigned engine_double_answers(struct ublkd_queue *q)
{
	return q->double_answers;
}

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

/* Best of `passes` passes of n requests each at random blocks of [0, span): ns per request. */
double engine_bench(struct ublkd_queue *q, unsigned op, uint32_t length, unsigned n, uint64_t span, unsigned passes)
{
	uint64_t best = UINT64_MAX, seed = 88172645463325252ull;

	for (unsigned pass = 0; pass < passes; pass++) {
		uint64_t start;

		for (unsigned tag = 0; tag < n; tag++) {
			seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
			engine_request(q, tag, op, 0, seed % (span / length) * length, length);
		}
		start = now_ns();
		do {
			engine_pass(q);
		} while (engine_run_sqes(q, UINT32_MAX, 0));
		start = now_ns() - start;
		if (start < best)
			best = start;
	}
	return (double)best / n;
}
