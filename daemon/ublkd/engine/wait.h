/* SPDX-License-Identifier: Apache-2.0 */
/* How a worker waits for the next event: asleep, or for a while awake. */
#ifndef UBLKD_WAIT_H
#define UBLKD_WAIT_H

#include <stdint.h>

struct ublkd_queue;

/*
 * Polling pays as long as requests follow each other faster than a sleep and
 * a wake-up take. So a sleep that was shorter than the longest poll brings
 * that back, and each one that was longer halves the next, down to none.
 */
struct ublkd_wait {
	uint64_t most_ns; /* 0: never poll */
	uint64_t next_ns; /* how long the next poll may last */
};

/* Submit what is queued and wait for a CQE: as io_uring_submit_and_wait(). */
int ublkd_wait(struct ublkd_queue *q);

#endif
