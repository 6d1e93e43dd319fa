/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loop target: a regular file or a block device behind the disk. Every
 * operation goes through the ring; what the kernel cannot do without sleeping
 * runs on io_uring's worker threads, never in the queue.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "buffer.h"
#include "error.h"
#include "queue.h"
#include "stats.h"

/* Discard as an io_uring command on a block device: Linux 6.12 ("block: implement async discard as io_uring cmd"). */
#ifndef BLOCK_URING_CMD_DISCARD
#define BLOCK_URING_CMD_DISCARD _IO(0x12, 0)
#endif

#ifndef RWF_DSYNC
#define RWF_DSYNC 0x00000002
#endif

#define ZEROES_BYTES (1u << 20)

/*
 * Ways to carry out a discard or write zeroes, each step the fallback of the
 * one before it. A worker remembers what the backing file refused.
 */
enum loop_way {
	WAY_CMD_DISCARD, /* block device only */
	WAY_PUNCH,
	WAY_ZERO_RANGE,
	WAY_WRITE,
	NR_WAYS,
};

/* io->priv */
enum {
	PRIV_DONE, /* bytes of the request that are finished */
	PRIV_WAY,  /* enum loop_way in use */
};

struct loop_target {
	struct ublkd_target t;
	int fd;
	int file; /* index of fd in the ring's table */
	uint32_t flags;
	uint64_t offset;
	bool refused[NR_WAYS];
	const void *zeroes;
};

static int loop_open(struct ublkd_target *t, struct ublkd_queue *q)
{
	struct loop_target *lt = (struct loop_target *)t;

	lt->file = ublkd_queue_register_file(q, lt->fd);
	if (lt->file < 0)
		return ublkd_error(lt->file, "cannot register the backing file with io_uring: %s",
				   strerror(-lt->file));
	return ublkd_zeroes_map(ZEROES_BYTES, &lt->zeroes);
}

/* The bytes of a write-zeroes that one plain write covers. */
static uint32_t zero_write_bytes(const struct ublkd_io *io)
{
	uint64_t left = io->length - io->priv[PRIV_DONE];

	return left < ZEROES_BYTES ? (uint32_t)left : ZEROES_BYTES;
}

static void prep_range(struct loop_target *lt, struct io_uring_sqe *sqe, struct ublkd_io *io)
{
	uint64_t pos = lt->offset + io->offset + io->priv[PRIV_DONE];
	uint64_t len = io->length - io->priv[PRIV_DONE];

	switch ((enum loop_way)io->priv[PRIV_WAY]) {
	case WAY_CMD_DISCARD:
		io_uring_prep_rw(IORING_OP_URING_CMD, sqe, lt->file, (void *)(uintptr_t)pos, 0, BLOCK_URING_CMD_DISCARD);
		memcpy((char *)sqe + 48, &len, sizeof(len)); /* sqe->addr3, which liburing 2.3 may hide */
		break;
	case WAY_PUNCH:
		io_uring_prep_fallocate(sqe, lt->file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)pos, (off_t)len);
		break;
	case WAY_ZERO_RANGE:
		io_uring_prep_fallocate(sqe, lt->file, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, (off_t)pos, (off_t)len);
		break;
	default:
		io_uring_prep_write(sqe, lt->file, lt->zeroes, zero_write_bytes(io), pos);
	}
}

/* The data of a request whose pages are the ring's: addresses count from the request's start. */
static void prep_fixed(struct loop_target *lt, struct io_uring_sqe *sqe, struct ublkd_io *io, uint64_t pos)
{
	void *from = (void *)(uintptr_t)io->priv[PRIV_DONE];
	uint32_t len = io->length - (uint32_t)io->priv[PRIV_DONE];

	if (io->op == UBLKD_OP_READ)
		io_uring_prep_read_fixed(sqe, lt->file, from, len, pos, io->tag);
	else
		io_uring_prep_write_fixed(sqe, lt->file, from, len, pos, io->tag);
}

/* Queue what is left of io. */
static void loop_issue(struct loop_target *lt, struct ublkd_queue *q, struct ublkd_io *io)
{
	struct io_uring_sqe *sqe = ublkd_queue_sqe(q);
	uint64_t done = io->priv[PRIV_DONE];
	uint64_t pos = lt->offset + io->offset + done;
	char *buf = (char *)io->buf + done;

	switch (io->op) {
	case UBLKD_OP_READ:
		if (io->fixed)
			prep_fixed(lt, sqe, io, pos);
		else
			io_uring_prep_read(sqe, lt->file, buf, io->length - (uint32_t)done, pos);
		break;
	case UBLKD_OP_WRITE:
		if (io->fixed)
			prep_fixed(lt, sqe, io, pos);
		else
			io_uring_prep_write(sqe, lt->file, buf, io->length - (uint32_t)done, pos);
		if (io->flags & UBLKD_RQ_FUA)
			sqe->rw_flags = RWF_DSYNC;
		break;
	case UBLKD_OP_FLUSH:
		io_uring_prep_fsync(sqe, lt->file, IORING_FSYNC_DATASYNC);
		break;
	default:
		prep_range(lt, sqe, io);
	}
	sqe->flags |= IOSQE_FIXED_FILE;
	ublkd_sqe_own(q, sqe, io, 0);
}

/* The next way for io that the backing file has not refused, from way on; false if there is none. */
static bool choose_way(const struct loop_target *lt, struct ublkd_io *io, enum loop_way way)
{
	for (; way < NR_WAYS; way++) {
		if (lt->refused[way])
			continue;
		/* A discard leaves the contents open, so zeroing is no use in place of it; and it may not cost writes. */
		if (io->op == UBLKD_OP_DISCARD ? way >= WAY_ZERO_RANGE : way == WAY_CMD_DISCARD)
			continue;
		if (way == WAY_PUNCH && (io->flags & UBLKD_RQ_NOUNMAP) && io->op == UBLKD_OP_WRITE_ZEROES)
			continue;
		io->priv[PRIV_WAY] = way;
		return true;
	}
	return false;
}

static void loop_request(struct loop_target *lt, struct ublkd_queue *q, struct ublkd_io *io)
{
	bool range = io->op == UBLKD_OP_DISCARD || io->op == UBLKD_OP_WRITE_ZEROES;

	if ((lt->flags & UBLKD_LOOP_READ_ONLY) && io->op != UBLKD_OP_READ && io->op != UBLKD_OP_FLUSH)
		ublkd_io_complete(q, io, -EROFS);
	else if (range && !choose_way(lt, io, WAY_CMD_DISCARD))
		ublkd_io_complete(q, io, -EOPNOTSUPP);
	else
		loop_issue(lt, q, io);
}

static bool refusal(int32_t res)
{
	return res == -EOPNOTSUPP || res == -ENOSYS || res == -ENODEV || res == -ENOTTY;
}

static void range_cqe(struct loop_target *lt, struct ublkd_queue *q, struct ublkd_io *io, int32_t res)
{
	enum loop_way way = (enum loop_way)io->priv[PRIV_WAY];

	/* Devices answer the discard command of a kernel or driver without it with EINVAL too. */
	if (refusal(res) || (way == WAY_CMD_DISCARD && res == -EINVAL)) {
		lt->refused[way] = true;
		if (choose_way(lt, io, way + 1))
			loop_issue(lt, q, io);
		else
			ublkd_io_complete(q, io, -EOPNOTSUPP);
		return;
	}
	if (way == WAY_WRITE && res > 0) {
		io->priv[PRIV_DONE] += (uint32_t)res;
		if (io->priv[PRIV_DONE] < io->length) {
			loop_issue(lt, q, io);
			return;
		}
	}
	ublkd_io_complete(q, io, way == WAY_WRITE && res == 0 ? -EIO : res < 0 ? res : 0);
}

static void transfer_cqe(struct loop_target *lt, struct ublkd_queue *q, struct ublkd_io *io, int32_t res)
{
	if (res > 0) {
		io->priv[PRIV_DONE] += (uint32_t)res;
		if (io->priv[PRIV_DONE] < io->length) {
			ublkd_stat_add(&q->shm->retries, 1);
			loop_issue(lt, q, io);
			return;
		}
		res = (int32_t)io->length;
	} else if (res == 0) {
		/* The backing file ends before the device does: it was truncated under us. */
		res = -EIO;
	}
	ublkd_io_complete(q, io, res);
}

static void loop_handle(struct ublkd_target *t, struct ublkd_queue *q, struct ublkd_event *events, unsigned n)
{
	struct loop_target *lt = (struct loop_target *)t;

	for (unsigned i = 0; i < n; i++) {
		struct ublkd_io *io = events[i].io;
		int32_t res = events[i].res;

		if (events[i].kind == UBLKD_EVENT_REQUEST) {
			loop_request(lt, q, io);
		} else if (res == -EINTR || res == -EAGAIN) {
			ublkd_stat_add(&q->shm->retries, 1);
			loop_issue(lt, q, io);
		} else if (io->op == UBLKD_OP_READ || io->op == UBLKD_OP_WRITE) {
			transfer_cqe(lt, q, io, res);
		} else if (io->op == UBLKD_OP_FLUSH) {
			ublkd_io_complete(q, io, res);
		} else {
			range_cqe(lt, q, io, res);
		}
	}
}

static void loop_close(struct ublkd_target *t, struct ublkd_queue *q)
{
	struct loop_target *lt = (struct loop_target *)t;

	/* Memory that comes to lie there instead must not reach the disk: see ublkd_queue_destroy(). */
	if (!q->targets_inflight)
		ublkd_zeroes_unmap(lt->zeroes, ZEROES_BYTES);
	lt->zeroes = NULL;
}

static void loop_destroy(struct ublkd_target *t)
{
	free(t);
}

static const struct ublkd_target_ops loop_ops = {
	.size = sizeof(loop_ops),
	.abi = UBLKD_TARGET_ABI,
	.name = "loop",
	.flags = UBLKD_TARGET_WANTS_BUFFER | UBLKD_TARGET_TAKES_FIXED,
	.sqes_per_io = 1,
	.open = loop_open,
	.handle = loop_handle,
	.close = loop_close,
	.destroy = loop_destroy,
};

int ublkd_loop_create(const struct ublkd_loop_config *config, struct ublkd_target **ret)
{
	struct loop_target *lt = calloc(1, sizeof(*lt));

	if (!lt)
		return ublkd_error(-ENOMEM, "no memory for a loop target");
	lt->t.ops = &loop_ops;
	lt->fd = config->fd;
	lt->flags = config->flags;
	lt->offset = config->offset;
	/* A file has no discard command; a device without one finds out at the first. */
	lt->refused[WAY_CMD_DISCARD] = !(config->flags & UBLKD_LOOP_BLOCK_DEVICE);
	*ret = &lt->t;
	return 0;
}

/* What the file system says direct I/O on fd needs: 0 if it can't be had, -ENODATA if it doesn't say. */
static int dio_align_told(int fd)
{
#ifdef STATX_DIOALIGN
	struct statx st;
	uint32_t align;

	if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &st) < 0 || !(st.stx_mask & STATX_DIOALIGN))
		return -ENODATA;
	if (!st.stx_dio_offset_align)
		return 0;
	align = st.stx_dio_offset_align > st.stx_dio_mem_align ? st.stx_dio_offset_align : st.stx_dio_mem_align;
	return align < 512 ? 512 : align > 4096 ? 0 : (int)align;
#else
	(void)fd;
	return -ENODATA;
#endif
}

/* By trying. Only the second choice: a hole can be read at any alignment, whatever writing there then needs. */
static int dio_align_tried(int fd)
{
	void *buf = NULL;
	int found = 0;

	if (posix_memalign(&buf, 4096, 8192))
		return 0;
	for (int align = 512; align <= 4096 && !found; align *= 2) {
		/* At an odd multiple, so that a bigger need shows. */
		if (pread(fd, buf, (size_t)align, align) >= 0)
			found = align;
	}
	free(buf);
	return found;
}

int ublkd_dio_align(const char *path, int writable)
{
	int fd = open(path, (writable ? O_RDWR : O_RDONLY) | O_DIRECT | O_CLOEXEC);
	int found;

	if (fd < 0)
		return 0;
	found = dio_align_told(fd);
	if (found == -ENODATA)
		found = dio_align_tried(fd);
	close(fd);
	return found;
}

int ublkd_can_punch(int fd, uint64_t end)
{
	int ret;

	do {
		ret = fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)((end + 4095) & ~4095ull), 4096);
	} while (ret < 0 && errno == EINTR);
	return ret == 0;
}
