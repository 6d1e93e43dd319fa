/* SPDX-License-Identifier: Apache-2.0 */
/* Polling: finds what comes soon without a sleep, and stops when nothing does. */
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "fake.h"

static struct ublkd_target *null_target(void)
{
	struct ublkd_null_config config = { 0 };
	struct ublkd_target *target;

	CHECK_EQ(ublkd_null_create(&config, &target), 0);
	return target;
}

static void wake(int fd)
{
	const uint64_t one = UBLKD_WAKE_RETURN;

	CHECK_EQ(write(fd, &one, sizeof(one)), sizeof(one));
}

/* Every pass finds the next request there: none sleeps. */
static void test_busy(uint32_t poll_us)
{
	enum { N = 1000 };
	struct fake_request *reqs = calloc(N, sizeof(*reqs));
	struct ublkd_target *target = null_target();
	struct fake *f = fake_new(1 << 20);
	struct ublkd_shm_queue *shm;

	CHECK(reqs);
	for (int i = 0; i < N; i++)
		reqs[i] = (struct fake_request){ .op = UBLKD_OP_WRITE, .sectors = 1 };
	f->p.depth = 4;
	f->p.poll_us = poll_us;
	CHECK_EQ(fake_open(f, &fake_copy, target), 0);
	CHECK_EQ(fake_run(f, reqs, N), UBLKD_RUN_DONE);
	shm = f->q->shm;
	CHECK_EQ(shm->completed, N);
	CHECK_EQ(shm->polled, poll_us ? shm->passes : 0);
	fake_close(f);
	ublkd_target_destroy(target);
	fake_free(f);
	free(reqs);
}

static void *wake_later(void *arg)
{
	usleep(30000);
	wake(*(int *)arg);
	return NULL;
}

/* Long waits end the polling; a short one brings it back. */
static void test_idle(void)
{
	struct fake_request r = { .op = UBLKD_OP_WRITE, .sectors = 8 };
	struct ublkd_target *target = null_target();
	struct fake *f = fake_new(1 << 20);
	const uint64_t most = 100000;
	pthread_t thread;

	f->p.wake_fd = (int)CHECK_SYS(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
	f->p.depth = 2;
	f->p.poll_us = most / 1000;
	f->hold = true;
	CHECK_EQ(fake_open(f, &fake_copy, target), 0);
	CHECK_EQ(f->q->wait.next_ns, most);
	for (int i = 0; i < 20; i++) {
		CHECK_EQ(pthread_create(&thread, NULL, wake_later, &f->p.wake_fd), 0);
		CHECK_EQ(ublkd_queue_run(f->q), UBLKD_RUN_WAKE);
		CHECK_EQ(pthread_join(thread, NULL), 0);
	}
	CHECK_EQ(f->q->wait.next_ns, 0);
	/* What is there already takes no time to wait for, however it is waited for; a sanitizer may. */
	for (int i = 0; i < 1000 && !f->q->wait.next_ns; i++) {
		wake(f->p.wake_fd);
		CHECK_EQ(ublkd_queue_run(f->q), UBLKD_RUN_WAKE);
	}
	CHECK_EQ(f->q->wait.next_ns, most);
	fake_release(f);
	CHECK_EQ(fake_run(f, &r, 0), UBLKD_RUN_DONE);
	fake_close(f);
	close(f->p.wake_fd);
	ublkd_target_destroy(target);
	fake_free(f);
}

int main(void)
{
	test_busy(0);
	test_busy(1000000);
	test_idle();
	return 0;
}
