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

/* As io_uring_submit_and_wait() for one CQE, but awake for a while if most_ns says so. */
int ublkd_wait_polling(struct ublkd_queue *q);

#endif
