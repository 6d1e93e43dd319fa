/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a target implements, and what the engine does for it.
 *
 * A target turns requests into completions. The engine hands it every event
 * of one pass in one call; it answers each request exactly once with
 * ublkd_io_complete(), in that call or in a later one. All calls come from the
 * queue's own thread; nothing here may block for longer than the target can
 * afford, since the queue stands still meanwhile.
 */
#ifndef UBLKD_TARGET_H
#define UBLKD_TARGET_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct io_uring_sqe;
struct ublkd_queue;
struct ublkd_target;

#define UBLKD_TARGET_ABI 1

/* Block operations, as the driver numbers them (the low byte of op_flags). */
enum ublkd_op {
	UBLKD_OP_READ = 0,
	UBLKD_OP_WRITE = 1,
	UBLKD_OP_FLUSH = 2,
	UBLKD_OP_DISCARD = 3,
	UBLKD_OP_WRITE_ZEROES = 5,
};

/* Request flags, at the bit positions of the driver's op_flags. */
#define UBLKD_RQ_FUA (1u << 13)     /* write: durable before it is completed */
#define UBLKD_RQ_NOUNMAP (1u << 15) /* write zeroes: keep the blocks allocated */

/* One tag. Fields are valid from the request event until ublkd_io_complete(). */
struct ublkd_io {
	uint64_t offset;  /* bytes from the start of the device */
	uint32_t length;  /* bytes; 0 for flush */
	uint32_t flags;   /* UBLKD_RQ_* and the driver's other bits */
	uint8_t op;       /* enum ublkd_op */
	uint8_t state;    /* engine's own */
	uint16_t tag;
	bool fixed;       /* the data is the ring's registered buffer number tag (UBLKD_TARGET_TAKES_FIXED) */
	int32_t result;   /* engine's own */
	void *buf;        /* max_io_bytes of memory, or NULL (see UBLKD_TARGET_WANTS_BUFFER) */
	uint64_t start_ns; /* engine's own: CLOCK_MONOTONIC at arrival */
	uint64_t priv[3]; /* the target's own; zeroed when the request arrives */
};

enum ublkd_event_kind {
	UBLKD_EVENT_REQUEST, /* a new request */
	UBLKD_EVENT_CQE,     /* an SQE that the target queued has completed */
};

struct ublkd_event {
	struct ublkd_io *io;
	int32_t res;   /* CQE: result */
	uint16_t kind; /* enum ublkd_event_kind */
	uint16_t slot; /* CQE: what ublkd_sqe_own() was given */
};

/*
 * Buffers: with this flag io->buf holds a WRITE's data when the request
 * arrives, and what a READ left there is delivered when it is completed, on
 * every transport. Without it io->buf may be NULL: use ublkd_io_pull/push.
 */
#define UBLKD_TARGET_WANTS_BUFFER 1u
/*
 * With this flag too, a request may come with io->fixed set: io->buf then
 * holds nothing, and the target names the registered buffer in its own SQEs
 * (READ_FIXED and the like, addresses counted from 0).
 */
#define UBLKD_TARGET_TAKES_FIXED 2u
/*
 * With the first: io->buf is there, but where the driver does not copy to and
 * from it (driver_copies()) nobody does but the target, by pull and push. For
 * one that often has a better place for the data.
 */
#define UBLKD_TARGET_MOVES_DATA 4u

struct ublkd_target_ops {
	uint32_t size; /* sizeof(struct ublkd_target_ops) as the target was built */
	uint32_t abi;  /* UBLKD_TARGET_ABI */
	const char *name;
	uint32_t flags;        /* UBLKD_TARGET_* */
	uint32_t sqes_per_io;  /* most SQEs one request may have outstanding; sizes the ring */

	/* Optional. Before the first fetch. 0 or -errno, which fails the start. */
	int (*open)(struct ublkd_target *t, struct ublkd_queue *q);
	/* Required. Once per pass, n >= 1 events in order of arrival. */
	void (*handle)(struct ublkd_target *t, struct ublkd_queue *q, struct ublkd_event *events, unsigned n);
	/* Optional. After the last completion, if open succeeded. */
	void (*close)(struct ublkd_target *t, struct ublkd_queue *q);
	/* Required. Frees the target. */
	void (*destroy)(struct ublkd_target *t);
};

/* Embed as the first member of the target's own structure. */
struct ublkd_target {
	const struct ublkd_target_ops *ops;
	/*
	 * Filled in by ublkd_queue_create(): the engine's services by pointer, for
	 * targets that live in another shared object and cannot link to them.
	 */
	const struct ublkd_services *sv;
};

struct ublkd_services {
	uint32_t size; /* sizeof(struct ublkd_services) */
	/* Answer a request: bytes done (0 for flush, discard, write zeroes; of a transfer at least 1) or -errno. */
	void (*complete)(struct ublkd_queue *q, struct ublkd_io *io, int32_t res);
	/*
	 * Move request data: pull a WRITE's bytes [off, off+len) to dst, push src
	 * to a READ's. Bytes moved (== len) or -errno.
	 */
	int64_t (*pull)(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, void *dst, uint32_t len);
	int64_t (*push)(struct ublkd_queue *q, struct ublkd_io *io, uint32_t off, const void *src,
			uint32_t len);
	/* The next free SQE, never NULL: a full ring is submitted first. */
	struct io_uring_sqe *(*sqe)(struct ublkd_queue *q);
	/* After io_uring_prep_*(): the CQE comes back as an event of io with this slot (0..255). */
	void (*sqe_own)(struct ublkd_queue *q, struct io_uring_sqe *sqe, struct ublkd_io *io, uint8_t slot);
	/* The io of a tag, tag < depth. For preallocating per-tag state in open(). */
	struct ublkd_io *(*io)(struct ublkd_queue *q, unsigned tag);
	unsigned (*depth)(const struct ublkd_queue *q);
	unsigned (*qid)(const struct ublkd_queue *q);
	uint32_t (*max_io_bytes)(const struct ublkd_queue *q);
	/* This queue's slot in the statistics segment, never NULL. */
	struct ublkd_shm_queue *(*shm)(struct ublkd_queue *q);
	/* Is io->buf where the driver takes a READ's data from and puts a WRITE's? */
	bool (*driver_copies)(const struct ublkd_queue *q);
};

#endif
