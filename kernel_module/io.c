// SPDX-License-Identifier: GPL-2.0-only
/*
 * I/O commands: a tag is offered, a request goes out on it, the answer comes.
 *
 * Everything about a command happens in the task that submitted it, save its
 * end when that task is no more: what comes from elsewhere (a new request, a
 * stop) is sent there as task work. So commands of one ring never race with
 * each other, user memory is at hand, and io_uring is always given the flags
 * that it handed out.
 */
#include "driver.h"

/* Where the kernel runs what is left of a dead task's work, or the task itself on its way out. */
bool ublk_task_is_gone(void)
{
	return current->flags & (PF_KTHREAD | PF_EXITING);
}

/* The server's task was gone before the request reached it. */
static noinline void ublk_undeliverable(struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	struct ublk_cmd_data *data = ublk_cmd_data(cmd);
	struct ublk_queue *q = data->q;
	struct ublk_io *io = &q->ios[data->tag];
	struct request *req;

	ublk_server_lost(q->ub, cmd->file->private_data);
	spin_lock(&io->lock);
	req = io->req;
	io->req = NULL;
	io->cmd = NULL;
	io->state = UBLK_IO_UNARMED;
	spin_unlock(&io->lock);
	ublk_abort(q, req, false);
	ublk_uring_done(cmd, UBLK_IO_RES_ABORT, issue_flags);
}

/* The server can't be given a request: it fails, the BUSY tag waits for the next, unless it is given back. */
bool ublk_refuse(struct ublk_queue *q, unsigned int tag)
{
	struct ublk_io *io = &q->ios[tag];
	struct request *req;
	bool closing;

	spin_lock(&io->lock);
	req = io->req;
	io->req = NULL;
	closing = READ_ONCE(q->closing);
	io->state = closing ? UBLK_IO_UNARMED : UBLK_IO_ARMED;
	if (closing)
		io->cmd = NULL;
	spin_unlock(&io->lock);
	blk_mq_end_request(req, BLK_STS_IOERR);
	return !closing;
}

/* Copy a write's data to the server. False if nothing could be. */
static bool ublk_bring_data(struct ublk_queue *q, unsigned int tag, struct request *req, u64 addr)
{
	unsigned int bytes = blk_rq_bytes(req);
	size_t done = ublk_copy_to_server(req, addr);

	if (likely(done == bytes))
		return true;
	/* only so much is there: the answer will be as short, and the rest comes again */
	done = round_down(done, queue_logical_block_size(req->q));
	q->descs[tag].nr_sectors = done >> SECTOR_SHIFT;
	return done;
}

/*
 * Have the data of a request, or the room for it, where the server expects it.
 * False if that can't be. In the task of the command, which goes to the server
 * with the request; nobody else touches the tag.
 */
bool ublk_provide(struct ublk_queue *q, unsigned int tag, struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	struct ublk_io *io = &q->ios[tag];
	struct ublk_device *ub = q->ub;

	q->descs[tag].addr = io->place.addr;
	if (unlikely(ublk_has(ub, UBLK_F_SHMEM_ZC)) && ublk_shmem_match(ub, io->req, &q->descs[tag].addr)) {
		q->descs[tag].op_flags |= UBLK_IO_F_SHMEM_ZC;
		return true;
	}
	if (ublk_has(ub, UBLK_F_AUTO_BUF_REG))
		return ublk_auto_register(q, tag, cmd, issue_flags);
	if (ublk_server_moves_data(ub) || req_op(io->req) != REQ_OP_WRITE || ublk_has(ub, UBLK_F_NEED_GET_DATA))
		return true;
	return ublk_bring_data(q, tag, io->req, io->place.addr);
}

UBLK_TASK_CALLBACK(ublk_deliver)
{
	struct ublk_cmd_data *data = ublk_cmd_data(cmd);
	struct ublk_queue *q = data->q;
	struct ublk_io *io = &q->ios[data->tag];
	struct request *req = io->req;	/* DISPATCHED: nobody else touches it */
	enum ublk_io_state state = UBLK_IO_SERVED;
	int res = UBLK_IO_RES_OK;

	if (unlikely(io->task != current || ublk_task_is_gone())) {
		ublk_undeliverable(cmd, issue_flags);
		return;
	}
	if (unlikely(!ublk_provide(q, data->tag, cmd, issue_flags))) {
		if (!ublk_refuse(q, data->tag))
			ublk_uring_done(cmd, UBLK_IO_RES_ABORT, issue_flags);
		return;
	}
	if (ublk_has(q->ub, UBLK_F_NEED_GET_DATA) && req_op(req) == REQ_OP_WRITE &&
	    !ublk_req_is_shared(q->ub, req)) {
		state = UBLK_IO_WANTS_DATA;
		res = UBLK_IO_RES_NEED_GET_DATA;
	}
	spin_lock(&io->lock);
	io->cmd = NULL;
	io->state = state;
	spin_unlock(&io->lock);
	ublk_uring_done(cmd, res, issue_flags);
}

void ublk_dispatch(struct io_uring_cmd *cmd)
{
	io_uring_cmd_complete_in_task(cmd, ublk_deliver);
}

UBLK_TASK_CALLBACK(ublk_give_back_in_task)
{
	ublk_uring_done(cmd, UBLK_IO_RES_ABORT, issue_flags);
}

/* End a command that was taken from its tag. */
void ublk_give_back(struct io_uring_cmd *cmd)
{
	io_uring_cmd_complete_in_task(cmd, ublk_give_back_in_task);
}

/* io_uring: the ring or the task of this command is going away. The ring is locked. */
static noinline void ublk_cancel(struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	struct ublk_cmd_data *data = ublk_cmd_data(cmd);
	struct ublk_io *io;
	bool ours;

	ublk_server_lost(data->q->ub, cmd->file->private_data);
	if (data->q->batch) {
		ublk_batch_cancel(cmd, issue_flags);
		return;
	}
	io = &data->q->ios[data->tag];
	spin_lock(&io->lock);
	ours = io->state == UBLK_IO_ARMED && io->cmd == cmd;
	if (ours) {
		io->state = UBLK_IO_UNARMED;
		io->cmd = NULL;
	}
	spin_unlock(&io->lock);
	/* else it is under way in task work, which ends it */
	if (ours)
		ublk_uring_done(cmd, UBLK_IO_RES_ABORT, issue_flags);
}

void ublk_arm(struct ublk_queue *q, unsigned int tag, const struct ublk_place *place)
{
	struct ublk_io *io = &q->ios[tag];

	lockdep_assert_held(&io->lock);
	io->place = *place;
	io->state = UBLK_IO_ARMED;
}

static void ublk_arm_command(struct ublk_queue *q, unsigned int tag, const struct ublk_place *place,
			     struct io_uring_cmd *cmd)
{
	struct ublk_cmd_data *data = ublk_cmd_data(cmd);

	data->q = q;
	data->tag = tag;
	q->ios[tag].cmd = cmd;
	ublk_arm(q, tag, place);
}

/* Under ub->lock: are tags of the queue to be had, for the server behind this file? */
bool ublk_may_fetch(struct ublk_queue *q, struct ublk_file *file)
{
	struct ublk_device *ub = q->ub;

	lockdep_assert_held(&ub->lock);
	if (ub->stopped || q->lost || q->closing || q->fetched == q->depth)
		return false;
	if (q->owner && q->owner != file)
		return false;
	return !ub->started || ub->recovering || ublk_has(ub, UBLK_F_SHARDS);
}

/* Under ub->lock: so many more tags of the queue were fetched. */
void ublk_queue_fetched(struct ublk_queue *q, struct ublk_file *file, unsigned int tags, bool plain)
{
	struct ublk_device *ub = q->ub;

	lockdep_assert_held(&ub->lock);
	q->owner = file;
	ub->plain_daemon |= plain;
	q->fetched += tags;
	if (q->fetched < q->depth)
		return;
	ub->served = true;
	ub->ready++;
	q->generation++;
	/* a shard goes on at once, the rest when START_DEV or END_USER_RECOVERY says so */
	if (ublk_has(ub, UBLK_F_SHARDS) && ub->disk && !ub->force_abort) {
		WRITE_ONCE(q->up, true);
		ub->info.state = UBLK_S_DEV_LIVE;
		ublk_kick(ub->disk);
	}
	wake_up_all(&ub->wait);
	if (!UBLK_URING_CANCELS)
		queue_delayed_work(ublk_wq, &ub->watch_work, UBLK_WATCH_PERIOD);
}

static int ublk_fetch(struct ublk_queue *q, unsigned int tag, struct io_uring_cmd *cmd, u64 addr,
		      unsigned int issue_flags)
{
	struct ublk_place place = { .addr = addr };
	struct ublk_device *ub = q->ub;
	struct ublk_file *file = cmd->file->private_data;
	struct ublk_io *io = &q->ios[tag];
	bool plain = !capable(CAP_SYS_ADMIN);
	int err = -EBUSY;

	if (ublk_server_moves_data(ub) ? addr : !addr && !ublk_has(ub, UBLK_F_NEED_GET_DATA))
		return -EINVAL;
	if (!ublk_place_by_index(ub, ublk_uring_addr(cmd), &place))
		return -EINVAL;
	spin_lock(&ub->lock);
	if (!ublk_may_fetch(q, file))
		goto unlock;
	spin_lock(&io->lock);
	if (io->state == UBLK_IO_UNARMED && !io->task) {
		io->task = get_task_struct(current);
		ublk_arm_command(q, tag, &place, cmd);
		err = -EIOCBQUEUED;
	}
	spin_unlock(&io->lock);
	if (err == -EIOCBQUEUED)
		ublk_queue_fetched(q, file, 1, plain);
unlock:
	spin_unlock(&ub->lock);
	if (err == -EIOCBQUEUED)
		ublk_uring_mark_cancelable(cmd, issue_flags);
	return err;
}

/* What comes in the address of an answer: the tag's next buffer, or where an append's data went. */
static bool ublk_commit_addr_ok(struct ublk_device *ub, struct request *req, u64 addr)
{
	if (ublk_server_moves_data(ub))
		return !addr || req_op(req) == REQ_OP_ZONE_APPEND;
	return addr || (ublk_has(ub, UBLK_F_NEED_GET_DATA) && req_op(req) != REQ_OP_READ);
}

/*
 * The server's answer to the request of a BUSY tag: take the request from it,
 * and the tag back for the next, with the command unless it is one of a batch.
 */
int ublk_answer(struct ublk_queue *q, unsigned int tag, struct io_uring_cmd *cmd, const struct ublk_answer *answer,
		unsigned int issue_flags)
{
	struct ublk_device *ub = q->ub;
	struct ublk_io *io = &q->ios[tag];
	struct request *req = io->req;	/* BUSY: nobody else touches it */
	int err = -EIOCBQUEUED;
	int res = answer->res;

	if (res > 0 && req_op(req) == REQ_OP_READ && !ublk_server_moves_data(ub) && !ublk_req_is_shared(ub, req)) {
		size_t bytes = min_t(size_t, res, blk_rq_bytes(req));

		res = ublk_copy_from_server(req, answer->next.addr, bytes);
	}
	if (unlikely(req_op(req) == REQ_OP_ZONE_APPEND))
		res = ublk_zone_appended(ub, req, answer->sector, res);
	if (io->ring)
		ublk_auto_unregister(io, cmd, issue_flags);

	/* armed before the request ends, since its tag is in use again right after */
	spin_lock(&io->lock);
	io->req = NULL;
	if (unlikely(q->closing)) {
		io->state = UBLK_IO_UNARMED;
		err = UBLK_IO_RES_ABORT;
	} else if (q->batch) {
		ublk_arm(q, tag, &answer->next);
	} else {
		ublk_arm_command(q, tag, &answer->next, cmd);
	}
	spin_unlock(&io->lock);
	if (likely(err == -EIOCBQUEUED && !q->batch))
		ublk_uring_mark_cancelable(cmd, issue_flags);
	ublk_finish(q, req, UBLK_END_COMMIT, res);
	return err;
}

static int ublk_commit(struct ublk_queue *q, unsigned int tag, struct io_uring_cmd *cmd, u64 addr, int res,
		       unsigned int issue_flags)
{
	struct ublk_answer answer = { .res = res };
	struct ublk_device *ub = q->ub;
	struct ublk_io *io = &q->ios[tag];
	struct request *req = io->req;	/* BUSY */

	if (unlikely(!ublk_commit_addr_ok(ub, req, addr) ||
		     !ublk_place_by_index(ub, ublk_uring_addr(cmd), &answer.next))) {
		spin_lock(&io->lock);
		io->state = UBLK_IO_SERVED;
		spin_unlock(&io->lock);
		return -EINVAL;
	}
	if (unlikely(req_op(req) == REQ_OP_ZONE_APPEND))
		answer.sector = addr;
	else
		answer.next.addr = addr;
	return ublk_answer(q, tag, cmd, &answer, issue_flags);
}

/* The buffer for a write whose data is still with us. */
static int ublk_get_data(struct ublk_queue *q, unsigned int tag, u64 addr)
{
	struct ublk_io *io = &q->ios[tag];
	struct request *req = io->req;	/* BUSY */
	bool there = ublk_bring_data(q, tag, req, addr);

	if (there)
		q->descs[tag].addr = addr;
	spin_lock(&io->lock);
	io->state = there ? UBLK_IO_SERVED : UBLK_IO_WANTS_DATA;
	spin_unlock(&io->lock);
	return there ? UBLK_IO_RES_OK : -EFAULT;
}

/* A command for one tag. */
static int ublk_tag_command(struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	const struct ublksrv_io_cmd *payload = ublk_uring_payload(cmd);
	struct ublk_file *file = cmd->file->private_data;
	struct ublk_device *ub = file->ub;
	unsigned int qid = READ_ONCE(payload->q_id);
	unsigned int tag = READ_ONCE(payload->tag);
	int res = READ_ONCE(payload->result);
	u64 addr = READ_ONCE(payload->addr);
	unsigned int nr = _IOC_NR(cmd->cmd_op);
	struct ublk_queue *q;
	struct ublk_io *io;
	int err = 0;

	if (nr == UBLK_IO_UNREGISTER_IO_BUF)
		return ublk_buffer_unregister(ub, addr, cmd, issue_flags);
	if (unlikely(qid >= ub->info.nr_hw_queues || tag >= ub->info.queue_depth))
		return -EINVAL;
	q = ub->queues[qid];
	if (nr == UBLK_IO_REGISTER_IO_BUF)
		return ublk_buffer_register(q, tag, addr, cmd, issue_flags);
	if (q->batch)
		return -EOPNOTSUPP;
	if (nr == UBLK_IO_FETCH_REQ)
		return ublk_fetch(q, tag, cmd, addr, issue_flags);

	io = &q->ios[tag];
	spin_lock(&io->lock);
	if (unlikely(io->task != current))
		err = -EINVAL;
	else if (unlikely(io->state == UBLK_IO_ARMED || io->state == UBLK_IO_DISPATCHED))
		err = -EBUSY;
	else if (io->state == (nr == UBLK_IO_NEED_GET_DATA ? UBLK_IO_WANTS_DATA : UBLK_IO_SERVED) &&
		 (nr == UBLK_IO_NEED_GET_DATA || nr == UBLK_IO_COMMIT_AND_FETCH_REQ))
		io->state = UBLK_IO_BUSY;
	else
		err = -EINVAL;
	spin_unlock(&io->lock);
	if (unlikely(err))
		return err;
	if (nr == UBLK_IO_NEED_GET_DATA)
		return ublk_get_data(q, tag, addr);
	return ublk_commit(q, tag, cmd, addr, res, issue_flags);
}

static int ublk_io_cmd(struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	struct ublk_file *file = cmd->file->private_data;
	int err = ublk_check_opcode(cmd->cmd_op);

	if (unlikely(err))
		return err;
	if (ublk_has(file->ub, UBLK_F_BATCH_IO) && ublk_is_batch_op(cmd->cmd_op))
		return ublk_batch_command(cmd, issue_flags);
	return ublk_tag_command(cmd, issue_flags);
}

UBLK_TASK_CALLBACK(ublk_io_cmd_in_task)
{
	int res = -ECANCELED;

	if (!ublk_task_is_gone())
		res = ublk_io_cmd(cmd, issue_flags);
	if (res != -EIOCBQUEUED)
		ublk_uring_done(cmd, res, issue_flags);
}

int ublk_file_command(struct io_uring_cmd *cmd, unsigned int issue_flags)
{
	if (unlikely(ublk_uring_is_cancel(issue_flags))) {
		ublk_cancel(cmd, issue_flags);
		return 0;
	}
	/* in one of io_uring's worker threads, because user space asked for it */
	if (unlikely(issue_flags & IO_URING_F_UNLOCKED)) {
		io_uring_cmd_complete_in_task(cmd, ublk_io_cmd_in_task);
		return -EIOCBQUEUED;
	}
	return ublk_io_cmd(cmd, issue_flags);
}
