// SPDX-License-Identifier: Apache-2.0
/*
 * Control ring: one command at a time on /dev/ublk-control.
 *
 * The driver runs a command in a worker thread of io_uring's, where it may
 * sleep: START_DEV until every queue is served, DEL_DEV until the last user of
 * the char device is gone, STOP_DEV until the disk's I/O has drained. A cancel
 * interrupts the first two; STOP_DEV sleeps uninterruptibly and cannot be
 * called back.
 *
 * Nothing here waits for such a command. Destroying the ring closes it, which
 * returns at once: the kernel tears it down in the background, when the
 * command has ended. Since the command may write its answer even then, it
 * works on memory of the ring's own (bounce), which is left to it for good.
 * What can't be avoided: the kernel lets a process that issued a command exit
 * only once that command has ended. Such a process has said what went wrong
 * before it comes to that, and it goes away by itself when the device does.
 */
#include <errno.h>
#include <liburing.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"
#include "error.h"
#include "ublk.h"

#define CTRL_ENTRIES 4
#define CTRL_BOUNCE_BYTES 65536 /* ublksrv_ctrl_cmd.len is 16 bits wide */

#define CTRL_TOKEN_COMMAND 1
#define CTRL_TOKEN_CANCEL 2

struct ublkd_ctrl {
	struct io_uring ring;
	int control_fd;
	pid_t owner;
	bool busy;      /* a command is outstanding */
	uint16_t len;
	void *user_buf; /* the caller's, len bytes */
	uint8_t *bounce;
};

static int ublkd_ctrl_ring_error(int err)
{
	switch (-err) {
	case ENOSYS:
		return ublkd_error(err, "this kernel has no io_uring (CONFIG_IO_URING)");
	case EPERM:
	case EACCES:
		return ublkd_error(err, "io_uring is forbidden here: see the sysctl "
				   "kernel.io_uring_disabled and, in a container, its seccomp profile");
	case EINVAL:
		return ublkd_error(err, "this kernel's io_uring is too old for ublk (needs Linux 6.0)");
	case ENOMEM:
		return ublkd_error(err, "no memory for an io_uring: see the limit on locked memory "
				   "(ulimit -l)");
	default:
		return ublkd_error(err, "cannot create an io_uring: %s", strerror(-err));
	}
}

int ublkd_ctrl_create(int control_fd, struct ublkd_ctrl **ret)
{
	struct ublkd_ctrl *ctrl = calloc(1, sizeof(*ctrl));
	int err;

	if (!ctrl)
		return -ENOMEM;
	ctrl->bounce = malloc(CTRL_BOUNCE_BYTES);
	if (!ctrl->bounce) {
		free(ctrl);
		return -ENOMEM;
	}
	ctrl->control_fd = control_fd;
	ctrl->owner = getpid();

	err = io_uring_queue_init(CTRL_ENTRIES, &ctrl->ring, IORING_SETUP_SQE128);
	if (err) {
		free(ctrl->bounce);
		free(ctrl);
		return ublkd_ctrl_ring_error(err);
	}
	/* A worker has no business with this ring, and its mapping would keep it alive. */
	io_uring_ring_dontfork(&ctrl->ring);
	*ret = ctrl;
	return 0;
}

int ublkd_ctrl_fd(struct ublkd_ctrl *ctrl)
{
	return ctrl->ring.ring_fd;
}

static int ublkd_ctrl_foreign(void)
{
	return ublkd_error(-EPERM, "a control ring belongs to the process that created it");
}

/* Submit the one entry that was prepared. */
static int ublkd_ctrl_flush(struct ublkd_ctrl *ctrl)
{
	int n;

	do {
		n = io_uring_submit(&ctrl->ring);
	} while (n == -EINTR);
	if (n == 1)
		return 0;
	return n < 0 ? n : -EAGAIN;
}

int ublkd_ctrl_submit(struct ublkd_ctrl *ctrl, const struct ublkd_ctrl_cmd_params *cmd)
{
	const struct ublksrv_ctrl_cmd payload = {
		.dev_id = cmd->dev_id,
		.queue_id = cmd->queue_id,
		.len = cmd->buf ? cmd->len : 0,
		.addr = cmd->buf ? (uintptr_t)ctrl->bounce : 0,
		.data = { cmd->data0 },
		.dev_path_len = cmd->dev_path_len,
	};
	struct io_uring_sqe *sqe;
	int err;

	if (ctrl->owner != getpid())
		return ublkd_ctrl_foreign();
	if (ctrl->busy)
		return ublkd_error(-EBUSY, "the previous control command is still outstanding");
	sqe = io_uring_get_sqe(&ctrl->ring);
	if (!sqe)
		return -EBUSY;

	memset(sqe, 0, 2 * sizeof(*sqe));
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->fd = ctrl->control_fd;
	sqe->cmd_op = cmd->cmd_op;
	sqe->user_data = CTRL_TOKEN_COMMAND;
	memcpy(sqe->cmd, &payload, sizeof(payload));

	ctrl->user_buf = cmd->buf;
	ctrl->len = payload.len;
	if (ctrl->user_buf)
		memcpy(ctrl->bounce, ctrl->user_buf, ctrl->len);

	/* After a failure the entry is still queued: the ring is good for nothing else. */
	ctrl->busy = true;
	err = ublkd_ctrl_flush(ctrl);
	if (err)
		ublkd_error(err, "cannot submit a control command: %s", strerror(-err));
	return err;
}

static int64_t ublkd_ctrl_now_ms(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000 + ts.tv_nsec / 1000000;
}

int ublkd_ctrl_wait(struct ublkd_ctrl *ctrl, int timeout_ms, int32_t *ret)
{
	int64_t deadline = ublkd_ctrl_now_ms() + timeout_ms;

	if (ctrl->owner != getpid())
		return ublkd_ctrl_foreign();
	if (!ctrl->busy)
		return ublkd_error(-EINVAL, "no control command is outstanding");
	for (;;) {
		struct io_uring_cqe *cqe;
		uint64_t token;
		int32_t res;
		int err;

		err = io_uring_peek_cqe(&ctrl->ring, &cqe);
		if (err == -EAGAIN) {
			int64_t left = timeout_ms < 0 ? 1000 : deadline - ublkd_ctrl_now_ms();
			struct __kernel_timespec ts = {
				.tv_sec = left / 1000,
				.tv_nsec = left % 1000 * 1000000,
			};

			if (left <= 0)
				return -ETIME;
			err = io_uring_wait_cqe_timeout(&ctrl->ring, &cqe, &ts);
			/* Which of the two ended it, the clock above decides. */
			if (err == -ETIME || err == -EINTR || err == -EAGAIN)
				continue;
		}
		if (err)
			return ublkd_error(err, "cannot wait for a control command: %s", strerror(-err));
		token = cqe->user_data;
		res = cqe->res;
		io_uring_cqe_seen(&ctrl->ring, cqe);
		if (token != CTRL_TOKEN_COMMAND)
			continue;

		ctrl->busy = false;
		if (ctrl->user_buf)
			memcpy(ctrl->user_buf, ctrl->bounce, ctrl->len);
		ctrl->user_buf = NULL;
		*ret = res;
		return 0;
	}
}

int ublkd_ctrl_cancel(struct ublkd_ctrl *ctrl)
{
	struct io_uring_sqe *sqe;

	if (ctrl->owner != getpid())
		return ublkd_ctrl_foreign();
	if (!ctrl->busy)
		return 0;
	sqe = io_uring_get_sqe(&ctrl->ring);
	if (!sqe)
		return -EBUSY;
	memset(sqe, 0, 2 * sizeof(*sqe));
	sqe->opcode = IORING_OP_ASYNC_CANCEL;
	sqe->fd = -1;
	sqe->addr = CTRL_TOKEN_COMMAND;
	sqe->user_data = CTRL_TOKEN_CANCEL;
	return ublkd_ctrl_flush(ctrl);
}

void ublkd_ctrl_destroy(struct ublkd_ctrl *ctrl)
{
	if (!ctrl)
		return;
	if (ctrl->owner != getpid()) {
		/* A child: the mappings did not come along, and the command isn't its own. */
		close(ctrl->ring.ring_fd);
		free(ctrl->bounce);
		free(ctrl);
		return;
	}
	ublkd_ctrl_cancel(ctrl);
	io_uring_queue_exit(&ctrl->ring);
	if (!ctrl->busy)
		free(ctrl->bounce);
	free(ctrl);
}
