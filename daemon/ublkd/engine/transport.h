/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How requests and their data cross between the driver and a queue. One set
 * of callbacks per transport; everything above (dispatch, targets) is the same
 * on all of them: cqe() may dispatch any number of requests, commit() has
 * all the answers of a pass, and flush() comes after it.
 */
#ifndef UBLKD_TRANSPORT_H
#define UBLKD_TRANSPORT_H

#include <stdbool.h>
#include <stdint.h>

#include "target.h"

/* Most CQEs that a transport has outstanding beside one per tag. */
#define UBLKD_TRANSPORT_CQES 3

struct ublkd_transport {
	const char *name;
	bool needs_buffers; /* the driver itself copies to and from io->buf */
	bool registers;     /* the driver registers a request's pages with the ring, as buffer number tag */

	/* Ask the driver for the first request of every tag. 0 or -errno. */
	int (*arm)(struct ublkd_queue *q);
	/*
	 * A CQE of kind UBLKD_UD_CMD: pass what it brings to dispatch. 0, or -errno to end the queue.
	 * tag is what the transport put there.
	 */
	int (*cqe)(struct ublkd_queue *q, uint16_t tag, int32_t res, uint32_t flags);
	/* Answer each of n >= 1 requests with its result, and ask for its tag's next. */
	void (*commit)(struct ublkd_queue *q, struct ublkd_io *const *ios, unsigned n);
	/* Optional: the pass is about to end, with a commit() or without. */
	void (*flush)(struct ublkd_queue *q);
	/* Optional: the ring is gone; free what arm() made. */
	void (*close)(struct ublkd_queue *q);
	/* As in struct ublkd_services. */
	int64_t (*pull)(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, void *dst, uint32_t len);
	int64_t (*push)(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, const void *src,
			uint32_t len);
};

/* A command per tag (transport_tag.c). */
extern const struct ublkd_transport ublkd_transport_copy;
extern const struct ublkd_transport ublkd_transport_user_copy;
extern const struct ublkd_transport ublkd_transport_zero_copy;
/* Commands for many tags at once (transport_batch.c). */
extern const struct ublkd_transport ublkd_transport_batch_user_copy;
extern const struct ublkd_transport ublkd_transport_batch_zero_copy;

/* For transports, what moves the data (transport_data.c): to and from io->buf, or the char device. */
int64_t ublkd_copy_pull(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, void *dst, uint32_t len);
int64_t ublkd_copy_push(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, const void *src, uint32_t len);
int64_t ublkd_user_copy_pull(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, void *dst, uint32_t len);
int64_t ublkd_user_copy_push(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, const void *src, uint32_t len);
/* Room in the ring for every tag's pages as registered buffer. 0 or -errno. */
int ublkd_register_requests(struct ublkd_queue *q);

#endif
