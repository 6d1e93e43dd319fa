// SPDX-License-Identifier: GPL-2.0-only
/*
 * Commands for many tags at once (UBLK_F_BATCH_IO).
 *
 * PREP gives us tags of a queue, COMMIT answers and gives them back, FETCH
 * stays and brings tags with requests, a list of them in each buffer that the
 * server provides. No tag belongs to a task. A new request waits in its queue
 * until a FETCH takes it along; one FETCH at a time is at that, in the task
 * that submitted it, which alone has the memory that the list goes to.
 *
 * What a FETCH can't deliver goes back to where it waited. If the server is
 * going, all that waits there is taken from it: it was told of none of it.
 */
#include "driver.h"

#ifdef UBLK_HAVE_URING_MULTISHOT

#include <linux/capability.h>
#include <linux/kfifo.h>
#include <linux/sched/task.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#define UBLK_LIST_TAGS		128	/* at most, in one buffer */
#define UBLK_ANSWER_BYTES	512	/* read at a time */

struct ublk_batch {
	spinlock_t lock;			/* inside io->lock */
	DECLARE_KFIFO_PTR(waiting, u16);	/* tags that are DISPATCHED; some may not be so any more */
	struct list_head idle;			/* FETCH commands */
	struct ublk_fetch *active;		/* the one that brings what waits; not on the list */
};

/* Goes with its command. */
struct ublk_fetch {
	struct list_head node;
	struct io_uring_cmd *cmd;
	struct task_struct *task;
	u16 group;
	bool cancelled;
};

/* A batch command, read once. */
struct ublk_batch_args {
	struct ublk_queue *q;
	const void __user *elems;
	unsigned int n;
	unsigned int size;
	unsigned int flags;
};

/* Any element; what its command doesn't have is 0. */
struct ublk_batch_elem {
	unsigned int tag;
	struct ublk_answer answer;
};

bool ublk_is_batch_op(u32 op)
{
	return op == UBLK_U_IO_PREP_IO_CMDS || op == UBLK_U_IO_COMMIT_IO_CMDS || op == UBLK_U_IO_FETCH_IO_CMDS;
}

int ublk_batch_alloc(struct ublk_queue *q)
{
	struct ublk_batch *batch = kzalloc(sizeof(*batch), GFP_KERNEL);

	if (!batch)
		return -ENOMEM;
	spin_lock_init(&batch->lock);
	INIT_LIST_HEAD(&batch->idle);
	/* it can't be smaller */
	if (kfifo_alloc(&batch->waiting, max(q->depth, 2U), GFP_KERNEL)) {
		kfree(batch);
		return -ENOMEM;
	}
	q->batch = batch;
	return 0;
}

void ublk_batch_free(struct ublk_queue *q)
{
	if (!q->batch)
		return;
	kfifo_free(&q->batch->waiting);
	kfree(q->batch);
}

/* Something waits, and a FETCH: the command to be woken. */
static struct io_uring_cmd *ublk_batch_match(struct ublk_batch *batch)
{
	struct ublk_fetch *fetch = list_first_entry_or_null(&batch->idle, struct ublk_fetch, node);

	lockdep_assert_held(&batch->lock);
	if (batch->active || !fetch || kfifo_is_empty(&batch->waiting))
		return NULL;
	list_del_init(&fetch->node);
	batch->active = fetch;
	return fetch->cmd;
}

/* A tag that is DISPATCHED waits. Under its lock; returns a command to be woken without it, or NULL. */
struct io_uring_cmd *ublk_batch_add(struct ublk_queue *q, unsigned int tag)
{
	struct ublk_batch *batch = q->batch;
	struct io_uring_cmd *cmd;

	lockdep_assert_held(&q->ios[tag].lock);
	spin_lock(&batch->lock);
	WARN_ON_ONCE(!kfifo_put(&batch->waiting, tag));
	cmd = ublk_batch_match(batch);
	spin_unlock(&batch->lock);
	return cmd;
}

bool ublk_batch_has_fetch(struct ublk_queue *q)
{
	struct ublk_batch *batch = q->batch;
	bool has;

	spin_lock(&batch->lock);
	has = batch->active || !list_empty(&batch->idle);
	spin_unlock(&batch->lock);
	return has;
}

/* The server will not be told of the requests that wait: from them, and from it. */
void ublk_batch_take_back(struct ublk_queue *q)
{
	unsigned int tag;

	for (tag = 0; tag < q->depth; tag++) {
		struct ublk_io *io = &q->ios[tag];
		struct request *req = NULL;

		spin_lock(&io->lock);
		if (io->state == UBLK_IO_DISPATCHED) {
			req = io->req;
			io->req = NULL;
			io->state = UBLK_IO_UNARMED;
		}
		spin_unlock(&io->lock);
		if (req)
			ublk_abort(q, req, false);
	}
}

/* The queue has no server any more, and no command. */
void ublk_batch_reset(struct ublk_queue *q)
{
	if (!q->batch)
		return;
	spin_lock(&q->batch->lock);
	WARN_ON_ONCE(q->batch->active || !list_empty(&q->batch->idle));
	kfifo_reset(&q->batch->waiting);
	spin_unlock(&q->batch->lock);
}

/* Of a FETCH that is on no list. The next takes over what it leaves. */
static void ublk_fetch_end(struct ublk_queue *q, struct ublk_fetch *fetch, int res, unsigned int issue_flags)
{
	struct ublk_batch *batch = q->batch;
	struct io_uring_cmd *next = NULL;

	spin_lock(&batch->lock);
	if (batch->active == fetch) {
		batch->active = NULL;
		next = ublk_batch_match(batch);
	}
	spin_unlock(&batch->lock);
	if (next)
		ublk_batch_wake(next);
	ublk_uring_done(fetch->cmd, res, issue_flags);
	put_task_struct(fetch->task);
	kfree(fetch);
}

UBLK_TASK_CALLBACK(ublk_fetch_close)
{
	struct ublk_cmd_data *data = ublk_cmd_data(cmd);

	ublk_fetch_end(data->q, data->fetch, UBLK_IO_RES_ABORT, issue_flags);
}

/* The queue is closing: nothing is brought any more. The active FETCH sees it by itself. */
void ublk_batch_close(struct ublk_queue *q)
{
	struct ublk_batch *batch = q->batch;
	struct ublk_fetch *fetch, *next;
	LIST_HEAD(idle);

	if (!batch || !READ_ONCE(q->closing))
		return;
	ublk_batch_take_back(q);
	spin_lock(&batch->lock);
	/* each stays off any list: whoever cancels it leaves it to its task */
	list_for_each_entry_safe(fetch, next, &batch->idle, node) {
		list_del_init(&fetch->node);
		io_uring_cmd_complete_in_task(fetch->cmd, ublk_fetch_close);
	}
	spin_unlock(&batch->lock);
}

/* io_uring: the ring or the task of a FETCH is going away, and so is the server. */
void ublk_batch_cancel(struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	struct ublk_cmd_data *data = ublk_cmd_data(cmd);
	struct ublk_fetch *fetch = data->fetch;
	struct ublk_batch *batch = data->q->batch;
	bool idle;

	spin_lock(&batch->lock);
	fetch->cancelled = true;
	idle = !list_empty(&fetch->node);
	list_del_init(&fetch->node);
	spin_unlock(&batch->lock);
	/* else it is under way in task work, which ends it */
	if (idle)
		ublk_fetch_end(data->q, fetch, UBLK_IO_RES_ABORT, issue_flags);
}

/* Under batch->lock: may the server be told of more? */
static bool ublk_fetch_is_over(struct ublk_queue *q, struct ublk_fetch *fetch)
{
	return fetch->cancelled || READ_ONCE(q->closing) || READ_ONCE(q->lost);
}

/* Take a waiting request along: from then on its tag is BUSY. False if it isn't there, or can't come. */
static bool ublk_fetch_take(struct ublk_queue *q, unsigned int tag, struct io_uring_cmd *cmd,
			    unsigned int issue_flags)
{
	struct ublk_io *io = &q->ios[tag];
	bool there;

	spin_lock(&io->lock);
	there = io->state == UBLK_IO_DISPATCHED;
	if (there)
		io->state = UBLK_IO_BUSY;
	spin_unlock(&io->lock);
	if (!there)
		return false;
	if (likely(ublk_provide(q, tag, cmd, issue_flags)))
		return true;
	ublk_refuse(q, tag);
	return false;
}

/* The server is about to be told: it may answer. */
static void ublk_fetch_serve(struct ublk_queue *q, unsigned int tag, struct task_struct *task)
{
	struct ublk_io *io = &q->ios[tag];
	struct task_struct *before = NULL;

	spin_lock(&io->lock);
	io->state = UBLK_IO_SERVED;
	if (io->task != task) {
		before = io->task;
		io->task = get_task_struct(task);
	}
	spin_unlock(&io->lock);
	if (before)
		put_task_struct(before);
}

/* It could not be told: the request waits again, as if nothing had been. */
static void ublk_fetch_untake(struct ublk_queue *q, unsigned int tag, struct io_uring_cmd *cmd,
			      unsigned int issue_flags)
{
	struct ublk_io *io = &q->ios[tag];
	struct ublk_device *ub = q->ub;

	spin_lock(&io->lock);
	if (io->state == UBLK_IO_SERVED)
		io->state = UBLK_IO_BUSY;
	if (io->state != UBLK_IO_BUSY) {
		/* answered, by a guess, or taken from the server */
		spin_unlock(&io->lock);
		return;
	}
	spin_unlock(&io->lock);
	if (io->ring)
		ublk_auto_unregister(io, cmd, issue_flags);
	if (ublk_has(ub, UBLK_F_SHMEM_ZC))
		ublk_shmem_put(ub, io->req);
	q->descs[tag].op_flags &= ~(UBLK_IO_F_NEED_REG_BUF | UBLK_IO_F_SHMEM_ZC);
	if (req_op(io->req) == REQ_OP_WRITE)
		q->descs[tag].nr_sectors = blk_rq_sectors(io->req);
	spin_lock(&io->lock);
	io->state = UBLK_IO_DISPATCHED;
	/* the active FETCH is this one: there is none to be woken */
	ublk_batch_add(q, tag);
	spin_unlock(&io->lock);
}

/* A list of tags, in a buffer and a CQE of its own: how many of them, or an error that ends the FETCH. */
static int ublk_fetch_post(struct ublk_queue *q, struct ublk_fetch *fetch, const u16 *tags, unsigned int n,
			   unsigned int issue_flags)
{
	size_t bytes = n * sizeof(*tags);
	struct io_br_sel buffer = io_uring_cmd_buffer_select(fetch->cmd, fetch->group, &bytes, issue_flags);
	unsigned int i;

	if (buffer.val <= 0)
		return buffer.val ? buffer.val : -ENOBUFS;
	n = bytes / sizeof(*tags);
	if (!n)
		buffer.val = -ENOBUFS;
	else if (copy_to_user(buffer.addr, tags, n * sizeof(*tags)))
		buffer.val = -EFAULT;
	else
		buffer.val = n * sizeof(*tags);
	for (i = 0; i < n && buffer.val > 0; i++)
		ublk_fetch_serve(q, tags[i], fetch->task);
	if (likely(!io_uring_mshot_cmd_post_cqe(fetch->cmd, &buffer, issue_flags)))
		return n;
	/* no room for a CQE: the last one, which comes later, can't name a buffer */
	return buffer.val < 0 ? buffer.val : -ENOBUFS;
}

/* Bring some of what waits: 1 if there may be more, 0 if there is none and the FETCH is idle, or its end. */
static int ublk_fetch_bring(struct ublk_queue *q, struct ublk_fetch *fetch, unsigned int issue_flags)
{
	struct ublk_batch *batch = q->batch;
	unsigned int waiting, i, n = 0;
	u16 tags[UBLK_LIST_TAGS];
	int posted;

	spin_lock(&batch->lock);
	if (ublk_fetch_is_over(q, fetch)) {
		spin_unlock(&batch->lock);
		return UBLK_IO_RES_ABORT;
	}
	waiting = kfifo_out(&batch->waiting, tags, ARRAY_SIZE(tags));
	if (!waiting) {
		batch->active = NULL;
		list_add(&fetch->node, &batch->idle);
	}
	spin_unlock(&batch->lock);
	for (i = 0; i < waiting; i++)
		if (ublk_fetch_take(q, tags[i], fetch->cmd, issue_flags))
			tags[n++] = tags[i];
	if (!n)
		return !!waiting;
	posted = ublk_fetch_post(q, fetch, tags, n, issue_flags);
	if (likely(posted == n))
		return 1;
	for (i = max(posted, 0); i < n; i++)
		ublk_fetch_untake(q, tags[i], fetch->cmd, issue_flags);
	/* those who took back what waited may have done so before it did again */
	if (READ_ONCE(q->lost) || READ_ONCE(q->closing))
		ublk_batch_take_back(q);
	return posted < 0 ? posted : 1;
}

UBLK_TASK_CALLBACK(ublk_fetch_run)
{
	struct ublk_cmd_data *data = ublk_cmd_data(cmd);
	struct ublk_fetch *fetch = data->fetch;
	struct ublk_queue *q = data->q;
	int res;

	if (unlikely(fetch->task != current || ublk_task_is_gone())) {
		/* not the memory that the server gave us the address of */
		ublk_server_lost(q->ub, cmd->file->private_data);
		res = UBLK_IO_RES_ABORT;
	} else {
		do
			res = ublk_fetch_bring(q, fetch, issue_flags);
		while (res > 0);
	}
	if (res)
		ublk_fetch_end(q, fetch, res, issue_flags);
}

void ublk_batch_wake(struct io_uring_cmd *cmd)
{
	io_uring_cmd_complete_in_task(cmd, ublk_fetch_run);
}

/* Under batch->lock: is the server behind the file that of the queue, or, as the only one, to be that? */
static bool ublk_fetch_is_ours(struct ublk_queue *q, struct ublk_file *file)
{
	struct ublk_file *owner = READ_ONCE(q->owner);

	return owner ? owner == file : !ublk_has(q->ub, UBLK_F_SHARDS) && !READ_ONCE(q->ub->stopped);
}

static int ublk_batch_fetch(const struct ublk_batch_args *args, struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	struct ublk_queue *q = args->q;
	struct ublk_batch *batch = q->batch;
	struct ublk_cmd_data *data = ublk_cmd_data(cmd);
	struct io_uring_cmd *wake = NULL;
	struct ublk_fetch *fetch;
	bool over;

	if (!(cmd->flags & IORING_URING_CMD_MULTISHOT) || args->size != sizeof(u16) || args->flags)
		return -EINVAL;
	fetch = kzalloc(sizeof(*fetch), GFP_KERNEL);
	if (!fetch)
		return -ENOMEM;
	fetch->cmd = cmd;
	fetch->group = READ_ONCE(cmd->sqe->buf_group);
	fetch->task = get_task_struct(current);
	data->q = q;
	data->fetch = fetch;

	spin_lock(&batch->lock);
	over = !ublk_fetch_is_ours(q, cmd->file->private_data) || ublk_fetch_is_over(q, fetch);
	if (!over) {
		list_add_tail(&fetch->node, &batch->idle);
		wake = ublk_batch_match(batch);
	}
	spin_unlock(&batch->lock);
	if (over) {
		put_task_struct(fetch->task);
		kfree(fetch);
		return UBLK_IO_RES_ABORT;
	}
	ublk_uring_mark_cancelable(cmd, issue_flags);
	if (wake)
		ublk_batch_wake(wake);
	return -EIOCBQUEUED;
}

/* After an element's head come a buffer's address, a zone's sector, or both, as the command says. */
static unsigned int ublk_elem_size(unsigned int flags)
{
	return sizeof(struct ublk_elem_header) + (flags & UBLK_BATCH_F_HAS_BUF_ADDR ? sizeof(u64) : 0) +
	       (flags & UBLK_BATCH_F_HAS_ZONE_LBA ? sizeof(u64) : 0);
}

static int ublk_batch_check(struct ublk_device *ub, const struct ublk_batch_args *args)
{
	const unsigned int known = UBLK_BATCH_F_HAS_ZONE_LBA | UBLK_BATCH_F_HAS_BUF_ADDR |
				   UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK;

	if (args->flags & ~known)
		return -EINVAL;
	if ((args->flags & UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK) && !ublk_has(ub, UBLK_F_AUTO_BUF_REG))
		return -EINVAL;
	if ((args->flags & UBLK_BATCH_F_HAS_BUF_ADDR) && ublk_server_moves_data(ub))
		return -EINVAL;
	if ((args->flags & UBLK_BATCH_F_HAS_ZONE_LBA) && !ublk_has(ub, UBLK_F_ZONED))
		return -EINVAL;
	if (args->size != ublk_elem_size(args->flags))
		return -EINVAL;
	if (args->n > args->q->depth)
		return -E2BIG;
	return 0;
}

static struct ublk_batch_elem ublk_batch_parse(const struct ublk_batch_args *args, const void *from)
{
	const struct ublk_elem_header *head = from;
	const u64 *more = (const u64 *)(head + 1);
	struct ublk_batch_elem elem = {
		.tag = head->tag,
		.answer = {
			.res = head->result,
			.next = {
				.index = head->buf_index,
				.fallback = args->flags & UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK,
			},
		},
	};

	if (args->flags & UBLK_BATCH_F_HAS_BUF_ADDR)
		elem.answer.next.addr = *more++;
	if (args->flags & UBLK_BATCH_F_HAS_ZONE_LBA)
		elem.answer.sector = *more;
	return elem;
}

/* Under ub->lock. */
static int ublk_batch_prep_one(struct ublk_queue *q, const struct ublk_batch_elem *elem)
{
	struct ublk_io *io;
	int err = -EINVAL;

	if (elem->tag >= q->depth)
		return -EINVAL;
	if (!elem->answer.next.addr && !ublk_server_moves_data(q->ub))
		return -EINVAL;
	io = &q->ios[elem->tag];
	spin_lock(&io->lock);
	if (io->state == UBLK_IO_UNARMED && !io->task) {
		io->task = get_task_struct(current);
		ublk_arm(q, elem->tag, &elem->answer.next);
		err = 0;
	}
	spin_unlock(&io->lock);
	return err;
}

/* Under ub->lock: as the queue isn't up before all its tags are fetched, nobody has seen it. */
static void ublk_batch_unprep_one(struct ublk_queue *q, unsigned int tag)
{
	struct ublk_io *io = &q->ios[tag];

	spin_lock(&io->lock);
	put_task_struct(io->task);
	io->task = NULL;
	io->state = UBLK_IO_UNARMED;
	spin_unlock(&io->lock);
}

/* All of them, or none. */
static int ublk_batch_prep(const struct ublk_batch_args *args, struct ublk_file *file)
{
	bool plain = !capable(CAP_SYS_ADMIN);
	struct ublk_queue *q = args->q;
	struct ublk_device *ub = q->ub;
	unsigned int i = 0;
	void *elems;
	int err = 0;

	elems = vmemdup_user(args->elems, args->n * args->size);
	if (IS_ERR(elems))
		return PTR_ERR(elems);
	spin_lock(&ub->lock);
	if (!ublk_may_fetch(q, file))
		err = -EBUSY;
	for (i = 0; i < args->n && !err; i++) {
		struct ublk_batch_elem elem = ublk_batch_parse(args, elems + i * args->size);

		err = ublk_batch_prep_one(q, &elem);
		if (err)
			break;
	}
	if (!err && args->n)
		ublk_queue_fetched(q, file, args->n, plain);
	while (err && i--)
		ublk_batch_unprep_one(q, ublk_batch_parse(args, elems + i * args->size).tag);
	spin_unlock(&ub->lock);
	kvfree(elems);
	return err;
}

static int ublk_batch_commit_one(struct ublk_queue *q, const struct ublk_batch_elem *elem, struct io_uring_cmd *cmd,
				 unsigned int issue_flags)
{
	struct ublk_io *io;
	int err = 0;

	if (elem->tag >= q->depth)
		return -EINVAL;
	io = &q->ios[elem->tag];
	spin_lock(&io->lock);
	if (io->state != UBLK_IO_SERVED)
		err = -EBUSY;
	else if (!elem->answer.next.addr && !ublk_server_moves_data(q->ub))
		err = -EINVAL;
	else
		io->state = UBLK_IO_BUSY;
	spin_unlock(&io->lock);
	if (!err)
		ublk_answer(q, elem->tag, cmd, &elem->answer, issue_flags);
	return err;
}

/* How many bytes of answers were taken, or what is wrong with the first. */
static int ublk_batch_commit(const struct ublk_batch_args *args, struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	u8 elems[UBLK_ANSWER_BYTES] __aligned(sizeof(u64));
	unsigned int done = 0, i, n;
	int err = 0;

	/* another one's answers could come when its queue has changed hands */
	if (READ_ONCE(args->q->owner) != cmd->file->private_data)
		return -EBUSY;
	while (!err && done < args->n) {
		n = min_t(unsigned int, args->n - done, sizeof(elems) / args->size);
		if (copy_from_user(elems, args->elems + done * args->size, n * args->size)) {
			err = -EFAULT;
			break;
		}
		for (i = 0; i < n; i++) {
			struct ublk_batch_elem elem = ublk_batch_parse(args, elems + i * args->size);

			err = ublk_batch_commit_one(args->q, &elem, cmd, issue_flags);
			if (err)
				break;
			done++;
		}
		cond_resched();
	}
	return done ? done * args->size : err;
}

int ublk_batch_command(struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	const struct ublk_batch_io *payload = ublk_uring_payload(cmd);
	struct ublk_file *file = cmd->file->private_data;
	struct ublk_device *ub = file->ub;
	unsigned int qid = READ_ONCE(payload->q_id);
	struct ublk_batch_args args = {
		.elems = u64_to_user_ptr(ublk_uring_addr(cmd)),
		.n = READ_ONCE(payload->nr_elem),
		.size = READ_ONCE(payload->elem_bytes),
		.flags = READ_ONCE(payload->flags),
	};
	int err;

	if (qid >= ub->info.nr_hw_queues)
		return -EINVAL;
	args.q = ub->queues[qid];
	if (cmd->cmd_op == UBLK_U_IO_FETCH_IO_CMDS)
		return ublk_batch_fetch(&args, cmd, issue_flags);
	err = ublk_batch_check(ub, &args);
	if (err)
		return err;
	if (cmd->cmd_op == UBLK_U_IO_PREP_IO_CMDS)
		return ublk_batch_prep(&args, file);
	return ublk_batch_commit(&args, cmd, issue_flags);
}

#endif /* UBLK_HAVE_URING_MULTISHOT */
