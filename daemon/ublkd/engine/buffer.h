/* SPDX-License-Identifier: Apache-2.0 */
#ifndef UBLKD_BUFFER_H
#define UBLKD_BUFFER_H

#include <stddef.h>
#include <stdint.h>

/* Memory of one queue's tags: page aligned, faulted in on first use. */
struct ublkd_buffers {
	char *base;
	size_t bytes;
	size_t stride;
};

int ublkd_buffers_init(struct ublkd_buffers *b, unsigned count, size_t bytes_each);
void ublkd_buffers_exit(struct ublkd_buffers *b);

static inline void *ublkd_buffers_get(const struct ublkd_buffers *b, unsigned i)
{
	return b->base ? b->base + i * b->stride : NULL;
}

/* bytes of zeroes that take no memory: every page is the kernel's zero page. */
int ublkd_zeroes_map(size_t bytes, const void **ret);
void ublkd_zeroes_unmap(const void *zeroes, size_t bytes);

#endif
