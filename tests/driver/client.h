/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the driver's tests need of a server: control commands, I/O commands,
 * a queue's mapping. Results are those of the driver, unchanged.
 */
#ifndef CLIENT_H
#define CLIENT_H

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/ioctl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "ublk.h"

#define MAX_IO (64 << 10)

__attribute__((noreturn)) static inline void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(2);
}

/* Of a result that is 0 or a negative errno: go on only with 0. */
static inline void must(int err, const char *what)
{
	if (err) {
		errno = -err;
		die(what);
	}
}

static inline int64_t now_us(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

/* A zeroed entry; what is queued is submitted if there is no room. */
static inline struct io_uring_sqe *get_sqe(struct io_uring *ring, size_t bytes)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(ring);

	if (!sqe) {
		io_uring_submit(ring);
		sqe = io_uring_get_sqe(ring);
	}
	if (!sqe)
		die("no room in the ring");
	memset(sqe, 0, bytes);
	return sqe;
}

/* A completion, or NULL if none comes for a little while. */
static inline struct io_uring_cqe *next_cqe(struct io_uring *ring)
{
	struct __kernel_timespec ts = { 0, 20000000 };
	struct io_uring_cqe *cqe;

	return io_uring_wait_cqe_timeout(ring, &cqe, &ts) ? NULL : cqe;
}

struct control {
	struct io_uring ring;
	int fd;
};

static inline void control_open(struct control *c)
{
	c->fd = open("/dev/ublk-control", O_RDWR | O_CLOEXEC);
	if (c->fd < 0)
		die("/dev/ublk-control");
	errno = -io_uring_queue_init(4, &c->ring, IORING_SETUP_SQE128);
	if (errno)
		die("io_uring");
}

static inline void control_close(struct control *c)
{
	io_uring_queue_exit(&c->ring);
	close(c->fd);
}

#define TIMED_OUT (-ETIMEDOUT) /* no command of ours ends so by itself */
#define PATIENCE_MS 300000      /* for what does not wait for long, on however busy a machine */

/* One command, cancelled after timeout_ms. -ECANCELED: it had not begun; -EINTR: it was waiting. */
static inline int control_once(struct control *c, uint32_t op, const struct ublksrv_ctrl_cmd *cmd, int timeout_ms)
{
	struct io_uring_sqe *sqe = get_sqe(&c->ring, 128);
	struct __kernel_timespec ts = { timeout_ms / 1000, timeout_ms % 1000 * 1000000L };
	struct io_uring_cqe *cqe;
	bool cancelled = false;
	int res, err;

	sqe->opcode = IORING_OP_URING_CMD;
	sqe->fd = c->fd;
	sqe->cmd_op = op;
	sqe->user_data = 1;
	memcpy((char *)sqe + 48, cmd, sizeof(*cmd));
	io_uring_submit(&c->ring);
	for (;;) {
		err = io_uring_wait_cqe_timeout(&c->ring, &cqe, &ts);
		if (err == -EINTR)
			continue;
		if (err == -ETIME && !cancelled) {
			sqe = get_sqe(&c->ring, 128);
			sqe->opcode = IORING_OP_ASYNC_CANCEL;
			sqe->fd = -1;
			sqe->addr = 1;
			sqe->user_data = 2;
			io_uring_submit(&c->ring);
			cancelled = true;
			ts.tv_sec = PATIENCE_MS / 1000;
			continue;
		}
		if (err) {
			errno = -err;
			die("a control command that can't be cancelled");
		}
		res = cqe->res;
		err = cqe->user_data == 2;
		io_uring_cqe_seen(&c->ring, cqe);
		if (err)
			continue;
		/* the cancel's own answer; one that comes later is skipped by the next command */
		while (cancelled && io_uring_peek_cqe(&c->ring, &cqe) == 0)
			io_uring_cqe_seen(&c->ring, cqe);
		return res;
	}
}

/*
 * One command; TIMED_OUT if it was still waiting after timeout_ms. On a busy
 * machine it may not even have begun by then: again, with more time.
 */
static inline int control_raw(struct control *c, uint32_t op, const struct ublksrv_ctrl_cmd *cmd, int timeout_ms)
{
	int res;

	while ((res = control_once(c, op, cmd, timeout_ms)) == -ECANCELED)
		timeout_ms *= 2;
	return res == -EINTR ? TIMED_OUT : res;
}

static inline int control(struct control *c, uint32_t op, uint32_t id, void *buf, unsigned int len, uint64_t data)
{
	struct ublksrv_ctrl_cmd cmd = {
		.dev_id = id,
		.queue_id = 0xffff,
		.len = len,
		.addr = (uintptr_t)buf,
		.data = { data },
	};

	return control_raw(c, op, &cmd, PATIENCE_MS);
}

static inline int add(struct control *c, struct ublksrv_ctrl_dev_info *info, unsigned int queues,
		      unsigned int depth, uint64_t flags)
{
	*info = (struct ublksrv_ctrl_dev_info){
		.nr_hw_queues = queues,
		.queue_depth = depth,
		.max_io_buf_bytes = MAX_IO,
		.dev_id = ~0u,
		.flags = flags,
	};
	return control(c, UBLK_U_CMD_ADD_DEV, ~0u, info, sizeof(*info), 0);
}

static inline struct ublk_params plain_params(uint64_t bytes)
{
	return (struct ublk_params){
		.len = sizeof(struct ublk_params),
		.types = UBLK_PARAM_TYPE_BASIC,
		.basic = {
			.logical_bs_shift = 9,
			.physical_bs_shift = 12,
			.io_opt_shift = 12,
			.io_min_shift = 12,
			.max_sectors = MAX_IO >> 9,
			.dev_sectors = bytes >> 9,
		},
	};
}

static inline int set_params(struct control *c, uint32_t id, struct ublk_params *p)
{
	return control(c, UBLK_U_CMD_SET_PARAMS, id, p, sizeof(*p), 0);
}

static inline void delete_device(struct control *c, uint32_t id)
{
	must(control(c, UBLK_U_CMD_DEL_DEV, id, NULL, 0, 0), "delete");
}

static inline int open_char(uint32_t id)
{
	char path[32];
	int fd, i;

	snprintf(path, sizeof(path), "/dev/ublkc%u", id);
	/* who had it last may not be quite gone */
	for (i = 0; i < 30000; i++) {
		fd = open(path, O_RDWR | O_CLOEXEC);
		if (fd >= 0 || (errno != EBUSY && errno != ENOENT))
			break;
		usleep(2000);
	}
	return fd;
}

static inline size_t descs_size(unsigned int depth)
{
	return (depth * sizeof(struct ublksrv_io_desc) + 4095) & ~4095ul;
}

static inline off_t descs_offset(unsigned int queue)
{
	return UBLKSRV_CMD_BUF_OFFSET + (off_t)queue * descs_size(UBLK_MAX_QUEUE_DEPTH);
}

static inline struct ublksrv_io_desc *map_queue(int fd, unsigned int queue, unsigned int depth)
{
	return mmap(NULL, descs_size(depth), PROT_READ, MAP_SHARED, fd, descs_offset(queue));
}

static inline struct io_uring_sqe *char_cmd(struct io_uring *ring, int fd, uint32_t op, const void *cmd, size_t bytes)
{
	struct io_uring_sqe *sqe = get_sqe(ring, sizeof(*sqe));

	sqe->opcode = IORING_OP_URING_CMD;
	sqe->fd = fd;
	sqe->cmd_op = op;
	memcpy((char *)sqe + 48, cmd, bytes);
	return sqe;
}

static inline struct io_uring_sqe *io_cmd(struct io_uring *ring, int fd, uint32_t op, unsigned int queue,
					  unsigned int tag, int res, uint64_t addr)
{
	struct ublksrv_io_cmd cmd = { .q_id = queue, .tag = tag, .result = res, .addr = addr };
	struct io_uring_sqe *sqe = char_cmd(ring, fd, op, &cmd, sizeof(cmd));

	sqe->user_data = tag;
	return sqe;
}

#ifndef IORING_URING_CMD_MULTISHOT
#define IORING_URING_CMD_MULTISHOT (1U << 1)
#endif

/* Bytes of an element of a batch. */
static inline unsigned int elem_size(uint16_t flags)
{
	return 8 + (flags & UBLK_BATCH_F_HAS_BUF_ADDR ? 8 : 0) + (flags & UBLK_BATCH_F_HAS_ZONE_LBA ? 8 : 0);
}

/* A command for many tags; a FETCH takes its buffers from this group. */
static inline struct io_uring_sqe *batch_cmd(struct io_uring *ring, int fd, uint32_t op,
					     const struct ublk_batch_io *cmd, const void *elems, unsigned int group)
{
	struct io_uring_sqe *sqe = char_cmd(ring, fd, op, cmd, sizeof(*cmd));

	sqe->addr = (uintptr_t)elems;
	if (op == UBLK_U_IO_FETCH_IO_CMDS) {
		sqe->flags |= IOSQE_BUFFER_SELECT;
		sqe->buf_group = group;
		sqe->rw_flags = IORING_URING_CMD_MULTISHOT;
	}
	return sqe;
}

#endif
