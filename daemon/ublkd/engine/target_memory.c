/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The memory target: a RAM disk in one shared mapping of a tmpfs file, so that
 * every worker sees the same bytes and they outlive any of them.
 *
 * Behind the disk's own bytes the file holds one mark per 64 KiB chunk: was it
 * ever written? Reading a page of a shared mapping that was never written
 * would allocate it; an unmarked chunk is read as zeroes from elsewhere.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "buffer.h"
#include "error.h"
#include "queue.h"
#include "stats.h"

#define CHUNK_SHIFT 16

struct memory_target {
	struct ublkd_target t;
	char *base;
	uint8_t *marks;
	uint64_t size;
	int fd;
	const void *zeroes;
	uint32_t zeroes_bytes;
};

static uint64_t nr_chunks(uint64_t size)
{
	return (size + (1u << CHUNK_SHIFT) - 1) >> CHUNK_SHIFT;
}

uint64_t ublkd_memory_file_bytes(uint64_t size)
{
	return size + nr_chunks(size);
}

static int memory_open(struct ublkd_target *t, struct ublkd_queue *q)
{
	struct memory_target *mt = (struct memory_target *)t;

	mt->zeroes_bytes = q->p.max_io_bytes;
	return ublkd_zeroes_map(mt->zeroes_bytes, &mt->zeroes);
}

static bool ever_written(const struct memory_target *mt, const struct ublkd_io *io)
{
	uint64_t last = (io->offset + io->length - 1) >> CHUNK_SHIFT;

	for (uint64_t c = io->offset >> CHUNK_SHIFT; c <= last; c++)
		if (__atomic_load_n(&mt->marks[c], __ATOMIC_RELAXED))
			return true;
	return false;
}

static void mark_written(struct memory_target *mt, const struct ublkd_io *io)
{
	uint64_t last = (io->offset + io->length - 1) >> CHUNK_SHIFT;

	for (uint64_t c = io->offset >> CHUNK_SHIFT; c <= last; c++)
		if (!__atomic_load_n(&mt->marks[c], __ATOMIC_RELAXED))
			__atomic_store_n(&mt->marks[c], 1, __ATOMIC_RELAXED);
}

/*
 * Only chunks that lie wholly inside: another queue may be writing to the rest
 * of a chunk right now. And before the hole is punched, so that a write which
 * comes in between marks its chunk again.
 */
static void unmark_discarded(struct memory_target *mt, const struct ublkd_io *io)
{
	uint64_t end = (io->offset + io->length) >> CHUNK_SHIFT;

	if (io->offset + io->length == mt->size) /* nor is there anything behind the last one */
		end = nr_chunks(mt->size);
	for (uint64_t c = nr_chunks(io->offset); c < end; c++)
		__atomic_store_n(&mt->marks[c], 0, __ATOMIC_RELAXED);
}

/* Read through the file, where a hole is zeroes and takes no page; through the mapping it is a page, or a SIGBUS. */
static int64_t file_read(const struct memory_target *mt, void *dst, uint32_t len, uint64_t offset)
{
	uint32_t done = 0;

	while (done < len) {
		ssize_t n = pread(mt->fd, (char *)dst + done, len - done, (off_t)(offset + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -EIO;
		done += (uint32_t)n;
	}
	return len;
}

/* For a full tmpfs: the pages that are holes can't be had, and the driver won't say which those are. */
static int64_t push_by_file(struct memory_target *mt, struct ublkd_queue *q, struct ublkd_io *io)
{
	char bounce[4096];

	for (uint32_t done = 0; done < io->length;) {
		uint32_t n = io->length - done < sizeof(bounce) ? io->length - done : sizeof(bounce);
		int64_t ret = file_read(mt, bounce, n, io->offset + done);

		if (ret >= 0)
			ret = q->tp->push(q, io, done, bounce, n);
		if (ret < 0)
			return ret;
		done += n;
	}
	return io->length;
}

static int32_t memory_read(struct memory_target *mt, struct ublkd_queue *q, struct ublkd_io *io)
{
	int64_t n;

	if (!ever_written(mt, io))
		return (int32_t)q->tp->push(q, io, 0, mt->zeroes, io->length);
	if (q->tp->needs_buffers)
		return (int32_t)file_read(mt, io->buf, io->length, io->offset);
	n = q->tp->push(q, io, 0, mt->base + io->offset, io->length);
	return (int32_t)(n == -EFAULT ? push_by_file(mt, q, io) : n);
}

static int32_t memory_write(struct memory_target *mt, struct ublkd_queue *q, struct ublkd_io *io)
{
	uint32_t done = 0;
	int64_t n;

	mark_written(mt, io);
	if (!q->tp->needs_buffers) {
		n = q->tp->pull(q, io, 0, mt->base + io->offset, io->length);
		/* The mapping's pages can't be had: tmpfs is full. */
		return n == -EFAULT ? -ENOSPC : (int32_t)n;
	}
	/* By the file, where a full tmpfs is an errno; a store to the mapping would be a SIGBUS. */
	while (done < io->length) {
		n = pwrite(mt->fd, (char *)io->buf + done, io->length - done, (off_t)(io->offset + done));
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : -ENOSPC;
		done += (uint32_t)n;
	}
	return (int32_t)done;
}

static void queue_punch(struct memory_target *mt, struct ublkd_queue *q, struct ublkd_io *io)
{
	struct io_uring_sqe *sqe = ublkd_queue_sqe(q);

	io_uring_prep_fallocate(sqe, mt->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)io->offset,
				(off_t)io->length);
	ublkd_sqe_own(q, sqe, io, 0);
}

static void memory_request(struct memory_target *mt, struct ublkd_queue *q, struct ublkd_io *io)
{
	switch (io->op) {
	case UBLKD_OP_READ:
		ublkd_io_complete(q, io, memory_read(mt, q, io));
		break;
	case UBLKD_OP_WRITE:
		ublkd_io_complete(q, io, memory_write(mt, q, io));
		break;
	case UBLKD_OP_FLUSH:
		ublkd_io_complete(q, io, 0);
		break;
	default: /* discard and write zeroes, which may unmap or not: RAM has nothing to reserve */
		unmark_discarded(mt, io);
		queue_punch(mt, q, io);
	}
}

static void memory_handle(struct ublkd_target *t, struct ublkd_queue *q, struct ublkd_event *events, unsigned n)
{
	struct memory_target *mt = (struct memory_target *)t;

	for (unsigned i = 0; i < n; i++) {
		struct ublkd_event *ev = &events[i];

		if (ev->kind == UBLKD_EVENT_REQUEST) {
			memory_request(mt, q, ev->io);
		} else if (ev->res == -EINTR || ev->res == -EAGAIN) {
			ublkd_stat_add(&q->shm->retries, 1);
			queue_punch(mt, q, ev->io);
		} else {
			ublkd_io_complete(q, ev->io, ev->res);
		}
	}
}

static void memory_close(struct ublkd_target *t, struct ublkd_queue *q)
{
	struct memory_target *mt = (struct memory_target *)t;

	(void)q;
	ublkd_zeroes_unmap(mt->zeroes, mt->zeroes_bytes);
	mt->zeroes = NULL;
}

static void memory_destroy(struct ublkd_target *t)
{
	free(t);
}

static const struct ublkd_target_ops memory_ops = {
	.size = sizeof(memory_ops),
	.abi = UBLKD_TARGET_ABI,
	.name = "memory",
	.sqes_per_io = 1,
	.open = memory_open,
	.handle = memory_handle,
	.close = memory_close,
	.destroy = memory_destroy,
};

int ublkd_memory_create(const struct ublkd_memory_config *config, struct ublkd_target **ret)
{
	struct memory_target *mt = calloc(1, sizeof(*mt));

	if (!mt)
		return ublkd_error(-ENOMEM, "no memory for a memory target");
	mt->t.ops = &memory_ops;
	mt->base = config->base;
	mt->size = config->size;
	mt->marks = (uint8_t *)config->base + config->size;
	mt->fd = config->fd;
	*ret = &mt->t;
	return 0;
}
