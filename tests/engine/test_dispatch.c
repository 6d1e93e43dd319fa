/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The one way in and out of the engine: what a target gets to see, what
 * becomes of its answers, and the services it is given. The target here does
 * as each test says.
 */
#include <fcntl.h>
#include <unistd.h>

#include "fake.h"

struct scripted {
	struct ublkd_target t;
	struct ublkd_target_ops ops;
	void (*request)(struct scripted *s, struct ublkd_queue *q, struct ublkd_io *io);
	void (*cqe)(struct scripted *s, struct ublkd_queue *q, struct ublkd_event *ev);
	unsigned requests, cqes, opens, closes;
	int open_result;
};

static int scripted_open(struct ublkd_target *t, struct ublkd_queue *q)
{
	struct scripted *s = (struct scripted *)t;

	CHECK(t->sv);
	CHECK_EQ(t->sv->size, sizeof(struct ublkd_services));
	CHECK_EQ(t->sv->depth(q), q->p.depth);
	CHECK_EQ(t->sv->qid(q), q->p.qid);
	CHECK_EQ(t->sv->max_io_bytes(q), q->p.max_io_bytes);
	CHECK_EQ(t->sv->driver_copies(q), q->tp->needs_buffers);
	CHECK(t->sv->shm(q) == q->shm);
	for (unsigned tag = 0; tag < q->p.depth; tag++)
		CHECK_EQ(t->sv->io(q, tag)->tag, tag);
	s->opens++;
	return s->open_result;
}

static void scripted_handle(struct ublkd_target *t, struct ublkd_queue *q, struct ublkd_event *events, unsigned n)
{
	struct scripted *s = (struct scripted *)t;

	CHECK(n >= 1);
	for (unsigned i = 0; i < n; i++) {
		if (events[i].kind == UBLKD_EVENT_REQUEST) {
			s->requests++;
			s->request(s, q, events[i].io);
		} else {
			s->cqes++;
			CHECK(s->cqe);
			s->cqe(s, q, &events[i]);
		}
	}
}

static void scripted_close(struct ublkd_target *t, struct ublkd_queue *q)
{
	(void)q;
	((struct scripted *)t)->closes++;
}

static void scripted_destroy(struct ublkd_target *t)
{
	(void)t;
}

static struct scripted scripted(void (*request)(struct scripted *, struct ublkd_queue *, struct ublkd_io *))
{
	return (struct scripted){
		.ops = {
			.size = sizeof(struct ublkd_target_ops),
			.abi = UBLKD_TARGET_ABI,
			.name = "scripted",
			.open = scripted_open,
			.handle = scripted_handle,
			.close = scripted_close,
			.destroy = scripted_destroy,
		},
		.request = request,
	};
}

static void serve(struct scripted *s, struct fake *f, const struct ublkd_transport *tp, struct fake_request *reqs,
		  unsigned n)
{
	s->t.ops = &s->ops;
	fake_serve(f, tp, &s->t, reqs, n);
	CHECK_EQ(s->opens, 1);
	CHECK_EQ(s->closes, 1);
	fake_free(f);
}

static void answer_length(struct scripted *s, struct ublkd_queue *q, struct ublkd_io *io)
{
	CHECK(!io->priv[0] && !io->priv[1] && !io->priv[2]);
	io->priv[0] = io->priv[1] = io->priv[2] = ~0ull;
	s->t.sv->complete(q, io, io->op == UBLKD_OP_READ || io->op == UBLKD_OP_WRITE ? (int32_t)io->length : 0);
}

static void test_range(void)
{
	enum { SECTORS = 1024 };
	static const struct {
		struct fake_request r;
		int32_t result;
	} cases[] = {
		{ { .op = UBLKD_OP_READ, .sectors = 128 }, 128 << 9 },
		{ { .op = UBLKD_OP_READ, .sectors = 1, .sector = SECTORS - 1 }, 512 },
		{ { .op = UBLKD_OP_WRITE, .sectors = 8, .sector = SECTORS - 8 }, 4096 },
		/* Up to 4 GiB, no buffer holds it and none has to. */
		{ { .op = UBLKD_OP_DISCARD, .sectors = SECTORS }, 0 },
		{ { .op = UBLKD_OP_FLUSH, .sector = ~0ull, .sectors = ~0u }, 0 },
		/* Everything from here on is answered before the target. */
		{ { .op = UBLKD_OP_READ, .sectors = 0 }, -EIO },
		{ { .op = UBLKD_OP_WRITE, .sectors = 0, .sector = 1 }, -EIO },
		{ { .op = UBLKD_OP_DISCARD, .sectors = 0 }, -EIO },
		{ { .op = UBLKD_OP_WRITE_ZEROES, .sectors = 0 }, -EIO },
		{ { .op = UBLKD_OP_READ, .sectors = 129 }, -EIO }, /* more than max_io_bytes */
		{ { .op = UBLKD_OP_WRITE, .sectors = ~0u }, -EIO },
		{ { .op = UBLKD_OP_READ, .sectors = 2, .sector = SECTORS - 1 }, -EIO },
		{ { .op = UBLKD_OP_READ, .sectors = 1, .sector = SECTORS }, -EIO },
		{ { .op = UBLKD_OP_WRITE_ZEROES, .sectors = 1, .sector = SECTORS }, -EIO },
		{ { .op = UBLKD_OP_DISCARD, .sectors = SECTORS + 1 }, -EIO },
		{ { .op = UBLKD_OP_DISCARD, .sectors = 1u << 23 }, -EIO }, /* 2^32 bytes */
		{ { .op = UBLKD_OP_WRITE_ZEROES, .sectors = (1u << 23) + 1 }, -EIO },
		/* A sector number of which the byte offset would wrap, into the device. */
		{ { .op = UBLKD_OP_READ, .sectors = 1, .sector = 1ull << 55 }, -EIO },
		{ { .op = UBLKD_OP_WRITE, .sectors = 1, .sector = (1ull << 55) + 5 }, -EIO },
		{ { .op = UBLKD_OP_DISCARD, .sectors = 8, .sector = 0xff80000000000000ull }, -EIO },
		{ { .op = UBLKD_OP_READ, .sectors = 1, .sector = ~0ull }, -EIO },
		{ { .op = UBLKD_OP_READ, .sectors = 2, .sector = ~0ull >> 9 }, -EIO },
		/* Operations without a meaning here: write same, zone append, report zones, ... */
		{ { .op = 4, .sectors = 1 }, -EOPNOTSUPP },
		{ { .op = 6, .sectors = 1 }, -EOPNOTSUPP },
		{ { .op = 7, .sectors = 1 }, -EOPNOTSUPP },
		{ { .op = 18, .sectors = 1 }, -EOPNOTSUPP },
		{ { .op = 255, .sectors = 1 }, -EOPNOTSUPP },
	};
	enum { N = sizeof(cases) / sizeof(cases[0]), SEEN = 5 };
	const struct ublkd_transport *transports[] = { &fake_copy, &fake_user_copy };

	for (int i = 0; i < 2; i++) {
		struct scripted s = scripted(answer_length);
		struct fake_request reqs[N];

		for (int n = 0; n < N; n++)
			reqs[n] = cases[n].r;
		s.ops.flags = UBLKD_TARGET_WANTS_BUFFER;
		serve(&s, fake_new(SECTORS << 9), transports[i], reqs, N);
		CHECK_EQ(s.requests, SEEN);
		for (int n = 0; n < N; n++)
			if (reqs[n].result != cases[n].result)
				check_failed(__FILE__, __LINE__, "case %d: %d, not %d", n, reqs[n].result,
					     cases[n].result);
	}
}

static void check_fields(struct scripted *s, struct ublkd_queue *q, struct ublkd_io *io)
{
	CHECK_EQ(io->op, UBLKD_OP_WRITE);
	CHECK_EQ(io->offset, 24 << 9);
	CHECK_EQ(io->length, 16 << 9);
	CHECK(io->flags & UBLKD_RQ_FUA);
	CHECK(!(io->flags & UBLKD_RQ_NOUNMAP));
	answer_length(s, q, io);
}

static void test_fields(void)
{
	struct scripted s = scripted(check_fields);
	struct fake_request r = { .op = UBLKD_OP_WRITE, .sector = 24, .sectors = 16, .flags = UBLKD_RQ_FUA };

	serve(&s, fake_new(1 << 20), &fake_copy, &r, 1);
	CHECK_EQ(s.requests, 1);
}

/* Answers by the sector asked for: the first, the right one, the rest. */
static void answer_badly(struct scripted *s, struct ublkd_queue *q, struct ublkd_io *io)
{
	void (*complete)(struct ublkd_queue *, struct ublkd_io *, int32_t) = s->t.sv->complete;

	switch (io->offset >> 9) {
	case 0: /* more than was asked for */
		complete(q, io, (int32_t)io->length + 1);
		break;
	case 1:
		complete(q, io, INT32_MAX);
		break;
	case 2: /* twice: the first counts */
		complete(q, io, -ENOSPC);
		complete(q, io, (int32_t)io->length);
		break;
	case 3:
		complete(q, io, (int32_t)io->length);
		complete(q, io, -ENOSPC);
		break;
	case 4: /* part of it */
		complete(q, io, 512);
		break;
	case 5: /* nothing: the driver would try again for ever */
		complete(q, io, 0);
		break;
	default:
		complete(q, io, -EILSEQ);
	}
}

static void test_answers(void)
{
	static const int32_t wanted[] = { -EIO, -EIO, -ENOSPC, 4096, 512, -EIO, -EILSEQ };
	enum { N = sizeof(wanted) / sizeof(wanted[0]) };
	static const uint8_t ops[] = { UBLKD_OP_READ, UBLKD_OP_WRITE };

	for (int o = 0; o < 2; o++) {
		struct scripted s = scripted(answer_badly);
		struct fake *f = fake_new(1 << 20);
		struct fake_request reqs[N];

		for (int i = 0; i < N; i++)
			reqs[i] = (struct fake_request){ .op = ops[o], .sector = (uint64_t)i, .sectors = 8 };
		f->p.depth = 3;
		serve(&s, f, &fake_copy, reqs, N);
		for (int i = 0; i < N; i++)
			CHECK_EQ(reqs[i].result, wanted[i]);
	}
}

static void test_answers_without_data(void)
{
	struct scripted s = scripted(answer_badly);
	struct fake_request reqs[] = {
		{ .op = UBLKD_OP_FLUSH }, /* answered with 1: more than its length */
		{ .op = UBLKD_OP_DISCARD, .sector = 5, .sectors = 1 },
		{ .op = UBLKD_OP_WRITE_ZEROES, .sector = 6, .sectors = 1 },
	};

	serve(&s, fake_new(1 << 20), &fake_copy, reqs, 3);
	CHECK_EQ(reqs[0].result, -EIO);
	CHECK_EQ(reqs[1].result, 0);
	CHECK_EQ(reqs[2].result, -EILSEQ);
}

/* An answer that comes again once the tag carries another request must not reach that one. */
static struct ublkd_io *earlier;

static void answer_late(struct scripted *s, struct ublkd_queue *q, struct ublkd_io *io)
{
	if (earlier && earlier != io)
		s->t.sv->complete(q, earlier, -EBADE);
	s->t.sv->complete(q, io, (int32_t)io->length);
	earlier = io;
}

static void test_late_answer(void)
{
	struct scripted s = scripted(answer_late);
	struct fake *f = fake_new(1 << 20);
	struct fake_request reqs[9];

	for (int i = 0; i < 9; i++)
		reqs[i] = (struct fake_request){ .op = UBLKD_OP_READ, .sectors = 1 };
	f->p.depth = 2;
	serve(&s, f, &fake_copy, reqs, 9);
	/* Completed twice within one pass: only ever by the tag's own answer. */
	for (int i = 0; i < 9; i++)
		CHECK(reqs[i].result == 512 || reqs[i].result == -EBADE);
	CHECK_EQ(reqs[0].result, 512);
	CHECK_EQ(s.requests, 9);
}

/* Data of a target that wants a buffer, where the server has to fetch and deliver it. */
static void use_buffer(struct scripted *s, struct ublkd_queue *q, struct ublkd_io *io)
{
	CHECK(io->buf);
	CHECK_EQ((uintptr_t)io->buf % 4096, 0);
	if (io->op == UBLKD_OP_WRITE) {
		CHECK(all_bytes(io->buf, io->length, 'w'));
		s->t.sv->complete(q, io, (int32_t)io->length);
	} else {
		memset(io->buf, 'r', io->length);
		s->t.sv->complete(q, io, io->offset ? -EIO : 1024);
	}
}

static char data[64 << 10];

static void test_buffers(const struct ublkd_transport *tp)
{
	struct scripted s = scripted(use_buffer);
	char in[4096], out[4096], failed[4096];
	struct fake_request reqs[] = {
		{ .op = UBLKD_OP_WRITE, .sectors = 8, .data = out },
		{ .op = UBLKD_OP_READ, .sectors = 8, .data = in },
		{ .op = UBLKD_OP_WRITE, .sectors = sizeof(data) >> 9, .data = data },
		{ .op = UBLKD_OP_READ, .sectors = 8, .sector = 8, .data = failed },
	};

	memset(out, 'w', sizeof(out));
	memset(data, 'w', sizeof(data));
	memset(in, 0, sizeof(in));
	memset(failed, 0, sizeof(failed));
	s.ops.flags = UBLKD_TARGET_WANTS_BUFFER;
	serve(&s, fake_new(1 << 20), tp, reqs, 4);
	CHECK_EQ(reqs[0].result, 4096);
	CHECK_EQ(reqs[1].result, 1024);
	CHECK_EQ(reqs[2].result, sizeof(data));
	CHECK_EQ(reqs[3].result, -EIO);
	CHECK(all_bytes(in, 1024, 'r'));
	CHECK(all_bytes(in + 1024, sizeof(in) - 1024, 0));
}

/* A target that moves the data itself finds its buffer as it left it, and nothing of it is delivered. */
static void move_data(struct scripted *s, struct ublkd_queue *q, struct ublkd_io *io)
{
	char bytes[4096];

	CHECK(io->buf);
	CHECK_EQ(((char *)io->buf)[0], 0);
	if (io->op == UBLKD_OP_WRITE) {
		CHECK_EQ(s->t.sv->pull(q, io, 0, bytes, sizeof(bytes)), sizeof(bytes));
		CHECK(all_bytes(bytes, sizeof(bytes), 'w'));
	} else {
		memset(bytes, 'r', sizeof(bytes));
		CHECK_EQ(s->t.sv->push(q, io, 0, bytes, 1024), 1024);
	}
	s->t.sv->complete(q, io, (int32_t)io->length);
}

static void test_target_moves_data(void)
{
	struct scripted s = scripted(move_data);
	char in[4096], out[4096];
	struct fake_request reqs[] = {
		{ .op = UBLKD_OP_WRITE, .sectors = 8, .data = out },
		{ .op = UBLKD_OP_READ, .sectors = 8, .data = in },
	};

	memset(out, 'w', sizeof(out));
	memset(in, 0, sizeof(in));
	s.ops.flags = UBLKD_TARGET_WANTS_BUFFER | UBLKD_TARGET_MOVES_DATA;
	serve(&s, fake_new(1 << 20), &fake_user_copy, reqs, 2);
	CHECK(all_bytes(in, 1024, 'r'));
	CHECK(!all_bytes(in + 1024, 16, 0)); /* what the request's pages held before */
}

/* The driver moves no data: its file ends where the tag's data should be. */
static void lose_data(struct fake *f, struct fake_request *r)
{
	(void)r;
	f->p.max_io_bytes = 0; /* the fake puts no data there */
	CHECK_SYS(ftruncate(f->data_fd, 0));
}

static void test_pull_fails(void)
{
	struct scripted s = scripted(use_buffer);
	struct fake_request r = { .op = UBLKD_OP_WRITE, .sectors = 8 };
	struct fake *f = fake_new(1 << 20);

	s.ops.flags = UBLKD_TARGET_WANTS_BUFFER;
	f->on_deliver = lose_data;
	serve(&s, f, &fake_user_copy, &r, 1);
	CHECK_EQ(s.requests, 0);
	CHECK_EQ(r.result, -EFAULT);
}

static void close_cdev(struct fake *f, struct fake_request *r)
{
	const int fd = (int)CHECK_SYS(open("/dev/null", O_RDONLY | O_CLOEXEC));

	(void)r;
	/* The descriptor turns into one that can't be written to. */
	CHECK_SYS(dup3(fd, f->data_fd, O_CLOEXEC));
	close(fd);
	f->p.max_io_bytes = 0;
}

static void answer_push(struct scripted *s, struct ublkd_queue *q, struct ublkd_io *io)
{
	CHECK(!io->buf);
	s->t.sv->complete(q, io, (int32_t)s->t.sv->push(q, io, 0, data, io->length));
}

static void test_push_fails(void)
{
	struct fake_request r = { .op = UBLKD_OP_READ, .sectors = 8 };
	struct scripted buffered = scripted(use_buffer), direct = scripted(answer_push);
	struct fake *f = fake_new(1 << 20);

	buffered.ops.flags = UBLKD_TARGET_WANTS_BUFFER;
	f->on_deliver = close_cdev;
	serve(&buffered, f, &fake_user_copy, &r, 1);
	CHECK_EQ(buffered.requests, 1);
	CHECK_EQ(r.result, -EBADF);

	r.answers = 0;
	f = fake_new(1 << 20);
	f->on_deliver = close_cdev;
	serve(&direct, f, &fake_user_copy, &r, 1);
	CHECK_EQ(r.result, -EBADF);
}

/* A target that queues several SQEs for each request; more, all in all, than the ring has entries. */
enum { SQES = 9 };

static void queue_sqes(struct scripted *s, struct ublkd_queue *q, struct ublkd_io *io)
{
	for (uint8_t i = 0; i < SQES; i++) {
		struct io_uring_sqe *sqe = s->t.sv->sqe(q);

		CHECK(sqe);
		io_uring_prep_nop(sqe);
		s->t.sv->sqe_own(q, sqe, io, (uint8_t)(255 - i));
	}
}

static void collect_cqe(struct scripted *s, struct ublkd_queue *q, struct ublkd_event *ev)
{
	struct ublkd_io *io = ev->io;
	const unsigned i = 255u - ev->slot;

	CHECK_EQ(ev->res, 0);
	CHECK(i < SQES);
	CHECK(!(io->priv[0] & 1u << i));
	io->priv[0] |= 1u << i;
	if (io->priv[0] == (1u << SQES) - 1)
		s->t.sv->complete(q, io, (int32_t)io->length);
}

static void test_sqes(unsigned depth)
{
	enum { N = 500 };
	struct scripted s = scripted(queue_sqes);
	struct fake_request *reqs = calloc(N, sizeof(*reqs));
	struct fake *f = fake_new(1 << 20);

	CHECK(reqs);
	for (int i = 0; i < N; i++)
		reqs[i] = (struct fake_request){ .op = UBLKD_OP_READ, .sectors = 1 };
	s.cqe = collect_cqe;
	s.ops.sqes_per_io = SQES;
	f->p.depth = (uint16_t)depth;
	serve(&s, f, &fake_copy, reqs, N);
	CHECK_EQ(s.requests, N);
	CHECK_EQ(s.cqes, N * SQES);
	for (int i = 0; i < N; i++)
		CHECK_EQ(reqs[i].result, 512);
	free(reqs);
}

/* A driver that delivers a request for a tag it has not got back ends the queue, and nothing else. */
static int twice_cqe(struct ublkd_queue *q, uint16_t tag, int32_t res, uint32_t flags)
{
	int ret = fake_copy.cqe(q, tag, res, flags);

	return ret < 0 ? ret : ublkd_dispatch_requests(q, &tag, 1);
}

static void test_busy_tag(void)
{
	struct ublkd_transport tp = fake_copy;
	struct scripted s = scripted(answer_length);
	struct fake_request r = { .op = UBLKD_OP_READ, .sectors = 1 };
	struct fake *f = fake_new(1 << 20);

	tp.cqe = twice_cqe;
	s.t.ops = &s.ops;
	CHECK_EQ(fake_open(f, &tp, &s.t), 0);
	CHECK_EQ(fake_run(f, &r, 1), -EPROTO);
	CHECK(strstr(ublkd_last_error(), "in use"));
	/* The request itself was answered all the same. */
	CHECK_EQ(r.answers, 1);
	CHECK_EQ(r.result, 512);
	fake_close(f);
	fake_free(f);
	CHECK_EQ(s.closes, 1);
}

static void test_bad_targets(void)
{
	struct scripted s = scripted(answer_length);
	struct fake *f = fake_new(1 << 20);

	s.t.ops = &s.ops;
	s.ops.abi = UBLKD_TARGET_ABI + 1;
	CHECK_EQ(fake_open(f, &fake_copy, &s.t), -EINVAL);
	s.ops.abi = UBLKD_TARGET_ABI;
	s.ops.size -= 8;
	CHECK_EQ(fake_open(f, &fake_copy, &s.t), -EINVAL);
	s.ops.size += 8;

	s.open_result = -ENXIO;
	CHECK_EQ(fake_open(f, &fake_copy, &s.t), -ENXIO);
	CHECK_EQ(s.opens, 1);
	CHECK_EQ(s.closes, 0); /* close() is for what open() has opened */
	s.open_result = 0;

	f->p.depth = 0;
	CHECK_EQ(fake_open(f, &fake_copy, &s.t), -EINVAL);
	f->p.depth = UBLK_MAX_QUEUE_DEPTH + 1;
	CHECK_EQ(fake_open(f, &fake_copy, &s.t), -EINVAL);
	f->p.depth = 1;
	f->p.max_io_bytes = 0;
	CHECK_EQ(fake_open(f, &fake_copy, &s.t), -EINVAL);
	f->p.max_io_bytes = 4096;
	f->p.cdev_fd = -1;
	CHECK_EQ(fake_open(f, &fake_copy, &s.t), -EINVAL);
	CHECK_EQ(s.opens, 1);
	fake_free(f);
}

/* All tags of the deepest queue at once. */
static void test_deepest(void)
{
	enum { N = 3 * UBLK_MAX_QUEUE_DEPTH };
	struct scripted s = scripted(answer_length);
	struct fake_request *reqs = calloc(N, sizeof(*reqs));
	struct fake *f = fake_new(1 << 20);

	CHECK(reqs);
	for (int i = 0; i < N; i++)
		reqs[i] = (struct fake_request){ .op = UBLKD_OP_WRITE, .sectors = 1 };
	f->p.depth = UBLK_MAX_QUEUE_DEPTH;
	serve(&s, f, &fake_user_copy, reqs, N);
	CHECK_EQ(s.requests, N);
	free(reqs);
}

int main(void)
{
	test_range();
	test_fields();
	test_answers();
	test_answers_without_data();
	test_late_answer();
	test_buffers(&fake_copy);
	test_buffers(&fake_user_copy);
	test_target_moves_data();
	test_pull_fails();
	test_push_fails();
	test_sqes(1);
	test_sqes(8);
	test_sqes(64);
	test_busy_tag();
	test_bad_targets();
	test_deepest();
	return 0;
}
