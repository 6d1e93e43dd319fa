// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/ublkcN as a file: open, map, close.
 */
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "driver.h"

static int ublk_file_open(struct inode *inode, struct file *filp)
{
	struct ublk_device *ub = container_of(inode->i_cdev, struct ublk_device, cdev);
	struct ublk_file *file = kzalloc(sizeof(*file), GFP_KERNEL);
	int err = 0;

	if (!file)
		return -ENOMEM;
	file->ub = ub;
	file->filp = filp;
	spin_lock(&ub->lock);
	/* one server, one file, unless the device is one of shards */
	if (ub->files && !ublk_has(ub, UBLK_F_SHARDS))
		err = -EBUSY;
	else
		ub->files++;
	spin_unlock(&ub->lock);
	if (err) {
		kfree(file);
		return err;
	}
	filp->private_data = file;
	return 0;
}

static int ublk_file_close(struct inode *inode, struct file *filp)
{
	struct ublk_file *file = filp->private_data;

	ublk_server_gone(file);
	kfree(file);
	return 0;
}

/* A process closes its descriptor, maybe because it dies. */
static int ublk_file_flush(struct file *filp, fl_owner_t id)
{
	struct ublk_file *file = filp->private_data;

	if (current->flags & PF_EXITING)
		ublk_reap_exiting(file->ub);
	return 0;
}

/* The request descriptors of one queue, to be read. */
static int ublk_file_map(struct file *filp, struct vm_area_struct *vma)
{
	struct ublk_file *file = filp->private_data;
	struct ublk_device *ub = file->ub;
	u64 offset = (u64)vma->vm_pgoff << PAGE_SHIFT;
	u64 room = ublk_descs_size(UBLK_MAX_QUEUE_DEPTH);
	bool foreign;
	u64 qid;

	spin_lock(&ub->lock);
	if (!ub->mm)
		ub->mm = current->mm;
	foreign = ub->mm != current->mm && !ublk_has(ub, UBLK_F_SHARDS);
	spin_unlock(&ub->lock);
	if (foreign)
		return -EINVAL;
	if (vma->vm_flags & VM_WRITE)
		return -EPERM;
	qid = div64_u64(offset - UBLKSRV_CMD_BUF_OFFSET, room);
	if (qid >= ub->info.nr_hw_queues)
		return -EINVAL;
	if (vma->vm_end - vma->vm_start != ublk_descs_size(ub->info.queue_depth))
		return -EINVAL;
	/* an offset into the unused rest of a queue's room maps the queue from its start, as ever */
	ublk_vma_never_writable(vma);
	return remap_vmalloc_range(vma, ub->queues[qid]->descs, 0);
}

const struct file_operations ublk_file_ops = {
	.owner = THIS_MODULE,
	.open = ublk_file_open,
	.release = ublk_file_close,
	.flush = ublk_file_flush,
	.mmap = ublk_file_map,
	.read_iter = ublk_file_read,
	.write_iter = ublk_file_write,
	.uring_cmd = ublk_file_command,
};
