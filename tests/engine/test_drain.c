/* SPDX-License-Identifier: Apache-2.0 */
/* Told to drain, a queue answers what it has in hand, and leaves the rest to the driver. */
#include <sys/eventfd.h>
#include <unistd.h>

#include "fake.h"
#include "stats.h"

enum { N = 100, DEPTH = 4 };

static struct ublkd_target *null_target(void)
{
	struct ublkd_null_config config = { 0 };
	struct ublkd_target *target;

	CHECK_EQ(ublkd_null_create(&config, &target), 0);
	return target;
}

static void wake(struct fake *f, uint64_t what)
{
	CHECK_EQ(write(f->p.wake_fd, &what, sizeof(what)), sizeof(what));
}

static void drain_at_40(struct fake *f, struct fake_request *r)
{
	if (r - f->requests == 40)
		wake(f, *(uint64_t *)f->priv);
}

static unsigned answered(const struct fake_request *reqs)
{
	unsigned n = 0;

	for (int i = 0; i < N; i++) {
		CHECK(reqs[i].answers <= 1);
		n += reqs[i].answers;
	}
	return n;
}

/* how: what is written in the middle of the traffic. Returns how many requests were answered. */
static unsigned serve(const struct ublkd_transport *tp, uint64_t how, int want)
{
	struct fake_request reqs[N] = { 0 };
	struct ublkd_target *target = null_target();
	struct fake *f = fake_new(1 << 20);
	unsigned n;

	for (int i = 0; i < N; i++)
		reqs[i] = (struct fake_request){ .op = UBLKD_OP_WRITE, .sectors = 8 };
	f->p.wake_fd = (int)CHECK_SYS(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
	f->p.depth = DEPTH;
	f->priv = &how;
	f->on_deliver = drain_at_40;
	CHECK_EQ(fake_open(f, tp, target), 0);
	CHECK_EQ(fake_run(f, reqs, N), want);
	n = answered(reqs);
	CHECK_EQ(f->q->in_hand, 0);
	CHECK_EQ(f->q->shm->started, n); /* what was not begun does not count as such */
	CHECK_EQ(f->q->shm->completed, n);
	fake_close(f);
	close(f->p.wake_fd);
	ublkd_target_destroy(target);
	fake_free(f);
	return n;
}

static void test_transport(const struct ublkd_transport *tp)
{
	unsigned n = serve(tp, UBLKD_WAKE_DRAIN, UBLKD_RUN_DRAINED);

	CHECK(n >= 40 - DEPTH && n < N);
	n = serve(tp, UBLKD_WAKE_DRAIN_IDLE, UBLKD_RUN_DRAINED);
	CHECK(n >= 40 - DEPTH && n < N);
	/* Taken back at once, and pings, which are nobody's concern. */
	CHECK_EQ(serve(tp, UBLKD_WAKE_DRAIN + UBLKD_WAKE_SERVE, UBLKD_RUN_DONE), N);
	CHECK_EQ(serve(tp, 3ull * UBLKD_WAKE_PING, UBLKD_RUN_DONE), N);
}

int main(void)
{
	test_transport(&fake_copy);
	test_transport(&ublkd_transport_batch_user_copy);
	return 0;
}
