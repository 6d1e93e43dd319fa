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

/* Answered requests that differ in length at most. */
struct ublkd_stat_run {
	uint64_t ns; /* that each took */
	uint64_t bytes;
	uint32_t ios;
	uint32_t errors;
	uint32_t fua;
	uint8_t op;
};

void ublkd_stat_complete(struct ublkd_shm_queue *shm, struct ublkd_stat_run run);

#endif
