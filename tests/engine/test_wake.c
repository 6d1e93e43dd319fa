/* SPDX-License-Identifier: Apache-2.0 */
/* The wake descriptor: ublkd_queue_run() comes back for it, and goes on where it was. */
#include <pthread.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "fake.h"
#include "stats.h"

static struct ublkd_target *null_target(void)
{
	struct ublkd_null_config config = { 0 };
	struct ublkd_target *target;

	CHECK_EQ(ublkd_null_create(&config, &target), 0);
	return target;
}

static void wake(int fd)
{
	const uint64_t one = 1;

	CHECK_EQ(write(fd, &one, sizeof(one)), sizeof(one));
}

static void wake_now_and_then(struct fake *f, struct fake_request *r)
{
	if ((r - f->requests) % 10 == 0)
		wake(f->p.wake_fd);
}

/* In the middle of traffic: no request is lost or answered twice. */
static void test_busy(void)
{
	enum { N = 1000 };
	struct fake_request *reqs = calloc(N, sizeof(*reqs));
	struct ublkd_target *target = null_target();
	struct fake *f = fake_new(1 << 20);

	CHECK(reqs);
	for (int i = 0; i < N; i++)
		reqs[i] = (struct fake_request){ .op = UBLKD_OP_WRITE, .sectors = 1 };
	f->p.wake_fd = (int)CHECK_SYS(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
	f->p.depth = 4;
	f->on_deliver = wake_now_and_then;
	fake_serve(f, &fake_copy, target, reqs, N);
	CHECK(f->wakes > 0 && f->wakes <= N / 10);
	close(f->p.wake_fd);
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

/* Nothing to do but to wait: it sleeps, wakes up, sleeps again, and still serves. */
static void test_idle(void)
{
	struct fake_request r = { .op = UBLKD_OP_WRITE, .sectors = 8 };
	struct ublkd_target *target = null_target();
	struct fake *f = fake_new(1 << 20);
	pthread_t thread;
	uint64_t passes, count;

	f->p.wake_fd = (int)CHECK_SYS(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
	f->p.depth = 2;
	f->hold = true;
	CHECK_EQ(fake_open(f, &fake_copy, target), 0);
	for (int i = 0; i < 3; i++) {
		passes = f->q->shm->passes;
		CHECK_EQ(pthread_create(&thread, NULL, wake_later, &f->p.wake_fd), 0);
		CHECK_EQ(ublkd_queue_run(f->q), UBLKD_RUN_WAKE);
		CHECK_EQ(pthread_join(thread, NULL), 0);
		CHECK(f->q->shm->passes - passes <= 4); /* it slept, it did not spin */
		CHECK_EQ(f->q->shm->run_returns, i + 1);
		/* The counter is empty again. */
		CHECK(read(f->p.wake_fd, &count, sizeof(count)) < 0 && errno == EAGAIN);
	}
	/* Written to before the run, several times: one return. */
	wake(f->p.wake_fd);
	wake(f->p.wake_fd);
	CHECK_EQ(ublkd_queue_run(f->q), UBLKD_RUN_WAKE);

	fake_release(f);
	CHECK_EQ(fake_run(f, &r, 1), UBLKD_RUN_DONE);
	CHECK_EQ(r.answers, 1);
	CHECK_EQ(r.result, 4096);
	CHECK_EQ(f->wakes, 0);
	/* All is over, and stays so. */
	wake(f->p.wake_fd);
	CHECK_EQ(ublkd_queue_run(f->q), UBLKD_RUN_DONE);
	fake_close(f);
	close(f->p.wake_fd);
	ublkd_target_destroy(target);
	fake_free(f);
}

int main(void)
{
	test_busy();
	test_idle();
	return 0;
}
