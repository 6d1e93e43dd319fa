/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The statistics segment: an ABI between the engine (writes), `ublkd stat` and
 * any other reader. One file per device, /dev/shm/ublkd-N: a header page, then
 * one slot per worker.
 *
 * Every word has one writer: the header the supervisor, a slot its
 * worker. Words are 64-bit and naturally aligned, so a reader never sees a
 * torn one; words of one slot may be read at slightly different moments.
 * ublkd/shm/layout.py mirrors this file and a test compares the two.
 */
#ifndef UBLKD_LAYOUT_H
#define UBLKD_LAYOUT_H

#include <assert.h>
#include <stdint.h>

#define UBLKD_SHM_MAGIC 0x3154415453424b55ull /* "UKBSTAT1", little endian */
#define UBLKD_SHM_VERSION 1
#define UBLKD_SHM_HEADER_BYTES 4096

enum ublkd_shm_op {
	UBLKD_SHM_READ,
	UBLKD_SHM_WRITE,
	UBLKD_SHM_FLUSH,
	UBLKD_SHM_DISCARD,
	UBLKD_SHM_WRITE_ZEROES,
	UBLKD_SHM_OTHER,
	UBLKD_SHM_NR_OPS,
};

/* Where a worker is: with an old heartbeat, what it hangs in. */
enum ublkd_shm_stage {
	UBLKD_SHM_WAITING, /* in io_uring_enter */
	UBLKD_SHM_ENGINE,
	UBLKD_SHM_PYTHON, /* in the interpreter, or waiting for its lock */
};

/*
 * Latency bucket of t ns, from a request's arrival in the engine to the
 * queueing of its commit: below 1024 ns bucket 0, then four per power of two:
 * with e = floor(log2 t), bucket 1 + 4 * (e - 10) + ((t >> (e - 2)) & 3),
 * capped at the last.
 */
#define UBLKD_SHM_HIST_BUCKETS 104

struct ublkd_shm_counters {
	uint64_t ios;    /* completed, errors included */
	uint64_t bytes;  /* of the request, not of what was transferred */
	uint64_t errors; /* completed with an errno */
	uint64_t lat_ns; /* sum of latencies */
	uint64_t hist[UBLKD_SHM_HIST_BUCKETS];
};

struct ublkd_shm_queue {
	uint64_t pid;            /* of the worker, 0 before the first */
	uint64_t heartbeat_ns;   /* CLOCK_MONOTONIC of the last pass */
	uint64_t passes;         /* submit-and-wait calls */
	uint64_t started;        /* requests taken from the driver */
	uint64_t completed;      /* requests answered; in flight = started - completed */
	uint64_t fua;            /* writes that carried FUA */
	uint64_t python_entries; /* times the engine took the GIL */
	uint64_t run_returns;    /* times ublkd_queue_run() went back to its caller */
	uint64_t retries;        /* transfers continued or issued again */
	uint64_t stage;          /* enum ublkd_shm_stage */
	uint64_t polled;         /* passes that began without a sleep, for --poll */
	uint64_t reserved[5];
	struct ublkd_shm_counters op[UBLKD_SHM_NR_OPS];
};

struct ublkd_shm_header {
	uint64_t magic;
	uint32_t version;
	uint32_t header_bytes;
	uint32_t slot_bytes; /* sizeof(struct ublkd_shm_queue) */
	uint32_t nr_slots; /* queues * shares */
	uint32_t dev_id;
	uint32_t depth;
	uint64_t supervisor_pid;
	uint64_t start_ns; /* CLOCK_REALTIME when the device went live */
	uint64_t dev_bytes;
	uint32_t shares; /* workers per queue: slot / shares is the queue, slot % shares the worker */
	uint32_t reserved;
};

static_assert(sizeof(struct ublkd_shm_counters) == 864, "counters ABI");
static_assert(sizeof(struct ublkd_shm_queue) == 16 * 8 + 6 * 864, "queue slot ABI");
static_assert(sizeof(struct ublkd_shm_queue) % 64 == 0, "a slot starts on its own cache line");
static_assert(sizeof(struct ublkd_shm_header) == 64, "header ABI");

#endif
