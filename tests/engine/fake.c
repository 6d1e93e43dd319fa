/* SPDX-License-Identifier: Apache-2.0 */
#include <sys/mman.h>
#include <unistd.h>

#include "fake.h"

static struct fake *fake_of(struct ublkd_queue *q)
{
	return (struct fake *)q->p.cmdbuf;
}

static void queue_nop(struct ublkd_queue *q, unsigned tag)
{
	struct io_uring_sqe *sqe = ublkd_queue_sqe(q);

	io_uring_prep_nop(sqe);
	sqe->user_data = ublkd_ud_pack(UBLKD_UD_CMD, (uint16_t)tag, 0);
}

static int fake_arm(struct ublkd_queue *q)
{
	for (unsigned tag = q->p.share; tag < q->p.depth; tag += q->p.shares)
		queue_nop(q, tag);
	return 0;
}

/* Where a tag's data begins in the char device, as the driver has it. */
static off_t data_pos(const struct fake *f, unsigned tag)
{
	return (off_t)(UBLKSRV_IO_BUF_OFFSET + ((uint64_t)f->p.qid << UBLK_QID_OFF) +
		       ((uint64_t)tag << UBLK_TAG_OFF));
}

static uint64_t data_bytes(const struct fake *f, const struct fake_request *r)
{
	uint64_t bytes = (uint64_t)r->sectors << 9;

	if (r->op != UBLKD_OP_READ && r->op != UBLKD_OP_WRITE)
		return 0;
	return bytes < f->p.max_io_bytes ? bytes : f->p.max_io_bytes;
}

static void put_data(struct fake *f, unsigned tag, const struct fake_request *r)
{
	const size_t bytes = data_bytes(f, r);
	char *junk = NULL;
	const char *src = r->data;

	if (!bytes)
		return;
	if (r->op == UBLKD_OP_READ || !src) {
		junk = malloc(bytes);
		CHECK(junk);
		memset(junk, FAKE_JUNK, bytes);
		src = junk;
	}
	if (f->q->tp->needs_buffers)
		memcpy(f->q->ios[tag].buf, src, bytes);
	else
		CHECK_EQ(CHECK_SYS(pwrite(f->data_fd, src, bytes, data_pos(f, tag))), bytes);
	free(junk);
}

static void take_data(struct fake *f, unsigned tag, struct fake_request *r)
{
	if (r->op != UBLKD_OP_READ || !r->data || r->result <= 0)
		return;
	CHECK((uint64_t)r->result <= data_bytes(f, r));
	if (f->q->tp->needs_buffers)
		memcpy(r->data, f->q->ios[tag].buf, (size_t)r->result);
	else
		CHECK_EQ(CHECK_SYS(pread(f->data_fd, r->data, (size_t)r->result, data_pos(f, tag))), r->result);
}

bool fake_deliver(struct fake *f, unsigned tag)
{
	struct fake_request *r;

	CHECK(tag < f->p.depth);
	CHECK(!f->tags[tag]);
	if (f->next == f->nr_requests)
		return false;
	r = &f->requests[f->next++];
	if (f->on_deliver)
		f->on_deliver(f, r);
	f->iods[tag] = (struct ublksrv_io_desc){
		.op_flags = r->op | r->flags,
		.nr_sectors = r->sectors,
		.start_sector = r->sector,
	};
	if (f->q->tp->registers && tag % 2)
		f->iods[tag].op_flags |= UBLK_IO_F_NEED_REG_BUF;
	f->tags[tag] = r;
	r->delivered = true;
	put_data(f, tag, r);
	return true;
}

void fake_answered(struct fake *f, unsigned tag, int32_t result)
{
	struct fake_request *r = f->tags[tag];

	CHECK(r);
	f->tags[tag] = NULL;
	r->answers++;
	r->result = result;
	take_data(f, tag, r);
	if (f->on_answer)
		f->on_answer(f, r);
}

static int fake_cqe(struct ublkd_queue *q, uint16_t tag, int32_t res, uint32_t flags)
{
	struct fake *f = fake_of(q);

	(void)flags;
	CHECK_EQ(res, 0);
	if (fake_deliver(f, tag))
		return ublkd_dispatch_requests(q, &tag, 1);
	if (f->hold)
		f->held[tag] = true;
	else
		ublkd_dispatch_gone(q, tag);
	return 0;
}

static void fake_commit(struct ublkd_queue *q, struct ublkd_io *const *ios, unsigned n)
{
	for (unsigned i = 0; i < n; i++) {
		fake_answered(fake_of(q), ios[i]->tag, ios[i]->result);
		queue_nop(q, ios[i]->tag);
	}
}

static void fake_flush(struct ublkd_queue *q)
{
	fake_of(q)->flushes++;
}

static int64_t copy_pull(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, void *dst, uint32_t len)
{
	return ublkd_transport_copy.pull(q, io, off, dst, len);
}

static int64_t copy_push(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, const void *src, uint32_t len)
{
	return ublkd_transport_copy.push(q, io, off, src, len);
}

static int64_t user_copy_pull(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, void *dst, uint32_t len)
{
	return ublkd_transport_user_copy.pull(q, io, off, dst, len);
}

static int64_t user_copy_push(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, const void *src,
			      uint32_t len)
{
	return ublkd_transport_user_copy.push(q, io, off, src, len);
}

const struct ublkd_transport fake_copy = {
	.name = "fake copy",
	.needs_buffers = true,
	.arm = fake_arm,
	.cqe = fake_cqe,
	.commit = fake_commit,
	.flush = fake_flush,
	.pull = copy_pull,
	.push = copy_push,
};

const struct ublkd_transport fake_user_copy = {
	.name = "fake user-copy",
	.arm = fake_arm,
	.cqe = fake_cqe,
	.commit = fake_commit,
	.flush = fake_flush,
	.pull = user_copy_pull,
	.push = user_copy_push,
};

struct iovec *fake_map_pages(struct fake *f)
{
	struct iovec *vecs = calloc(f->p.depth, sizeof(*vecs));

	f->pages = calloc(f->p.depth, sizeof(*f->pages));
	CHECK(vecs && f->pages);
	CHECK_SYS(ftruncate(f->data_fd, data_pos(f, f->p.depth)));
	for (unsigned tag = 0; tag < f->p.depth; tag++) {
		f->pages[tag] = mmap(NULL, f->p.max_io_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, f->data_fd,
				     data_pos(f, tag));
		CHECK(f->pages[tag] != MAP_FAILED);
		vecs[tag] = (struct iovec){ .iov_base = f->pages[tag], .iov_len = f->p.max_io_bytes };
	}
	return vecs;
}

static int fake_zero_copy_arm(struct ublkd_queue *q)
{
	struct iovec *vecs = fake_map_pages(fake_of(q));

	CHECK_EQ(io_uring_register_buffers(&q->ring, vecs, q->p.depth), 0);
	free(vecs);
	return fake_arm(q);
}

const struct ublkd_transport fake_zero_copy = {
	.name = "fake zero-copy",
	.registers = true,
	.arm = fake_zero_copy_arm,
	.cqe = fake_cqe,
	.commit = fake_commit,
	.flush = fake_flush,
	.pull = user_copy_pull,
	.push = user_copy_push,
};

struct fake *fake_new(uint64_t dev_bytes)
{
	struct fake *f = calloc(1, sizeof(*f));

	CHECK(f);
	f->data_fd = (int)CHECK_SYS(memfd_create("fake-cdev", MFD_CLOEXEC));
	f->p = (struct ublkd_queue_params){
		.cdev_fd = f->data_fd,
		.wake_fd = -1,
		.depth = 1,
		.max_io_bytes = 64 << 10,
		.dev_bytes = dev_bytes,
		.cmdbuf = f,
	};
	return f;
}

void fake_free(struct fake *f)
{
	close(f->data_fd);
	free(f);
}

int fake_open(struct fake *f, const struct ublkd_transport *tp, struct ublkd_target *target)
{
	f->requests = NULL;
	f->nr_requests = f->next = 0;
	memset(f->tags, 0, sizeof(f->tags));
	memset(f->held, 0, sizeof(f->held));
	fake_batch_begin(f);
	return ublkd_queue_create_on(&f->p, tp, target, &f->q);
}

int fake_run(struct fake *f, struct fake_request *requests, unsigned n)
{
	int ret;

	f->requests = requests;
	f->nr_requests = n;
	f->next = 0;
	while ((ret = ublkd_queue_run(f->q)) == UBLKD_RUN_WAKE)
		f->wakes++;
	return ret;
}

void fake_release(struct fake *f)
{
	f->hold = false;
	for (unsigned tag = 0; tag < f->p.depth; tag++)
		if (f->held[tag])
			queue_nop(f->q, tag);
	memset(f->held, 0, sizeof(f->held));
}

void fake_close(struct fake *f)
{
	ublkd_queue_destroy(f->q);
	f->q = NULL;
	for (unsigned tag = 0; f->pages && tag < f->p.depth; tag++)
		munmap(f->pages[tag], f->p.max_io_bytes);
	free(f->pages);
	f->pages = NULL;
}

void fake_serve(struct fake *f, const struct ublkd_transport *tp, struct ublkd_target *target,
		struct fake_request *requests, unsigned n)
{
	CHECK_EQ(fake_open(f, tp, target), 0);
	CHECK_EQ(fake_run(f, requests, n), UBLKD_RUN_DONE);
	for (unsigned i = 0; i < n; i++) {
		CHECK(requests[i].delivered);
		CHECK_EQ(requests[i].answers, 1);
	}
	CHECK_EQ(f->q->live, 0);
	CHECK_EQ(f->q->targets_inflight, 0);
	CHECK_EQ(f->q->shm->started, f->q->shm->completed);
	fake_close(f);
}
