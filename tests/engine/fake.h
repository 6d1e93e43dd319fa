/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Plays the driver for one queue, without one. Commands are NOPs on the
 * queue's own ring: when one comes back the fake puts the next request of its
 * list into the tag's descriptor, or takes the tag back for good. Of the
 * transports with commands for many tags it plays the driver below the ring
 * (fake_batch.c), so that the engine's own are at work.
 *
 * The command buffer is ordinary memory. Where the server copies, a memfd
 * stands for the char device, so the engine's own pull and push are at work.
 * Memory that a request should fill is full of FAKE_JUNK before.
 */
#ifndef FAKE_H
#define FAKE_H

#include "check.h"
#include "dispatch.h"
#include "engine.h"
#include "queue.h"
#include "ublk.h"

#define FAKE_JUNK 0xa5

struct fake_request {
	uint8_t op;
	uint32_t flags; /* UBLKD_RQ_* */
	uint64_t sector;
	uint32_t sectors;
	void *data; /* what a write carries, where a read's data goes; NULL: nobody looks */

	/* Filled in by the fake. */
	bool delivered;
	unsigned answers;
	int32_t result;
};

/* The driver of transport_batch.c; below: what a test may set, then what it may look at. */
struct fake_batch {
	uint64_t (*below)(uint64_t n); /* if set: chance has a say in how requests come */
	int prep_error;                /* what PREP, or from the second on COMMIT, or FETCH ends with, if not 0 */
	int commit_error;
	int fetch_error;
	const uint16_t *false_tags;    /* the first list of tags, in place of a true one */
	unsigned nr_false_tags;
	unsigned stop_after;           /* requests, after which no more come, whatever the server has in hand; 0: never */
	bool one_by_one;               /* a tag per buffer */

	unsigned preps, commits, fetches, starved, most_commit;

	bool prepared;
	bool fetching;
	uint64_t fetch_ud;
	unsigned nr_owned;
	struct io_uring_buf_ring *ring;
	unsigned nr_buffers;
	uint16_t head;
	unsigned patch_head, patch_tail;
	unsigned seen; /* the CQ up to here is patched */
};

struct fake {
	struct ublksrv_io_desc iods[UBLK_MAX_QUEUE_DEPTH]; /* first: the queue's command buffer */
	struct ublkd_queue_params p;
	struct ublkd_queue *q;
	int data_fd; /* the memfd in place of the char device */

	struct fake_request *requests;
	unsigned nr_requests;
	unsigned next;
	struct fake_request *tags[UBLK_MAX_QUEUE_DEPTH];

	char **pages; /* zero copy: each tag's registered buffer */
	bool hold; /* keep a tag for which there is no request, rather than take it back */
	bool held[UBLK_MAX_QUEUE_DEPTH];
	/* If set: called before a request is delivered. */
	void (*on_deliver)(struct fake *f, struct fake_request *r);
	/* If set: called when a request was answered. */
	void (*on_answer)(struct fake *f, struct fake_request *r);
	void *priv;
	unsigned wakes;
	unsigned flushes;

	struct fake_batch batch;
};

/* The two ways for data, as in the engine: does the driver copy (with the queue's buffers) or the server? */
extern const struct ublkd_transport fake_copy;
extern const struct ublkd_transport fake_user_copy;
/* Or are its pages the ring's? For every other tag that fails, as it may, and the server copies. */
extern const struct ublkd_transport fake_zero_copy;

/* A fake with parameters of a small queue in f->p, to be changed before fake_open(). */
struct fake *fake_new(uint64_t dev_bytes);
void fake_free(struct fake *f);

/* Create the queue; the result of ublkd_queue_create_on(). */
int fake_open(struct fake *f, const struct ublkd_transport *tp, struct ublkd_target *target);
/* Serve these requests; the first result of ublkd_queue_run() that is not UBLKD_RUN_WAKE. */
int fake_run(struct fake *f, struct fake_request *requests, unsigned n);
/* Let the tags go that were held. */
void fake_release(struct fake *f);
void fake_close(struct fake *f);

/*
 * All of it: open, run, check that the device stopped in order and that every
 * request was answered once, close.
 */
void fake_serve(struct fake *f, const struct ublkd_transport *tp, struct ublkd_target *target,
		struct fake_request *requests, unsigned n);

/* For the two drivers: put the next request into a tag, if there is one; take the answer; map the tags' pages. */
bool fake_deliver(struct fake *f, unsigned tag);
void fake_answered(struct fake *f, unsigned tag, int32_t result);
struct iovec *fake_map_pages(struct fake *f);
void fake_batch_begin(struct fake *f);

#endif
