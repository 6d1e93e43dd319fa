/* SPDX-License-Identifier: Apache-2.0 */
#ifndef UBLKD_STATS_H
#define UBLKD_STATS_H

#include <stdbool.h>
#include <stdint.h>
#include <time.h>

#include "layout.h"
#include "target.h"

/* The one writer of a word needs no lock and no locked instruction, only an untorn store. */
static inline void ublkd_stat_set(uint64_t *word, uint64_t value)
{
	__atomic_store_n(word, value, __ATOMIC_RELAXED);
}

static inline void ublkd_stat_add(uint64_t *word, uint64_t n)
{
	ublkd_stat_set(word, *word + n);
}

static inline uint64_t ublkd_now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000ull + (uint64_t)ts.tv_nsec;
}

/* The bucket of a latency; layout.h has the rule. */
static inline unsigned ublkd_stat_bucket(uint64_t ns)
{
	unsigned e, i;

	if (ns < 1024)
		return 0;
	e = 63 - (unsigned)__builtin_clzll(ns);
	i = 1 + 4 * (e - 10) + (unsigned)(ns >> (e - 2) & 3);
	return i < UBLKD_SHM_HIST_BUCKETS ? i : UBLKD_SHM_HIST_BUCKETS - 1;
}

/*
 * Answers, one after the other, of requests of one operation that arrived
 * together: of a pass over a fast target's, all. They are counted as one.
 */
struct ublkd_stat_run {
	uint64_t start_ns;
	uint64_t bytes;
	uint32_t ios;
	uint32_t errors;
	uint32_t fua;
	uint8_t op;
};

static inline bool ublkd_stat_alike(const struct ublkd_stat_run *run, const struct ublkd_io *io)
{
	return run->start_ns == io->start_ns && run->op == io->op;
}

static inline void ublkd_stat_count(struct ublkd_stat_run *run, const struct ublkd_io *io)
{
	run->ios++;
	run->bytes += io->length;
	run->errors += io->result < 0;
	run->fua += !!(io->flags & UBLKD_RQ_FUA);
}

/* Add a run, none of which may be left out, to the counters; it ends now. */
void ublkd_stat_complete(struct ublkd_shm_queue *shm, const struct ublkd_stat_run *run, uint64_t now);

#endif
