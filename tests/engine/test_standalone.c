/* SPDX-License-Identifier: Apache-2.0 */
/* A C program on the engine alone: engine.h is all it includes, liburing all it links. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "engine.h"

static int fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, ublkd_last_error());
	return 1;
}

int main(void)
{
	struct ublkd_null_config config = { .zero_reads = 1 };
	struct ublkd_queue_params params = { .wake_fd = -1, .depth = 1, .max_io_bytes = 4096 };
	static uint64_t cmdbuf[3];
	struct ublkd_target *target;
	struct ublkd_queue *q;
	unsigned flags;
	int pipe_fds[2];
	int ret;

	if (ublkd_probe_ring(&flags) < 0)
		return fail("ublkd_probe_ring");
	if (ublkd_null_create(&config, &target) < 0)
		return fail("ublkd_null_create");

	/* No command buffer: refused, in words. */
	if (ublkd_queue_create(&params, target, &q) != -EINVAL || !*ublkd_last_error())
		return fail("ublkd_queue_create without a command buffer");

	/* Any file will do to create a queue; only a ublk device takes its commands. */
	params.cmdbuf = cmdbuf;
	if (pipe2(pipe_fds, O_CLOEXEC) < 0)
		return 1;
	params.cdev_fd = pipe_fds[0];
	for (params.transport = UBLKD_TRANSPORT_COPY; params.transport <= UBLKD_TRANSPORT_ZERO_COPY; params.transport++) {
		if (ublkd_queue_create(&params, target, &q) < 0)
			return fail("ublkd_queue_create");
		ret = ublkd_queue_run(q);
		ublkd_queue_destroy(q);
		if (ret >= 0 || !strstr(ublkd_last_error(), "the driver answered"))
			return fail("ublkd_queue_run on a pipe");
	}
	if (ublkd_queue_create(&params, target, &q) != -EINVAL)
		return fail("ublkd_queue_create with a transport that there is not");
	ublkd_target_destroy(target);
	ublkd_target_destroy(NULL);
	ublkd_queue_destroy(NULL);
	return 0;
}
