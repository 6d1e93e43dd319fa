/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#include "buffer.h"
#include "ublk.h"
#include "engine.h"
#include "error.h"

static size_t page_round(size_t n)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);

	return (n + page - 1) & ~(page - 1);
}

int ublkd_buffers_init(struct ublkd_buffers *b, unsigned count, size_t bytes_each)
{
	void *p;

	b->stride = page_round(bytes_each);
	b->bytes = b->stride * count;
	/* NORESERVE: most tags never see a request of the full size. */
	p = mmap(NULL, b->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (p == MAP_FAILED) {
		b->base = NULL;
		return ublkd_error(-errno, "no memory for %u tag buffers of %zu bytes", count, b->stride);
	}
	b->base = p;
	return 0;
}

void ublkd_buffers_exit(struct ublkd_buffers *b)
{
	if (b->base)
		munmap(b->base, b->bytes);
	b->base = NULL;
}

int ublkd_zeroes_map(size_t bytes, const void **ret)
{
	void *p = mmap(NULL, page_round(bytes), PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		return ublkd_error(-errno, "no address space for %zu zero bytes", bytes);
	*ret = p;
	return 0;
}

void ublkd_zeroes_unmap(const void *zeroes, size_t bytes)
{
	if (zeroes)
		munmap((void *)zeroes, page_round(bytes));
}

int ublkd_cmdbuf_map(int cdev_fd, unsigned qid, unsigned depth, void **ret)
{
	/* The driver spaces the queues by its own largest depth, whatever ours is. */
	off_t offset = (off_t)qid * (off_t)page_round((size_t)UBLK_MAX_QUEUE_DEPTH * sizeof(struct ublksrv_io_desc));
	void *p = mmap(NULL, page_round(depth * sizeof(struct ublksrv_io_desc)), PROT_READ,
		       MAP_SHARED | MAP_POPULATE, cdev_fd, UBLKSRV_CMD_BUF_OFFSET + offset);

	if (p == MAP_FAILED)
		return ublkd_error(-errno, "cannot map the command buffer of queue %u", qid);
	*ret = p;
	return 0;
}

int ublkd_cmdbuf_unmap(void *cmdbuf, unsigned depth)
{
	return munmap(cmdbuf, page_round(depth * sizeof(struct ublksrv_io_desc))) < 0 ? -errno : 0;
}
