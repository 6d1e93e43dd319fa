/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>

#include "queue.h"
#include "stats.h"
#include "wait.h"

/* Looks between two readings of the clock. */
#define LOOKS 64

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("yield" ::: "memory");
#endif
}

/* A CQE within ns? Enters the kernel only when that says that it has work for us (IORING_SQ_TASKRUN). */
static bool poll_for(struct ublkd_queue *q, uint64_t now, uint64_t ns)
{
	const uint64_t end = now + ns;
	struct io_uring_cqe *cqe;

	do {
		for (int i = 0; i < LOOKS; i++) {
			if (io_uring_peek_cqe(&q->ring, &cqe) == 0)
				return true;
			relax();
		}
	} while (ublkd_now_ns() < end);
	return false;
}

int ublkd_wait_polling(struct ublkd_queue *q)
{
	struct ublkd_wait *w = &q->wait;
	uint64_t begin;
	int ret;

	ret = io_uring_submit(&q->ring);
	if (ret < 0)
		return ret;
	begin = ublkd_now_ns();
	if (w->next_ns && poll_for(q, begin, w->next_ns)) {
		ublkd_stat_add(&q->shm->polled, 1);
		return 0;
	}
	ret = io_uring_submit_and_wait(&q->ring, 1);
	w->next_ns = ublkd_now_ns() - begin <= w->most_ns ? w->most_ns : w->next_ns / 2;
	return ret;
}
