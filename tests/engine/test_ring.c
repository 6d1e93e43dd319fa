/* SPDX-License-Identifier: Apache-2.0 */
/* Setting a ring up on kernels that lack a flag, or io_uring. */
#include "fake.h"
#include "ring.h"

int __real_io_uring_queue_init_params(unsigned entries, struct io_uring *ring, struct io_uring_params *p);

static int refuse_with; /* errno to refuse with, 0: let pass */
static unsigned refuse_flags; /* refuse where one of these is asked for */
static unsigned calls;

int __wrap_io_uring_queue_init_params(unsigned entries, struct io_uring *ring, struct io_uring_params *p)
{
	calls++;
	if (refuse_with && (!refuse_flags || (p->flags & refuse_flags)))
		return -refuse_with;
	return __real_io_uring_queue_init_params(entries, ring, p);
}

static void refuse(int err, unsigned flags)
{
	refuse_with = err;
	refuse_flags = flags;
	calls = 0;
}

/* What is left must still serve. */
static void serve_something(void)
{
	struct ublkd_null_config config = { .zero_reads = 1 };
	struct ublkd_target *target;
	struct fake_request reqs[64];
	struct fake *f = fake_new(1 << 20);

	memset(reqs, 0, sizeof(reqs));
	for (unsigned i = 0; i < 64; i++) {
		reqs[i].op = i % 2 ? UBLKD_OP_READ : UBLKD_OP_WRITE;
		reqs[i].sectors = 8;
	}
	f->p.depth = 7;
	CHECK_EQ(ublkd_null_create(&config, &target), 0);
	fake_serve(f, &fake_user_copy, target, reqs, 64);
	ublkd_target_destroy(target);
	fake_free(f);
}

static void test_fallback(void)
{
	unsigned flags = ~0u;

	refuse(EINVAL, IORING_SETUP_SINGLE_ISSUER);
	CHECK_EQ(ublkd_probe_ring(&flags), 0);
	CHECK_EQ(calls, 2);
	CHECK(!(flags & IORING_SETUP_SINGLE_ISSUER));
	CHECK(flags & IORING_SETUP_COOP_TASKRUN);
	serve_something();

	refuse(EINVAL, IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN | IORING_SETUP_SUBMIT_ALL);
	CHECK_EQ(ublkd_probe_ring(&flags), 0);
	CHECK_EQ(calls, 3);
	CHECK(!(flags & (IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN)));
	serve_something();
}

static void test_refused(int err, int tries, const char *text)
{
	struct ublkd_null_config config = { 0 };
	struct ublkd_target *target;
	struct fake *f = fake_new(1 << 20);
	unsigned flags;

	refuse(err, 0);
	CHECK_EQ(ublkd_probe_ring(&flags), -err);
	CHECK_EQ(calls, tries);
	CHECK(strstr(ublkd_last_error(), text));
	CHECK_EQ(ublkd_null_create(&config, &target), 0);
	CHECK_EQ(fake_open(f, &fake_copy, target), -err);
	ublkd_target_destroy(target);
	fake_free(f);
}

static void test_sizes(void)
{
	struct io_uring ring;

	refuse(0, 0);
	/* The biggest queue there can be, with one SQE of the target's per request. */
	CHECK_EQ(ublkd_ring_init(&ring, 4096 + 1, 2 * 4096 + 1, 0), 0);
	CHECK(ring.sq.ring_entries >= 4097);
	CHECK(ring.cq.ring_entries >= 8193);
	io_uring_queue_exit(&ring);
	/* Not even the kernel goes that far. */
	CHECK_EQ(ublkd_ring_init(&ring, 1u << 20, 1u << 21, 0), -EINVAL);
}

int main(void)
{
	unsigned flags;

	if (ublkd_probe_ring(&flags) < 0)
		SKIP("%s", ublkd_last_error());
	test_fallback();
	test_refused(ENOSYS, 1, "no io_uring");
	test_refused(EPERM, 1, "io_uring_disabled");
	test_refused(ENOMEM, 1, "Cannot allocate memory");
	test_refused(EINVAL, 3, "Invalid argument");
	test_sizes();
	return 0;
}
