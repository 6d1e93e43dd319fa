/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <string.h>

#include "engine.h"
#include "error.h"
#include "ring.h"

#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif

/* Best first; all that is lost further down is speed. */
static const unsigned setup_flags[] = {
	IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_SUBMIT_ALL,
	IORING_SETUP_COOP_TASKRUN | IORING_SETUP_SUBMIT_ALL,
	0,
};

int ublkd_ring_init(struct io_uring *ring, unsigned sq, unsigned cq, unsigned extra_flags)
{
	int ret = -EINVAL;

	for (size_t i = 0; i < sizeof(setup_flags) / sizeof(setup_flags[0]); i++) {
		struct io_uring_params p;

		memset(&p, 0, sizeof(p));
		p.flags = setup_flags[i] | extra_flags | IORING_SETUP_CQSIZE;
		/* Without the others task work is done by interrupt, and this one is refused. */
		if (!setup_flags[i])
			p.flags &= ~IORING_SETUP_TASKRUN_FLAG;
		p.cq_entries = cq;
		ret = io_uring_queue_init_params(sq, ring, &p);
		if (ret != -EINVAL)
			break;
	}
	if (ret == -ENOSYS)
		return ublkd_error(ret, "this kernel has no io_uring");
	if (ret == -EPERM)
		return ublkd_error(ret, "io_uring is switched off (sysctl kernel.io_uring_disabled)");
	if (ret < 0)
		return ublkd_error(ret, "io_uring_setup: %s", strerror(-ret));
	return 0;
}

int ublkd_probe_ring(unsigned *ret_setup_flags)
{
	struct io_uring ring;
	int ret = ublkd_ring_init(&ring, 2, 4, 0);

	if (ret < 0)
		return ret;
	*ret_setup_flags = ring.flags;
	io_uring_queue_exit(&ring);
	return 0;
}
