// SPDX-License-Identifier: GPL-2.0-only
/*
 * Servers die, and are replaced.
 *
 * A death has two moments. When io_uring, or the exit of a task, tells of it,
 * the queues of that server stop taking requests, and its armed commands end.
 * With that the file can be released, and then what the server still had is
 * given back. See driver.h for why not earlier.
 */
#include <linux/pid.h>
#include <linux/sched/signal.h>
#include <linux/uaccess.h>

#include "driver.h"

#define UBLK_QUIESCE_POLL	msecs_to_jiffies(5)

/* The server behind a file is about to go. What it has not been told of it never will be. */
void ublk_server_lost(struct ublk_device *ub, struct ublk_file *file)
{
	unsigned int i;

	spin_lock(&ub->lock);
	for (i = 0; i < ub->info.nr_hw_queues; i++) {
		struct ublk_queue *q = ub->queues[i];

		if (q->owner != file)
			continue;
		WRITE_ONCE(q->lost, true);
		WRITE_ONCE(q->up, false);
	}
	spin_unlock(&ub->lock);
	if (!ublk_has(ub, UBLK_F_BATCH_IO))
		return;
	for (i = 0; i < ub->info.nr_hw_queues; i++)
		if (READ_ONCE(ub->queues[i]->owner) == file)
			ublk_batch_take_back(ub->queues[i]);
}

/* Does a tag's request wait for a command that would tell of it, and nobody gave? Under io->lock. */
static bool ublk_is_untold(struct ublk_queue *q, struct ublk_io *io)
{
	return q->batch && io->state == UBLK_IO_DISPATCHED && !ublk_batch_has_fetch(q);
}

/* Take a request from a server that can't answer it any more. Under io->lock. */
static struct request *ublk_take_back(struct ublk_queue *q, struct ublk_io *io)
{
	struct request *req = NULL;

	lockdep_assert_held(&io->lock);
	if (io->state == UBLK_IO_SERVED || io->state == UBLK_IO_WANTS_DATA || ublk_is_untold(q, io)) {
		req = io->req;
		io->req = NULL;
		io->ring = NULL;
		io->state = UBLK_IO_UNARMED;
	}
	return req;
}

static void ublk_queue_orphan(struct ublk_queue *q)
{
	struct ublk_device *ub = q->ub;
	unsigned int tag;

	for (tag = 0; tag < q->depth; tag++) {
		struct ublk_io *io = &q->ios[tag];
		struct task_struct *task;
		struct request *req;

		spin_lock(&io->lock);
		req = ublk_take_back(q, io);
		if (q->batch && io->state == UBLK_IO_ARMED)
			io->state = UBLK_IO_UNARMED;
		/* a command pins the file that was just released */
		WARN_ON_ONCE(io->state != UBLK_IO_UNARMED);
		task = io->task;
		io->task = NULL;
		spin_unlock(&io->lock);
		if (task)
			put_task_struct(task);
		if (req)
			ublk_finish(q, req, UBLK_END_ABORT, 0);
	}
	ublk_batch_reset(q);
	spin_lock(&ub->lock);
	if (q->fetched == q->depth)
		ub->ready--;
	q->fetched = 0;
	q->owner = NULL;
	WRITE_ONCE(q->lost, false);
	if (!ub->stopped)
		WRITE_ONCE(q->closing, false);
	spin_unlock(&ub->lock);
}

/* Under ub->lock: nobody serves any more. */
static bool ublk_is_deserted(struct ublk_device *ub)
{
	unsigned int i;

	lockdep_assert_held(&ub->lock);
	for (i = 0; i < ub->info.nr_hw_queues; i++)
		if (ub->queues[i]->owner)
			return false;
	return true;
}

/* The file is released. */
void ublk_server_gone(struct ublk_file *file)
{
	struct ublk_device *ub = file->ub;
	bool served = false;
	unsigned int i;

	ublk_server_lost(ub, file);
	for (i = 0; i < ub->info.nr_hw_queues; i++) {
		struct ublk_queue *q = ub->queues[i];

		/* stable: this file was its owner, and is so until here */
		if (READ_ONCE(q->owner) == file) {
			served = true;
			ublk_queue_orphan(q);
		}
	}

	spin_lock(&ub->lock);
	if (served && ublk_is_deserted(ub)) {
		ub->recovering = false;
		if (ub->disk && ub->info.state == UBLK_S_DEV_LIVE) {
			if (ublk_has(ub, UBLK_F_USER_RECOVERY_FAIL_IO))
				ub->info.state = UBLK_S_DEV_FAIL_IO;
			else if (ublk_may_recover(ub))
				ub->info.state = UBLK_S_DEV_QUIESCED;
			else
				ublk_begin_stop(ub);
		}
	}
	if (!--ub->files)
		ub->mm = NULL;
	spin_unlock(&ub->lock);
}

/*
 * Will the task never answer again? The poll thread of a ring begins to exit
 * only when the ring is gone, which an armed command of its own prevents; that
 * its process is ending is what can be seen of it. In a batch any thread of the
 * process may answer.
 */
static bool ublk_task_is_ending(struct ublk_queue *q, struct task_struct *task)
{
	if (READ_ONCE(task->signal->flags) & SIGNAL_GROUP_EXIT)
		return true;
	return q->batch ? !atomic_read(&task->signal->live) : READ_ONCE(task->flags) & PF_EXITING;
}

/*
 * Commands of tasks that are on their way out, where io_uring doesn't tell, and
 * while the device is being stopped, or its zones are reported, also their
 * requests: a task may be kept from its end by the command that waits for them.
 */
void ublk_reap_exiting(struct ublk_device *ub)
{
	bool abort = READ_ONCE(ub->force_abort) || READ_ONCE(ub->checking_zones);
	unsigned int i, tag;

	if (UBLK_URING_CANCELS && !abort)
		return;
	for (i = 0; i < ub->info.nr_hw_queues; i++) {
		struct ublk_queue *q = ub->queues[i];

		for (tag = 0; tag < q->depth; tag++) {
			struct ublk_io *io = &q->ios[tag];
			struct io_uring_cmd *cmd = NULL;
			struct request *req = NULL;

			if (!READ_ONCE(io->task))
				continue;
			spin_lock(&io->lock);
			if (io->task && ublk_task_is_ending(q, io->task)) {
				if (abort)
					req = ublk_take_back(q, io);
				if (io->state == UBLK_IO_ARMED && !UBLK_URING_CANCELS) {
					cmd = io->cmd;
					io->cmd = NULL;
					/* not UNARMED yet: first the queue has to be down */
					io->state = UBLK_IO_BUSY;
				}
			}
			spin_unlock(&io->lock);
			if (cmd) {
				ublk_server_lost(ub, cmd->file->private_data);
				spin_lock(&io->lock);
				io->state = UBLK_IO_UNARMED;
				spin_unlock(&io->lock);
				ublk_give_back(cmd);
			}
			if (req)
				ublk_finish(q, req, UBLK_END_ABORT, 0);
		}
	}
}

void ublk_watch(struct work_struct *work)
{
	struct ublk_device *ub = container_of(to_delayed_work(work), struct ublk_device, watch_work);
	bool again;

	ublk_reap_exiting(ub);
	spin_lock(&ub->lock);
	again = ub->files && (!UBLK_URING_CANCELS || ((ub->force_abort || ub->checking_zones) && ub->disk));
	spin_unlock(&ub->lock);
	if (again)
		queue_delayed_work(ublk_wq, &ub->watch_work, UBLK_WATCH_PERIOD);
}

/* From now on tags come back instead of being armed, beginning with those that are. */
void ublk_give_back_armed(struct ublk_device *ub)
{
	unsigned int i, tag;

	spin_lock(&ub->lock);
	for (i = 0; i < ub->info.nr_hw_queues; i++)
		if (ub->queues[i]->owner)
			WRITE_ONCE(ub->queues[i]->closing, true);
	spin_unlock(&ub->lock);
	for (i = 0; i < ub->info.nr_hw_queues; i++) {
		struct ublk_queue *q = ub->queues[i];

		for (tag = 0; tag < q->depth; tag++) {
			struct ublk_io *io = &q->ios[tag];
			struct io_uring_cmd *cmd = NULL;

			spin_lock(&io->lock);
			if (q->closing && io->state == UBLK_IO_ARMED) {
				cmd = io->cmd;
				io->cmd = NULL;
				io->state = UBLK_IO_UNARMED;
			}
			spin_unlock(&io->lock);
			if (cmd)
				ublk_give_back(cmd);
		}
		ublk_batch_close(q);
	}
}

int ublk_start_recovery(struct ublk_device *ub)
{
	int err = 0;

	if (mutex_lock_interruptible(&ub->mutex))
		return -EINTR;
	spin_lock(&ub->lock);
	if (!ublk_may_recover(ub) || !ub->served)
		err = -EINVAL;
	else if (ub->files && !ublk_has(ub, UBLK_F_SHARDS))
		err = -EBUSY;
	else if (ub->info.state != UBLK_S_DEV_QUIESCED && ub->info.state != UBLK_S_DEV_FAIL_IO)
		err = -EBUSY;
	else
		ub->recovering = true;
	spin_unlock(&ub->lock);
	mutex_unlock(&ub->mutex);
	return err;
}

static int ublk_end_recovery_locked(struct ublk_device *ub, int pid)
{
	unsigned int i;

	lockdep_assert_held(&ub->lock);
	if (!ublk_may_recover(ub))
		return -EINVAL;
	if (ub->stopped || READ_ONCE(ub->deleted))
		return -ENODEV;
	/* its shards may have brought the device to life by themselves */
	if (!ub->disk || (ub->info.state == UBLK_S_DEV_LIVE && !ub->recovering))
		return -EBUSY;
	if (!ublk_all_ready(ub))
		return -EAGAIN;
	for (i = 0; i < ub->info.nr_hw_queues; i++)
		WRITE_ONCE(ub->queues[i]->up, true);
	ub->info.state = UBLK_S_DEV_LIVE;
	ub->info.ublksrv_pid = pid;
	ub->recovering = false;
	ublk_kick(ub->disk);
	return 0;
}

int ublk_end_recovery(struct ublk_device *ub, int pid)
{
	int err;

	do {
		err = ublk_wait_ready(ub);
		if (err)
			return err;
		if (mutex_lock_interruptible(&ub->mutex))
			return -EINTR;
		spin_lock(&ub->lock);
		err = ublk_end_recovery_locked(ub, pid);
		spin_unlock(&ub->lock);
		mutex_unlock(&ub->mutex);
	} while (err == -EAGAIN); /* this server died, too */
	return err;
}

static bool ublk_has_armed(struct ublk_queue *q)
{
	unsigned int tag;

	for (tag = 0; tag < q->depth; tag++)
		if (READ_ONCE(q->ios[tag].state) == UBLK_IO_ARMED)
			return true;
	return false;
}

static bool ublk_each_has_armed(struct ublk_device *ub)
{
	unsigned int i;

	for (i = 0; i < ub->info.nr_hw_queues; i++) {
		struct ublk_queue *q = ub->queues[i];

		/* one without a server has nobody to be told; one of a batch is told by the end of its FETCH */
		if (READ_ONCE(q->owner) && !READ_ONCE(q->lost) && !q->batch && !ublk_has_armed(q))
			return false;
	}
	return true;
}

/* Hold requests back until the server has a tag of each queue idle, through which it can be told. */
static int ublk_quiesce_wait(struct ublk_device *ub, u64 timeout_ms)
{
	u64 left = timeout_ms ? msecs_to_jiffies(min_t(u64, timeout_ms, INT_MAX)) : U64_MAX;

	while (!ublk_each_has_armed(ub)) {
		u64 pause = min_t(u64, left, max(UBLK_QUIESCE_POLL, 1UL));

		if (!left)
			return -EBUSY;
		/* nobody left to wait for, or nothing */
		if (READ_ONCE(ub->info.state) != UBLK_S_DEV_LIVE)
			return 0;
		schedule_timeout_interruptible(pause);
		if (signal_pending(current))
			return -EINTR;
		left -= pause;
	}
	return 0;
}

static int ublk_quiesce_locked(struct ublk_device *ub, u64 timeout_ms)
{
	unsigned int i;
	int err;

	if (!ub->disk)
		return -ENODEV;
	if (READ_ONCE(ub->info.state) != UBLK_S_DEV_LIVE)
		return 0;
	spin_lock(&ub->lock);
	for (i = 0; i < ub->info.nr_hw_queues; i++)
		WRITE_ONCE(ub->queues[i]->up, false);
	spin_unlock(&ub->lock);
	err = ublk_quiesce_wait(ub, timeout_ms);
	if (!err) {
		ublk_give_back_armed(ub);
		return 0;
	}
	/* as if it had not been asked for */
	spin_lock(&ub->lock);
	for (i = 0; i < ub->info.nr_hw_queues; i++) {
		struct ublk_queue *q = ub->queues[i];

		if (q->fetched == q->depth && !q->lost && !q->closing)
			WRITE_ONCE(q->up, true);
	}
	ublk_kick(ub->disk);
	spin_unlock(&ub->lock);
	return err;
}

int ublk_quiesce(struct ublk_device *ub, u64 timeout_ms)
{
	int err;

	if (!ublk_has(ub, UBLK_F_QUIESCE))
		return -EOPNOTSUPP;
	if (mutex_lock_interruptible(&ub->mutex))
		return -EINTR;
	err = ublk_quiesce_locked(ub, timeout_ms);
	mutex_unlock(&ub->mutex);
	return err;
}

static void ublk_queue_state(struct ublk_queue *q, struct ublk_queue_state *state)
{
	struct ublk_device *ub = q->ub;
	struct ublk_io *io = &q->ios[0];
	unsigned int tag;

	memset(state, 0, sizeof(*state));
	state->pid = -1;
	spin_lock(&ub->lock);
	if (!q->owner)
		state->state = UBLK_QUEUE_ORPHANED;
	else if (q->lost || q->closing)
		state->state = UBLK_QUEUE_LEAVING;
	else if (q->up)
		state->state = UBLK_QUEUE_SERVED;
	else
		state->state = UBLK_QUEUE_FETCHING;
	state->fetched = q->fetched;
	state->generation = q->generation;
	spin_unlock(&ub->lock);
	for (tag = 0; tag < q->depth; tag++) {
		enum ublk_io_state at = READ_ONCE(q->ios[tag].state);

		if (at != UBLK_IO_UNARMED && at != UBLK_IO_ARMED)
			state->inflight++;
	}
	spin_lock(&io->lock);
	if (io->task) {
		/* the number it has for the caller */
		rcu_read_lock();
		state->pid = pid_alive(io->task) ? task_tgid_vnr(io->task) : -1;
		rcu_read_unlock();
	}
	spin_unlock(&io->lock);
}

/* As many queues as there is room for: their number. */
int ublk_get_queue_states(struct ublk_device *ub, u64 addr, unsigned int len)
{
	struct ublk_queue_state __user *to = u64_to_user_ptr(addr);
	unsigned int n = len / sizeof(*to);
	unsigned int i;

	if (!n || !addr)
		return -EINVAL;
	n = min_t(unsigned int, n, ub->info.nr_hw_queues);
	for (i = 0; i < n; i++) {
		struct ublk_queue_state state;

		ublk_queue_state(ub->queues[i], &state);
		if (copy_to_user(&to[i], &state, sizeof(state)))
			return -EFAULT;
	}
	return n;
}
