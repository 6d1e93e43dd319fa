/* SPDX-License-Identifier: Apache-2.0 */
/* The ways for a request's data, whichever commands the requests come by. */
#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "error.h"
#include "queue.h"

int64_t ublkd_copy_pull(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, void *dst, uint32_t len)
{
	(void)q;
	memcpy(dst, (char *)io->buf + off, len);
	return len;
}

int64_t ublkd_copy_push(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, const void *src, uint32_t len)
{
	(void)q;
	memcpy((char *)io->buf + off, src, len);
	return len;
}

/* The driver checks what it is asked for; it moves nothing, without an errno, only where our memory can't be had. */
#define UBLKD_NOTHING_MOVED (-EFAULT)

/* Where a request's data sits in the char device's file. */
static off_t user_copy_pos(const struct ublkd_queue *q, const struct ublkd_io *io, uint32_t off)
{
	return (off_t)(UBLKSRV_IO_BUF_OFFSET + ((uint64_t)q->p.qid << UBLK_QID_OFF) +
		       ((uint64_t)io->tag << UBLK_TAG_OFF) + off);
}

int64_t ublkd_user_copy_pull(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, void *dst, uint32_t len)
{
	uint32_t moved = 0;

	while (moved < len) {
		ssize_t n = pread(q->p.cdev_fd, (char *)dst + moved, len - moved,
				  user_copy_pos(q, io, off + moved));

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : UBLKD_NOTHING_MOVED;
		moved += (uint32_t)n;
	}
	return len;
}

int64_t ublkd_user_copy_push(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, const void *src,
			      uint32_t len)
{
	uint32_t moved = 0;

	while (moved < len) {
		ssize_t n = pwrite(q->p.cdev_fd, (const char *)src + moved, len - moved,
				   user_copy_pos(q, io, off + moved));

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n < 0 ? -errno : UBLKD_NOTHING_MOVED;
		moved += (uint32_t)n;
	}
	return len;
}

int ublkd_register_requests(struct ublkd_queue *q)
{
	int ret = io_uring_register_buffers_sparse(&q->ring, q->p.depth);

	if (ret < 0)
		return ublkd_error(ret, "queue %u: cannot have a table of registered buffers: %s", q->p.qid,
				   strerror(-ret));
	return 0;
}
