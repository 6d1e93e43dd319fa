/* SPDX-License-Identifier: Apache-2.0 */
/* The null target: accepts everything, stores nothing. */
#include <errno.h>
#include <stdlib.h>

#include "buffer.h"
#include "error.h"
#include "queue.h"

struct null_target {
	struct ublkd_target t;
	int zero_reads;
	const void *zeroes;
	uint32_t zeroes_bytes;
};

static int null_open(struct ublkd_target *t, struct ublkd_queue *q)
{
	struct null_target *nt = (struct null_target *)t;

	nt->zeroes_bytes = q->p.max_io_bytes;
	return ublkd_zeroes_map(nt->zeroes_bytes, &nt->zeroes);
}

static int32_t null_io(struct null_target *nt, struct ublkd_queue *q, struct ublkd_io *io)
{
	/*
	 * Where the server copies, pages that nobody fills reach the reader as
	 * they were: somebody's old memory.
	 */
	if (io->op == UBLKD_OP_READ && nt->zero_reads) {
		int64_t n = q->tp->push(q, io, 0, nt->zeroes, io->length);

		return (int32_t)n;
	}
	return io->op == UBLKD_OP_READ || io->op == UBLKD_OP_WRITE ? (int32_t)io->length : 0;
}

static void null_handle(struct ublkd_target *t, struct ublkd_queue *q, struct ublkd_event *events, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		ublkd_io_complete(q, events[i].io, null_io((struct null_target *)t, q, events[i].io));
}

static void null_close(struct ublkd_target *t, struct ublkd_queue *q)
{
	struct null_target *nt = (struct null_target *)t;

	(void)q;
	ublkd_zeroes_unmap(nt->zeroes, nt->zeroes_bytes);
	nt->zeroes = NULL;
}

static void null_destroy(struct ublkd_target *t)
{
	free(t);
}

static const struct ublkd_target_ops null_ops = {
	.size = sizeof(null_ops),
	.abi = UBLKD_TARGET_ABI,
	.name = "null",
	.open = null_open,
	.handle = null_handle,
	.close = null_close,
	.destroy = null_destroy,
};

int ublkd_null_create(const struct ublkd_null_config *config, struct ublkd_target **ret)
{
	struct null_target *nt = calloc(1, sizeof(*nt));

	if (!nt)
		return ublkd_error(-ENOMEM, "no memory for a null target");
	nt->t.ops = &null_ops;
	nt->zero_reads = config->zero_reads;
	*ret = &nt->t;
	return 0;
}
