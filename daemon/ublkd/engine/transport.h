/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How requests and their data cross between the driver and a queue. One set
 * of callbacks per transport; everything above (dispatch, targets) is the same
 * on all of them. A transport that reports many requests per CQE, or commits
 * many per SQE, fits in: cqe() may dispatch any number, and flush() comes once
 * per pass after the last commit().
 */
#ifndef UBLKD_TRANSPORT_H
#define UBLKD_TRANSPORT_H

#include <stdbool.h>
#include <stdint.h>

#include "target.h"

struct ublkd_transport {
	const char *name;
	bool needs_buffers; /* the driver itself copies to and from io->buf */
	bool registers;     /* the driver registers a request's pages with the ring, as buffer number tag */

	/* Ask the driver for the first request of every tag. 0 or -errno. */
	int (*arm)(struct ublkd_queue *q);
	/* A CQE of kind UBLKD_UD_CMD: pass what it brings to dispatch. 0, or -errno to end the queue. */
	int (*cqe)(struct ublkd_queue *q, uint16_t tag, int32_t res, uint32_t flags);
	/* Answer io with io->result and ask for its tag's next request. */
	void (*commit)(struct ublkd_queue *q, struct ublkd_io *io);
	/* Optional: the pass has made its last commit. */
	void (*flush)(struct ublkd_queue *q);
	/* As in struct ublkd_services. */
	int64_t (*pull)(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, void *dst, uint32_t len);
	int64_t (*push)(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, const void *src,
			uint32_t len);
};

extern const struct ublkd_transport ublkd_transport_copy;
extern const struct ublkd_transport ublkd_transport_user_copy;
extern const struct ublkd_transport ublkd_transport_zero_copy;

#endif
