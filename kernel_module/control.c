// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/ublk-control: commands, and who may give them.
 */
#include <linux/capability.h>
#include <linux/namei.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "driver.h"

/* Bare numbers are what servers of before 6.4 send. */
int ublk_check_opcode(u32 op)
{
	u32 type = _IOC_TYPE(op);

	return type == 'u' || type == 0 ? 0 : -EOPNOTSUPP;
}

static int ublk_control_features(const struct ublksrv_ctrl_cmd *cmd)
{
	u64 features = UBLK_FEATURES;

	if (cmd->len != UBLK_FEATURES_LEN || !cmd->addr)
		return -EINVAL;
	if (copy_to_user(u64_to_user_ptr(cmd->addr), &features, sizeof(features)))
		return -EFAULT;
	return 0;
}

static int ublk_control_add(const struct ublksrv_ctrl_cmd *cmd)
{
	void __user *answer = u64_to_user_ptr(cmd->addr);
	struct ublksrv_ctrl_dev_info info;

	if (cmd->len < sizeof(info) || !cmd->addr || cmd->queue_id != U16_MAX)
		return -EINVAL;
	if (copy_from_user(&info, answer, sizeof(info)))
		return -EFAULT;
	if (!info.queue_depth || info.queue_depth > UBLK_MAX_QUEUE_DEPTH ||
	    !info.nr_hw_queues || info.nr_hw_queues > UBLK_MAX_NR_QUEUES)
		return -EINVAL;
	if (capable(CAP_SYS_ADMIN))
		info.flags &= ~UBLK_F_UNPRIVILEGED_DEV;
	else if (!(info.flags & UBLK_F_UNPRIVILEGED_DEV))
		return -EPERM;
	if (cmd->dev_id != info.dev_id)
		return -EINVAL;
	if (cmd->dev_id != U32_MAX && cmd->dev_id >= UBLK_MAX_DEVICES)
		return -EINVAL;
	return ublk_add(&info, answer);
}

static int ublk_control_info(struct ublk_device *ub, const struct ublksrv_ctrl_cmd *cmd)
{
	struct ublksrv_ctrl_dev_info info;

	if (cmd->len < sizeof(info) || !cmd->addr)
		return -EINVAL;
	spin_lock(&ub->lock);
	info = ub->info;
	spin_unlock(&ub->lock);
	if (copy_to_user(u64_to_user_ptr(cmd->addr), &info, sizeof(info)))
		return -EFAULT;
	return 0;
}

static int ublk_control_affinity(struct ublk_device *ub, const struct ublksrv_ctrl_cmd *cmd)
{
	unsigned int *map = ub->tag_set.map[HCTX_TYPE_DEFAULT].mq_map;
	void __user *to = u64_to_user_ptr(cmd->addr);
	unsigned int size, cpu;
	cpumask_var_t mask;
	int err = 0;

	if (cmd->len * BITS_PER_BYTE < nr_cpu_ids || cmd->len % sizeof(unsigned long) || !cmd->addr)
		return -EINVAL;
	if (cmd->data[0] >= ub->info.nr_hw_queues)
		return -EINVAL;
	if (!zalloc_cpumask_var(&mask, GFP_KERNEL))
		return -ENOMEM;
	for_each_possible_cpu(cpu)
		if (map[cpu] == cmd->data[0])
			cpumask_set_cpu(cpu, mask);
	size = min_t(unsigned int, cmd->len, cpumask_size());
	if (copy_to_user(to, mask, size) || clear_user(to + size, cmd->len - size))
		err = -EFAULT;
	free_cpumask_var(mask);
	return err;
}

struct ublk_params_head {
	__u32 len;
	__u32 types;
};

/* The head of struct ublk_params: how much of it both sides know. */
static int ublk_control_params_head(const struct ublksrv_ctrl_cmd *cmd, struct ublk_params_head *head)
{
	if (cmd->len <= sizeof(*head) || !cmd->addr)
		return -EINVAL;
	if (copy_from_user(head, u64_to_user_ptr(cmd->addr), sizeof(*head)))
		return -EFAULT;
	if (!head->len || head->len > cmd->len)
		return -EINVAL;
	head->len = min_t(u32, head->len, sizeof(struct ublk_params));
	return 0;
}

static int ublk_control_read_params(struct ublk_device *ub, const struct ublksrv_ctrl_cmd *cmd)
{
	struct ublk_params_head head;
	struct ublk_params params;
	int err = ublk_control_params_head(cmd, &head);

	if (err)
		return err;
	spin_lock(&ub->lock);
	params = ub->params;
	params.devt.char_major = MAJOR(ub->dev.devt);
	params.devt.char_minor = MINOR(ub->dev.devt);
	params.devt.disk_major = ub->disk ? MAJOR(disk_devt(ub->disk)) : 0;
	params.devt.disk_minor = ub->disk ? MINOR(disk_devt(ub->disk)) : 0;
	spin_unlock(&ub->lock);
	params.types |= UBLK_PARAM_TYPE_DEVT;
	if (copy_to_user(u64_to_user_ptr(cmd->addr), &params, head.len))
		return -EFAULT;
	return 0;
}

static int ublk_control_write_params(struct ublk_device *ub, const struct ublksrv_ctrl_cmd *cmd)
{
	struct ublk_params_head head;
	struct ublk_params params = {};
	int err = ublk_control_params_head(cmd, &head);

	if (err)
		return err;
	if (!head.types)
		return -EINVAL;
	if (copy_from_user(&params, u64_to_user_ptr(cmd->addr), head.len))
		return -EFAULT;
	params.types &= UBLK_PARAM_TYPES;

	if (mutex_lock_interruptible(&ub->mutex))
		return -EINTR;
	if (ub->disk) {
		err = -EACCES;
	} else {
		err = ublk_params_check(ub, &params);
		if (err)
			memset(&params, 0, sizeof(params));
		spin_lock(&ub->lock);
		ub->params = params;
		spin_unlock(&ub->lock);
	}
	mutex_unlock(&ub->mutex);
	return err;
}

static int ublk_control_delete(struct ublk_device **ub, bool wait)
{
	u32 id = (*ub)->id;
	int err = ublk_delete(*ub);

	if (err)
		return err;
	/* ours would keep it from going */
	ublk_put(*ub);
	*ub = NULL;
	return wait ? ublk_wait_for_id(id) : 0;
}

/* May the caller use the node at this path for that, and is it this device's? */
static int ublk_check_node(struct ublk_device *ub, const char *name, int mask)
{
	struct inode *inode;
	struct path path;
	int err = kern_path(name, LOOKUP_FOLLOW, &path);

	if (err)
		return err;
	inode = d_backing_inode(path.dentry);
	err = -EPERM;
	if (S_ISCHR(inode->i_mode) && inode->i_rdev == ub->dev.devt)
		err = ublk_inode_permission(inode, mask);
	path_put(&path);
	return err;
}

/* What a command needs of the node's permissions, 0 if it is not for ordinary users. */
static int ublk_node_mask(unsigned int nr)
{
	switch (nr) {
	case UBLK_CMD_GET_DEV_INFO:
	case UBLK_CMD_GET_DEV_INFO2:
	case UBLK_CMD_GET_QUEUE_AFFINITY:
	case UBLK_CMD_GET_PARAMS:
	case _IOC_NR(UBLK_U_CMD_GET_QUEUE_STATES):
		return MAY_READ;
	case UBLK_CMD_START_DEV:
	case UBLK_CMD_STOP_DEV:
	case UBLK_CMD_DEL_DEV:
	case UBLK_CMD_SET_PARAMS:
	case UBLK_CMD_START_USER_RECOVERY:
	case UBLK_CMD_END_USER_RECOVERY:
	case _IOC_NR(UBLK_U_CMD_UPDATE_SIZE):
	case _IOC_NR(UBLK_U_CMD_QUIESCE_DEV):
	case _IOC_NR(UBLK_U_CMD_TRY_STOP_DEV):
	case _IOC_NR(UBLK_U_CMD_REG_BUF):
	case _IOC_NR(UBLK_U_CMD_UNREG_BUF):
		return MAY_READ | MAY_WRITE;
	default:
		return 0;
	}
}

/*
 * Commands for a privileged device take CAP_SYS_ADMIN. For an unprivileged one
 * the buffer begins with the path of its node, and access to that decides; the
 * path is then cut off. GET_DEV_INFO2, for those who don't know yet which kind
 * it is, has the path always.
 */
static int ublk_control_permission(struct ublk_device *ub, struct ublksrv_ctrl_cmd *cmd, unsigned int nr)
{
	char *name;
	int mask, err;

	if (!ublk_has(ub, UBLK_F_UNPRIVILEGED_DEV)) {
		if (!capable(CAP_SYS_ADMIN))
			return -EPERM;
		if (nr != UBLK_CMD_GET_DEV_INFO2)
			return 0;
	}
	if (!cmd->dev_path_len || cmd->dev_path_len > PATH_MAX || cmd->len < cmd->dev_path_len)
		return -EINVAL;
	name = memdup_user_nul(u64_to_user_ptr(cmd->addr), cmd->dev_path_len);
	if (IS_ERR(name))
		return PTR_ERR(name);
	mask = ublk_node_mask(nr);
	err = mask ? ublk_check_node(ub, name, mask) : -EINVAL;
	kfree(name);
	if (err)
		return err;
	cmd->addr += cmd->dev_path_len;
	cmd->len -= cmd->dev_path_len;
	return 0;
}

static int ublk_control_run(struct ublk_device **ub, const struct ublksrv_ctrl_cmd *cmd, unsigned int nr)
{
	switch (nr) {
	case UBLK_CMD_GET_DEV_INFO:
	case UBLK_CMD_GET_DEV_INFO2:
		return ublk_control_info(*ub, cmd);
	case UBLK_CMD_GET_QUEUE_AFFINITY:
		return ublk_control_affinity(*ub, cmd);
	case UBLK_CMD_GET_PARAMS:
		return ublk_control_read_params(*ub, cmd);
	case UBLK_CMD_SET_PARAMS:
		return ublk_control_write_params(*ub, cmd);
	case UBLK_CMD_START_DEV:
		return ublk_start(*ub, (int)cmd->data[0]);
	case UBLK_CMD_STOP_DEV:
		return ublk_stop(*ub);
	case UBLK_CMD_DEL_DEV:
		return ublk_control_delete(ub, true);
	case _IOC_NR(UBLK_U_CMD_DEL_DEV_ASYNC):
		return ublk_control_delete(ub, false);
	case UBLK_CMD_START_USER_RECOVERY:
		return ublk_start_recovery(*ub);
	case UBLK_CMD_END_USER_RECOVERY:
		return ublk_end_recovery(*ub, (int)cmd->data[0]);
	case _IOC_NR(UBLK_U_CMD_UPDATE_SIZE):
		return ublk_update_size(*ub, cmd->data[0]);
	case _IOC_NR(UBLK_U_CMD_QUIESCE_DEV):
		return ublk_quiesce(*ub, cmd->data[0]);
	case _IOC_NR(UBLK_U_CMD_TRY_STOP_DEV):
		return ublk_try_stop(*ub);
	case _IOC_NR(UBLK_U_CMD_REG_BUF):
		return ublk_shmem_register(*ub, cmd->addr, cmd->len);
	case _IOC_NR(UBLK_U_CMD_UNREG_BUF):
		return ublk_shmem_unregister(*ub, cmd->data[0]);
	case _IOC_NR(UBLK_U_CMD_GET_QUEUE_STATES):
		return ublk_get_queue_states(*ub, cmd->addr, cmd->len);
	default:
		return -EOPNOTSUPP;
	}
}

int ublk_control_command(struct io_uring_cmd *ucmd, unsigned int issue_flags)
{
	unsigned int nr = _IOC_NR(ucmd->cmd_op);
	struct ublksrv_ctrl_cmd cmd;
	struct ublk_device *ub;
	int err;

	/* nearly all of them may sleep: to one of io_uring's worker threads */
	if (issue_flags & IO_URING_F_NONBLOCK)
		return -EAGAIN;
	if (!(issue_flags & IO_URING_F_SQE128))
		return -EINVAL;
	/* once, as user space may still write to it */
	memcpy(&cmd, ublk_uring_payload(ucmd), sizeof(cmd));

	err = ublk_check_opcode(ucmd->cmd_op);
	if (err)
		return err;
	if (ucmd->cmd_op == UBLK_U_CMD_GET_FEATURES)
		return ublk_control_features(&cmd);
	if (nr == UBLK_CMD_ADD_DEV)
		return ublk_control_add(&cmd);
	ub = ublk_get_by_id(cmd.dev_id);
	if (!ub)
		return -ENODEV;
	err = ublk_control_permission(ub, &cmd, nr);
	if (!err)
		err = ublk_control_run(&ub, &cmd, nr);
	if (ub)
		ublk_put(ub);
	if (err > 0) {
		/* 6.1 forgets a command whose worker thread returns more than 0 */
		ublk_uring_done(ucmd, err, issue_flags);
		return -EIOCBQUEUED;
	}
	return err;
}
