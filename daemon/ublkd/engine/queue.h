/* SPDX-License-Identifier: Apache-2.0 */
/* One hardware queue: its ring, its tags, its pass. */
#ifndef UBLKD_QUEUE_H
#define UBLKD_QUEUE_H

#include <errno.h>
#include <liburing.h>

#include "buffer.h"
#include "engine.h"
#include "layout.h"
#include "target.h"
#include "transport.h"
#include "ublk.h"
#include "userdata.h"
#include "wait.h"

enum ublkd_io_state {
	UBLKD_IO_DRIVER, /* the driver has the tag */
	UBLKD_IO_SERVER, /* a request is being served */
	UBLKD_IO_DONE,   /* answered in this pass, not yet committed */
	UBLKD_IO_GONE,   /* the driver took the tag back for good */
};

enum ublkd_drain {
	UBLKD_DRAIN_NOT,
	UBLKD_DRAIN_HOLD, /* what comes now is not begun */
	UBLKD_DRAIN_IDLE, /* serve until there is nothing in hand */
};

/* Slots of the ring's registered file table. */
#define UBLKD_FILE_CDEV 0
#define UBLKD_NR_FILES 8

struct ublkd_batch; /* transport_batch.c */

struct ublkd_queue {
	struct io_uring ring;
	const struct ublkd_transport *tp;
	struct ublkd_target *target;
	const struct ublksrv_io_desc *iods;
	struct ublkd_io *ios;
	struct ublkd_event *events;
	struct ublkd_io **done;
	struct ublkd_shm_queue *shm;
	const uint64_t *dev_bytes; /* follows a live resize */
	uint64_t now_ns;           /* at the start of this pass's reaping */
	unsigned nr_events;
	unsigned nr_done;
	unsigned live;    /* tags of ours not yet GONE */
	unsigned targets_inflight;
	unsigned in_hand; /* requests taken up and not yet committed */
	enum ublkd_drain drain;
	unsigned nr_files;
	bool carries; /* the engine moves data between the driver and io->buf, but for registered pages */
	bool fixes;   /* requests come with registered pages, and the target takes them */
	bool armed;
	bool wake_armed;
	bool woken;
	bool opened;
	struct ublkd_wait wait;
	struct ublkd_batch *batch;
	struct ublkd_queue_params p;
	struct ublkd_buffers buffers;
	struct ublkd_shm_queue *own_shm; /* when the caller keeps no statistics */
};

extern const struct ublkd_services ublkd_services;

/* Services, for targets and transports inside the engine; target.h documents them. */
void ublkd_sqe_own(struct ublkd_queue *q, struct io_uring_sqe *sqe, struct ublkd_io *io, uint8_t slot);

static inline struct io_uring_sqe *ublkd_queue_sqe(struct ublkd_queue *q)
{
	struct io_uring_sqe *sqe;

	while (!(sqe = io_uring_get_sqe(&q->ring)))
		io_uring_submit(&q->ring);
	return sqe;
}

static inline void ublkd_io_complete(struct ublkd_queue *q, struct ublkd_io *io, int32_t res)
{
	/* A second answer would free a tag that may already carry another request. */
	if (io->state != UBLKD_IO_SERVER)
		return;
	if (res > 0 && (uint32_t)res > io->length)
		res = -EIO;
	/* The driver issues the rest of a short transfer again: for ever, if that is all of it. */
	if (res == 0 && (io->op == UBLKD_OP_READ || io->op == UBLKD_OP_WRITE))
		res = -EIO;
	io->result = res;
	io->state = UBLKD_IO_DONE;
	q->done[q->nr_done++] = io;
}

/* As ublkd_queue_create(), on a given transport: for tests, which bring their own. */
int ublkd_queue_create_on(const struct ublkd_queue_params *params, const struct ublkd_transport *tp,
			  struct ublkd_target *target, struct ublkd_queue **ret);

/* Register fd with the ring; returns the index for IOSQE_FIXED_FILE, or -errno. */
int ublkd_queue_register_file(struct ublkd_queue *q, int fd);

#endif
