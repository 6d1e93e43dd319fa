/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Objects and locks.
 *
 * A device is made by ADD_DEV, lives in the table of devices until its last
 * reference goes, and is referenced by: the table's entry until DEL_DEV, each
 * open file and mapping of /dev/ublkcN (by way of the cdev), the disk while it
 * exists, and each control command at work on it.
 *
 * A server reaches the device through an open file of /dev/ublkcN. An armed
 * I/O command pins that file. So when a file is released no command of it is
 * left, neither is a mapping nor a system call, and, because a ring lets go of
 * its registered files last, no I/O of a dead server's ring: only then are its
 * requests given to somebody else. A request's pages in the buffer table of a
 * ring pin it, too. That moment, in server.c, is the only one at which a queue
 * changes hands.
 *
 * Locks, outermost first:
 *   ub->mutex   one control command at a time changes the device. Held across
 *               add_disk() and del_gendisk(), so nothing that these may wait
 *               for (I/O commands, release of files) takes it.
 *   ub->lock    state, disk, mode of the queues (up, closing, lost), owners,
 *               counts of fetched tags, and the decision whether a request is
 *               parked or failed. Never taken on the way of a request that
 *               finds its tag armed.
 *   io->lock    state and contents of one tag. Whoever moves a tag from ARMED
 *               to another state owns its command, and completes it.
 *   batch->lock requests and commands that wait for each other, in batch.c.
 * None is taken in interrupts.
 *
 * q->up and q->closing are written under ub->lock and read under io->lock by
 * those who arm or dispatch a tag. Who clears q->up or sets q->closing goes
 * over all tags afterwards, taking each io->lock: a tag is either seen by that
 * pass or its user sees the flag.
 */
#ifndef UBLKD_DRIVER_H
#define UBLKD_DRIVER_H

#include <linux/atomic.h>
#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#include <linux/cdev.h>
#include <linux/device.h>
#include <linux/mutex.h>
#include <linux/refcount.h>
#include <linux/sched.h>
#include <linux/spinlock.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>

#include "compat.h"
#include <linux/ioctl.h>

#include "ublk.h"

#define UBLK_MAX_DEVICES	(1U << MINORBITS)

/* How often is looked for dead servers, where nothing tells of them. */
#define UBLK_WATCH_PERIOD	HZ

#ifdef UBLK_HAVE_ZONED
#define UBLK_FEATURES_ZONED	UBLK_F_ZONED
#else
#define UBLK_FEATURES_ZONED	0
#endif

#ifdef UBLK_HAVE_URING_BVEC
#define UBLK_FEATURES_ZEROCOPY	(UBLK_F_SUPPORT_ZERO_COPY | UBLK_F_AUTO_BUF_REG | UBLK_F_BUF_REG_OFF_DAEMON)
#else
#define UBLK_FEATURES_ZEROCOPY	0
#endif

#ifdef UBLK_HAVE_URING_MULTISHOT
#define UBLK_FEATURES_BATCH	UBLK_F_BATCH_IO
#else
#define UBLK_FEATURES_BATCH	0
#endif

/* What is built for this kernel. ADD_DEV drops what is not in here. */
#define UBLK_FEATURES (UBLK_F_URING_CMD_COMP_IN_TASK | UBLK_F_NEED_GET_DATA |	\
		       UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE |	\
		       UBLK_F_UNPRIVILEGED_DEV | UBLK_F_CMD_IOCTL_ENCODE |	\
		       UBLK_F_USER_COPY | UBLK_F_USER_RECOVERY_FAIL_IO |	\
		       UBLK_F_UPDATE_SIZE | UBLK_F_QUIESCE |			\
		       UBLK_F_PER_IO_DAEMON | UBLK_F_SAFE_STOP_DEV |		\
		       UBLK_F_NO_AUTO_PART_SCAN | UBLK_F_SHARDS |		\
		       UBLK_F_SHMEM_ZC |					\
		       UBLK_FEATURES_ZONED | UBLK_FEATURES_ZEROCOPY |		\
		       UBLK_FEATURES_BATCH)

/* Not asked for but told: ways in which this driver behaves with any server. */
#define UBLK_FEATURES_ALWAYS (UBLK_F_URING_CMD_COMP_IN_TASK | UBLK_F_CMD_IOCTL_ENCODE |	\
			      UBLK_F_PER_IO_DAEMON | UBLK_F_SAFE_STOP_DEV |		\
			      (UBLK_FEATURES & UBLK_F_BUF_REG_OFF_DAEMON))

#define UBLK_PARAM_TYPES (UBLK_PARAM_TYPE_BASIC | UBLK_PARAM_TYPE_DISCARD |	\
			  UBLK_PARAM_TYPE_DEVT | UBLK_PARAM_TYPE_ZONED |	\
			  UBLK_PARAM_TYPE_DMA_ALIGN | UBLK_PARAM_TYPE_SEGMENT)

enum ublk_io_state {
	UBLK_IO_UNARMED,	/* no command, no request: not fetched, or given back */
	UBLK_IO_ARMED,		/* ->cmd waits for a request; in a batch the tag does */
	UBLK_IO_DISPATCHED,	/* ->cmd and ->req are on their way to the server's task; in a batch ->req waits */
	UBLK_IO_SERVED,		/* the server has ->req */
	UBLK_IO_WANTS_DATA,	/* so it has, but no data yet: NEED_GET_DATA comes next */
	UBLK_IO_BUSY,		/* a command of the server's is at work on ->req */
};

/* Where the server wants the data of a tag's next request. */
struct ublk_place {
	u64 addr;	/* in its memory */
	u16 index;	/* UBLK_F_AUTO_BUF_REG: in the buffer table of its ring */
	bool fallback;	/* if that can't be, it registers the buffer by itself */
};

/* What the server says of a request, and the tag's next place. */
struct ublk_answer {
	int res;
	u64 sector;	/* of an append */
	struct ublk_place next;
};

struct ublk_io {
	spinlock_t lock;
	enum ublk_io_state state;
	struct io_uring_cmd *cmd;
	struct request *req;
	struct ublk_place place;
	void *ring;			/* whose table ->req is in at ->place.index, or NULL */
	struct task_struct *task;	/* that fetched the tag; until the queue has no owner */
};

struct ublk_device;
struct ublk_batch;
struct ublk_buffer;
struct ublk_fetch;
struct ublk_shmem_table;

struct ublk_queue {
	struct ublk_device *ub;
	unsigned int id;
	unsigned int depth;
	bool up;			/* requests go to the server */
	bool closing;			/* tags are given back instead of armed */
	bool lost;			/* its owner is about to go */
	unsigned int fetched;		/* tags, by this owner */
	struct ublk_file *owner;
	u32 generation;			/* owners that it has had */
	struct ublk_batch *batch;	/* UBLK_F_BATCH_IO */
	struct ublksrv_io_desc *descs;	/* the server reads them */
	struct ublk_io ios[];
};

/* With an armed command, in io_uring's memory. */
struct ublk_cmd_data {
	struct ublk_queue *q;
	union {
		unsigned int tag;
		struct ublk_fetch *fetch;	/* UBLK_F_BATCH_IO */
	};
};

static inline struct ublk_cmd_data *ublk_cmd_data(struct io_uring_cmd *cmd)
{
	BUILD_BUG_ON(sizeof(struct ublk_cmd_data) > sizeof(cmd->pdu));
	return (struct ublk_cmd_data *)cmd->pdu;
}

/* An open file of /dev/ublkcN. */
struct ublk_file {
	struct ublk_device *ub;
	struct file *filp;
};

struct ublk_device {
	struct device dev;		/* its reference count is ours */
	struct cdev cdev;
	unsigned int id;
	bool id_used;
	bool deleted;			/* under ublk_devices_mutex; hint elsewhere */
	bool unprivileged_counted;
	bool tag_set_made;
	struct mutex mutex;
	spinlock_t lock;
	wait_queue_head_t wait;		/* queues fetched, device deleted */

	struct ublksrv_ctrl_dev_info info;
	struct ublk_params params;	/* under mutex */
	struct gendisk *disk;
	struct blk_mq_tag_set tag_set;
	struct ublk_queue **queues;

	unsigned int ready;		/* queues whose tags are all fetched */
	unsigned int files;		/* open */
	struct mm_struct *mm;		/* that may map; compared only */
	bool force_abort;		/* STOP_DEV: nothing waits for a server any more */
	bool started;			/* there was a disk */
	bool stopped;			/* for good */
	bool recovering;		/* between START_ and END_USER_RECOVERY */
	bool served;			/* a queue was fetched once */
	bool plain_daemon;		/* a tag was fetched without CAP_SYS_ADMIN */
	bool no_open;			/* TRY_STOP_DEV is at work */
	bool checking_zones;		/* START_DEV has the server report them */
	unsigned int io_timeout;	/* seconds, then the server is killed; 0: never */

	struct mutex shmem_mutex;	/* registers and unregisters buffers; no other lock inside */
	struct xarray buffers;
	struct ublk_shmem_table __rcu *shmem;

	struct work_struct stop_work;
	unsigned int stops;		/* how often it ran; written under mutex */
	struct work_struct scan_work;
	struct work_struct free_work;
	struct delayed_work watch_work;
};

/* Beside each request: those who use its pages, and what its last user does. */
struct ublk_request {
	refcount_t ref;
	int res;
	enum ublk_end { UBLK_END_COMMIT, UBLK_END_ABORT } end;
	struct ublk_buffer *buffer;	/* UBLK_F_SHMEM_ZC: that its data is in, or NULL */
	/* REPORT_ZONES: about which */
	unsigned int zones;
	sector_t zone_sector;
};

static inline bool ublk_has(const struct ublk_device *ub, u64 flag)
{
	return ub->info.flags & flag;
}

static inline bool ublk_may_recover(const struct ublk_device *ub)
{
	return ublk_has(ub, UBLK_F_USER_RECOVERY);
}

static inline bool ublk_req_has_data(const struct request *req)
{
	return req_op(req) == REQ_OP_READ || req_op(req) == REQ_OP_WRITE;
}

/* No copy by the driver. */
#define UBLK_MOVES_DATA (UBLK_F_USER_COPY | UBLK_F_SUPPORT_ZERO_COPY | UBLK_F_AUTO_BUF_REG)

static inline bool ublk_server_moves_data(const struct ublk_device *ub)
{
	return ublk_has(ub, UBLK_MOVES_DATA);
}

/* Then there are two more whose data the server moves. */
static inline bool ublk_req_fills(const struct request *req)
{
	return req_op(req) == REQ_OP_READ || req_op(req) == REQ_OP_DRV_IN;
}

static inline bool ublk_req_drains(const struct request *req)
{
	return req_op(req) == REQ_OP_WRITE || req_op(req) == REQ_OP_ZONE_APPEND;
}

/* Of a request that the server has: its data is in a registered buffer, where it needs no copy. */
static inline bool ublk_req_is_shared(const struct ublk_device *ub, struct request *req)
{
	struct ublk_request *data = blk_mq_rq_to_pdu(req);

	return ublk_has(ub, UBLK_F_SHMEM_ZC) && data->buffer;
}

static inline size_t ublk_descs_size(unsigned int depth)
{
	return PAGE_ALIGN(depth * sizeof(struct ublksrv_io_desc));
}

/* main.c */
extern struct workqueue_struct *ublk_wq;
extern struct workqueue_struct *ublk_stop_wq;
extern struct class ublk_class;
extern dev_t ublk_devt;
extern unsigned int ublk_max_unprivileged;
extern unsigned int ublk_default_timeout;

/* control.c */
int ublk_control_command(struct io_uring_cmd *cmd, unsigned int issue_flags);
int ublk_check_opcode(u32 op);

/* device.c */
struct ublk_device *ublk_get_by_id(u32 id);
void ublk_put(struct ublk_device *ub);
int ublk_add(struct ublksrv_ctrl_dev_info *info, void __user *answer);
int ublk_start(struct ublk_device *ub, int pid);
void ublk_begin_stop(struct ublk_device *ub);
int ublk_stop(struct ublk_device *ub);
int ublk_try_stop(struct ublk_device *ub);
int ublk_update_size(struct ublk_device *ub, u64 sectors);
int ublk_delete(struct ublk_device *ub);
int ublk_wait_for_id(u32 id);
void ublk_wait_for_devices(void);
int ublk_wait_ready(struct ublk_device *ub);
bool ublk_all_ready(struct ublk_device *ub);

/* params.c */
int ublk_params_check(struct ublk_device *ub, const struct ublk_params *params);
struct gendisk *ublk_alloc_disk(struct ublk_device *ub);

/* queue.c */
extern const struct blk_mq_ops ublk_blk_mq_ops;
int ublk_alloc_queues(struct ublk_device *ub);
void ublk_free_queues(struct ublk_device *ub);
void ublk_abort(struct ublk_queue *q, struct request *req, bool delivered);
void ublk_finish(struct ublk_queue *q, struct request *req, enum ublk_end end, int res);
void ublk_req_put(struct ublk_queue *q, struct request *req);
void ublk_kick(struct gendisk *disk);

/* io.c */
int ublk_file_command(struct io_uring_cmd *cmd, unsigned int issue_flags);
void ublk_dispatch(struct io_uring_cmd *cmd);
void ublk_give_back(struct io_uring_cmd *cmd);
bool ublk_task_is_gone(void);
bool ublk_may_fetch(struct ublk_queue *q, struct ublk_file *file);
void ublk_queue_fetched(struct ublk_queue *q, struct ublk_file *file, unsigned int tags, bool plain);
void ublk_arm(struct ublk_queue *q, unsigned int tag, const struct ublk_place *place);
bool ublk_provide(struct ublk_queue *q, unsigned int tag, struct io_uring_cmd *cmd, unsigned int issue_flags);
bool ublk_refuse(struct ublk_queue *q, unsigned int tag);
int ublk_answer(struct ublk_queue *q, unsigned int tag, struct io_uring_cmd *cmd, const struct ublk_answer *answer,
		unsigned int issue_flags);

/* copy.c */
size_t ublk_copy_request(struct request *req, size_t offset, struct iov_iter *iter, int dir);
size_t ublk_copy_to_server(struct request *req, u64 addr);
size_t ublk_copy_from_server(struct request *req, u64 addr, size_t bytes);
struct request *ublk_req_get(struct ublk_queue *q, unsigned int tag);
ssize_t ublk_file_read(struct kiocb *iocb, struct iov_iter *iter);
ssize_t ublk_file_write(struct kiocb *iocb, struct iov_iter *iter);

/* chardev.c */
extern const struct file_operations ublk_file_ops;

/* server.c */
void ublk_server_lost(struct ublk_device *ub, struct ublk_file *file);
void ublk_server_gone(struct ublk_file *file);
void ublk_reap_exiting(struct ublk_device *ub);
void ublk_watch(struct work_struct *work);
void ublk_give_back_armed(struct ublk_device *ub);
int ublk_start_recovery(struct ublk_device *ub);
int ublk_end_recovery(struct ublk_device *ub, int pid);
int ublk_quiesce(struct ublk_device *ub, u64 timeout_ms);
int ublk_get_queue_states(struct ublk_device *ub, u64 addr, unsigned int len);

/* shmem.c */
int ublk_shmem_register(struct ublk_device *ub, u64 addr, unsigned int len);
int ublk_shmem_unregister(struct ublk_device *ub, u64 index);
void ublk_shmem_free(struct ublk_device *ub);
bool ublk_shmem_match(struct ublk_device *ub, struct request *req, u64 *addr);
void ublk_shmem_put(struct ublk_device *ub, struct request *req);

/* batch.c */
#ifdef UBLK_HAVE_URING_MULTISHOT
bool ublk_is_batch_op(u32 op);
int ublk_batch_command(struct io_uring_cmd *cmd, unsigned int issue_flags);
void ublk_batch_cancel(struct io_uring_cmd *cmd, unsigned int issue_flags);
int ublk_batch_alloc(struct ublk_queue *q);
void ublk_batch_free(struct ublk_queue *q);
struct io_uring_cmd *ublk_batch_add(struct ublk_queue *q, unsigned int tag);
void ublk_batch_wake(struct io_uring_cmd *cmd);
void ublk_batch_take_back(struct ublk_queue *q);
void ublk_batch_close(struct ublk_queue *q);
void ublk_batch_reset(struct ublk_queue *q);
bool ublk_batch_has_fetch(struct ublk_queue *q);
#else
static inline bool ublk_is_batch_op(u32 op)
{
	return false;
}

static inline int ublk_batch_command(struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	return -EOPNOTSUPP;
}

static inline void ublk_batch_cancel(struct io_uring_cmd *cmd, unsigned int issue_flags)
{
}

static inline int ublk_batch_alloc(struct ublk_queue *q)
{
	return 0;
}

static inline void ublk_batch_free(struct ublk_queue *q)
{
}

static inline struct io_uring_cmd *ublk_batch_add(struct ublk_queue *q, unsigned int tag)
{
	return NULL;
}

static inline void ublk_batch_wake(struct io_uring_cmd *cmd)
{
}

static inline void ublk_batch_take_back(struct ublk_queue *q)
{
}

static inline void ublk_batch_close(struct ublk_queue *q)
{
}

static inline void ublk_batch_reset(struct ublk_queue *q)
{
}

static inline bool ublk_batch_has_fetch(struct ublk_queue *q)
{
	return true;
}
#endif

/* zerocopy.c */
#ifdef UBLK_HAVE_URING_BVEC
bool ublk_place_by_index(struct ublk_device *ub, u64 addr, struct ublk_place *place);
int ublk_buffer_register(struct ublk_queue *q, unsigned int tag, u64 index, struct io_uring_cmd *cmd,
			 unsigned int issue_flags);
int ublk_buffer_unregister(struct ublk_device *ub, u64 index, struct io_uring_cmd *cmd, unsigned int issue_flags);
bool ublk_auto_register(struct ublk_queue *q, unsigned int tag, struct io_uring_cmd *cmd, unsigned int issue_flags);
void ublk_auto_unregister(struct ublk_io *io, struct io_uring_cmd *cmd, unsigned int issue_flags);
#else
static inline bool ublk_place_by_index(struct ublk_device *ub, u64 addr, struct ublk_place *place)
{
	return true;
}

static inline int ublk_buffer_register(struct ublk_queue *q, unsigned int tag, u64 index, struct io_uring_cmd *cmd,
				       unsigned int issue_flags)
{
	return -EINVAL;
}

static inline int ublk_buffer_unregister(struct ublk_device *ub, u64 index, struct io_uring_cmd *cmd,
					 unsigned int issue_flags)
{
	return -EINVAL;
}

static inline bool ublk_auto_register(struct ublk_queue *q, unsigned int tag, struct io_uring_cmd *cmd,
				      unsigned int issue_flags)
{
	return true;
}

static inline void ublk_auto_unregister(struct ublk_io *io, struct io_uring_cmd *cmd, unsigned int issue_flags)
{
}
#endif

/* zoned.c */
#ifdef UBLK_HAVE_ZONED
typedef int ublk_zone_fn(struct gendisk *disk, struct blk_zone *zone, unsigned int index, struct ublk_zone_args *args);

bool ublk_zoned_ok(const struct ublk_params *params);
int ublk_check_zones(struct ublk_device *ub, struct gendisk *disk);
int ublk_zone_appended(struct ublk_device *ub, struct request *req, u64 sector, int res);
#ifdef UBLK_HAVE_REPORT_ZONES_ARGS
int ublk_report_zones(struct gendisk *disk, sector_t sector, unsigned int zones, struct blk_report_zones_args *core);
#else
int ublk_report_zones(struct gendisk *disk, sector_t sector, unsigned int zones, report_zones_cb fn, void *data);
#endif
#else
#define ublk_report_zones	NULL

static inline bool ublk_zoned_ok(const struct ublk_params *params)
{
	return false;
}

static inline int ublk_check_zones(struct ublk_device *ub, struct gendisk *disk)
{
	return -EOPNOTSUPP;
}

static inline int ublk_zone_appended(struct ublk_device *ub, struct request *req, u64 sector, int res)
{
	return -EIO;
}
#endif

#endif
