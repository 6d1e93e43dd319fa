/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The whole of the engine that Python (through cffi) or a C main may call.
 *
 * Every function returns 0 (or a non-negative result) or -errno; results go
 * to the last parameter, named ret. A queue and its target belong to the
 * process and thread that created them.
 *
 * The text between the two cdef marks is read by cffi as it stands: plain
 * declarations only, no preprocessor conditions.
 */
#ifndef UBLKD_ENGINE_H
#define UBLKD_ENGINE_H

#include <stddef.h>
#include <stdint.h>

/* cdef begin */

/* How a request's data crosses between driver and server. */
#define UBLKD_TRANSPORT_COPY 0      /* driver copies to and from the tag's buffer */
#define UBLKD_TRANSPORT_USER_COPY 1 /* server copies by pread/pwrite on the char device */
#define UBLKD_TRANSPORT_ZERO_COPY 2 /* request pages are registered buffers of the ring, by themselves */
#define UBLKD_TRANSPORT_BATCH 256   /* with one of the last two: commands for many tags at once (UBLK_F_BATCH_IO) */

/* What ublkd_queue_run() returned for. */
#define UBLKD_RUN_DONE 0 /* the driver took every tag back: the device stopped */
#define UBLKD_RUN_WAKE 1 /* the wake descriptor was written to: look, then run again */
#define UBLKD_RUN_DRAINED 2 /* it was told to drain, and has: let the process end */

/*
 * What to write to the wake descriptor, from any process.
 * PING makes one pass, which shows in the heartbeat. DRAIN answers what the
 * target has in hand and begins nothing more: requests that come meanwhile
 * stay with the driver's account of this server, to be issued again to the
 * next. DRAIN_IDLE goes on serving until a pass leaves nothing in hand.
 * SERVE takes either back, as long as the run has not returned.
 */
#define UBLKD_WAKE_RETURN 1
#define UBLKD_WAKE_PING 0x10000
#define UBLKD_WAKE_DRAIN 0x100000000
#define UBLKD_WAKE_DRAIN_IDLE 0x10000000000
#define UBLKD_WAKE_SERVE 0x1000000000000

struct ublkd_queue;
struct ublkd_target;
struct ublkd_ctrl;

struct ublkd_queue_params {
	int cdev_fd;          /* /dev/ublkcN, inherited; the queue never closes it */
	int wake_fd;          /* an eventfd that takes UBLKD_WAKE_*, or -1 */
	uint16_t qid;
	uint16_t depth;       /* tags, 1..4096 */
	uint16_t share;       /* of the tags: each whose number modulo shares is share; */
	uint16_t shares;      /* 0 or 1: all of them. More need PER_IO_DAEMON, and are not for BATCH. */
	uint32_t max_io_bytes;
	uint32_t transport;   /* UBLKD_TRANSPORT_* */
	uint32_t poll_us;     /* stay awake this long when there is nothing to do; 0: sleep at once */
	uint64_t dev_bytes;   /* device size, bytes, for the range check if shm is NULL */
	const void *cmdbuf;   /* the queue's mapped command buffer */
	void *shm;            /* the mapped statistics segment (layout.h), or NULL: none kept */
};

/* Command buffer of one queue: map in the process that opened the char device, before fork. */
int ublkd_cmdbuf_map(int cdev_fd, unsigned qid, unsigned depth, void **ret);
int ublkd_cmdbuf_unmap(void *cmdbuf, unsigned depth);

/*
 * Create a queue on target, fetch every tag (the first run does, if that was
 * not called), run it until the device stops, destroy it. Destroy does not
 * destroy the target.
 */
int ublkd_queue_create(const struct ublkd_queue_params *params, struct ublkd_target *target,
		       struct ublkd_queue **ret);
int ublkd_queue_fetch(struct ublkd_queue *q);
int ublkd_queue_run(struct ublkd_queue *q);
void ublkd_queue_destroy(struct ublkd_queue *q);
/* One line on the last failure of this process's engine calls; never NULL. */
const char *ublkd_last_error(void);

struct ublkd_null_config {
	int zero_reads; /* 0: reads show whatever the pages held */
};
int ublkd_null_create(const struct ublkd_null_config *config, struct ublkd_target **ret);

/*
 * A RAM disk in a tmpfs file of ublkd_memory_file_bytes(size) bytes, mapped
 * whole and shared: the disk, then one byte per 64 KiB of it that says whether
 * anything was ever written there, so that reading an unused part takes no memory.
 * These last bytes must be allocated (fallocate), against a tmpfs that is full.
 */
struct ublkd_memory_config {
	void *base;
	uint64_t size; /* of the disk, bytes */
	int fd;
};
uint64_t ublkd_memory_file_bytes(uint64_t size);
int ublkd_memory_create(const struct ublkd_memory_config *config, struct ublkd_target **ret);

#define UBLKD_LOOP_BLOCK_DEVICE 1
#define UBLKD_LOOP_READ_ONLY 2

struct ublkd_loop_config {
	int fd;
	uint32_t flags;      /* UBLKD_LOOP_* */
	uint64_t offset;     /* bytes into the backing file where the device begins */
};
int ublkd_loop_create(const struct ublkd_loop_config *config, struct ublkd_target **ret);
/*
 * Smallest offset and length, in bytes and a power of two up to 4096, that
 * direct I/O on path takes; 0 if it takes none. Any process.
 */
int ublkd_dio_align(const char *path, int writable);
/* 1 if holes can be punched in the file (tried beyond its end, where there is nothing to lose), else 0. */
int ublkd_can_punch(int fd, uint64_t end);

void ublkd_target_destroy(struct ublkd_target *target);

/*
 * Control ring: one command at a time on /dev/ublk-control.
 * submit() starts a command; wait() returns its result, or -ETIME when
 * timeout_ms passed first (the command stays outstanding: wait again, or
 * cancel). fd() is readable once a result is there. buf must stay valid until
 * the result was returned.
 */
struct ublkd_ctrl_cmd_params {
	uint32_t cmd_op;
	uint32_t dev_id;
	uint16_t queue_id;
	uint16_t len;
	void *buf;
	uint64_t data0;
	uint16_t dev_path_len;
};
int ublkd_ctrl_create(int control_fd, struct ublkd_ctrl **ret);
int ublkd_ctrl_fd(struct ublkd_ctrl *ctrl);
int ublkd_ctrl_submit(struct ublkd_ctrl *ctrl, const struct ublkd_ctrl_cmd_params *cmd);
int ublkd_ctrl_wait(struct ublkd_ctrl *ctrl, int timeout_ms, int32_t *ret);
int ublkd_ctrl_cancel(struct ublkd_ctrl *ctrl);
void ublkd_ctrl_destroy(struct ublkd_ctrl *ctrl);

/*
 * Title of the calling process in ps and top: its name (15 characters are
 * kept) and, as far as it fits over the old one, its command line.
 */
void ublkd_set_title(const char *title);
/* Die by SIGKILL when the parent dies. -ESRCH if it is no longer parent_pid. */
int ublkd_die_with_parent(int parent_pid);
/* No more of that. */
int ublkd_outlive_parent(void);
/* Be the parent of grandchildren whose parent ends. */
int ublkd_adopt_orphans(void);
/* Be woken without pushing the running task aside, and see the requests of its whole turn together. */
int ublkd_be_batch_task(void);
/* Memory that this process allocates while serving must not wait for its own disk to take dirty pages. */
int ublkd_be_io_flusher(void);
/*
 * A mount namespace of one's own, from which no mount travels. Those of others
 * still come, and go: what is unmounted elsewhere must not live on here.
 */
int ublkd_private_mounts(void);
/* Unmount path lazily in the caller's namespace. */
int ublkd_detach_mount(const char *path);

/* What the running kernel's io_uring offers, for `ublkd features`. */
int ublkd_probe_ring(unsigned *ret_setup_flags);

/* cdef end */
#endif
