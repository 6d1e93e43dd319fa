// SPDX-License-Identifier: GPL-2.0-only
/*
 * Life of a device: add, start, stop, delete.
 */
#include <linux/capability.h>
#include <linux/cred.h>
#include <linux/idr.h>
#include <linux/module.h>
#include <linux/uaccess.h>

#include "driver.h"

/* The table of devices. An entry is NULL while its device is being made. */
static DEFINE_IDR(ublk_devices);
static DEFINE_SPINLOCK(ublk_devices_lock);
/* ADD_DEV and DEL_DEV, one at a time. */
static DEFINE_MUTEX(ublk_devices_mutex);
static DECLARE_WAIT_QUEUE_HEAD(ublk_devices_wait);
static atomic_t ublk_devices_left = ATOMIC_INIT(0);
static unsigned int ublk_unprivileged;	/* under ublk_devices_mutex */

struct ublk_device *ublk_get_by_id(u32 id)
{
	struct ublk_device *ub = NULL;

	if (id >= UBLK_MAX_DEVICES)
		return NULL;
	spin_lock(&ublk_devices_lock);
	ub = idr_find(&ublk_devices, id);
	/* the last reference may be gone already, the entry goes a moment later */
	if (ub && !kobject_get_unless_zero(&ub->dev.kobj))
		ub = NULL;
	spin_unlock(&ublk_devices_lock);
	return ub;
}

void ublk_put(struct ublk_device *ub)
{
	put_device(&ub->dev);
}

static void ublk_free(struct work_struct *work)
{
	struct ublk_device *ub = container_of(work, struct ublk_device, free_work);

	cancel_delayed_work_sync(&ub->watch_work);
	if (ub->tag_set_made)
		blk_mq_free_tag_set(&ub->tag_set);
	ublk_free_queues(ub);
	ublk_shmem_free(ub);
	if (ub->id_used) {
		spin_lock(&ublk_devices_lock);
		idr_remove(&ublk_devices, ub->id);
		spin_unlock(&ublk_devices_lock);
	}
	kfree(ub);
	atomic_dec(&ublk_devices_left);
	wake_up_all(&ublk_devices_wait);
}

/* The last reference may go where one must not sleep for long, or with locks held that the end needs. */
static void ublk_release(struct device *dev)
{
	struct ublk_device *ub = container_of(dev, struct ublk_device, dev);

	queue_work(ublk_wq, &ub->free_work);
}

static bool ublk_id_is_free(u32 id)
{
	void *found;

	spin_lock(&ublk_devices_lock);
	found = idr_find(&ublk_devices, id);
	spin_unlock(&ublk_devices_lock);
	return !found;
}

int ublk_wait_for_id(u32 id)
{
	return wait_event_interruptible(ublk_devices_wait, ublk_id_is_free(id)) ? -EINTR : 0;
}

void ublk_wait_for_devices(void)
{
	wait_event(ublk_devices_wait, !atomic_read(&ublk_devices_left));
}

static int ublk_alloc_id(u32 wanted)
{
	int first = wanted == U32_MAX ? 0 : wanted;
	int end = wanted == U32_MAX ? UBLK_MAX_DEVICES : wanted + 1;
	int id;

	idr_preload(GFP_KERNEL);
	spin_lock(&ublk_devices_lock);
	id = idr_alloc(&ublk_devices, NULL, first, end, GFP_NOWAIT);
	spin_unlock(&ublk_devices_lock);
	idr_preload_end();
	if (id == -ENOSPC && wanted != U32_MAX)
		return -EEXIST;
	return id;
}

/* What of the wish is granted, by the rules that hold between features. */
static int ublk_negotiate(struct ublksrv_ctrl_dev_info *info)
{
	const u64 recovery = UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE |
			     UBLK_F_USER_RECOVERY_FAIL_IO;

	switch (info->flags & recovery) {
	case 0:
	case UBLK_F_USER_RECOVERY:
	case UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE:
	case UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_FAIL_IO:
		break;
	default:
		return -EINVAL;
	}
	if ((info->flags & (UBLK_F_QUIESCE | UBLK_F_SHARDS)) && !(info->flags & UBLK_F_USER_RECOVERY))
		return -EINVAL;

	/* Users of a device must not have to wait for a server that its owner never starts. */
	if (info->flags & UBLK_F_UNPRIVILEGED_DEV) {
		info->flags &= ~(UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE | UBLK_F_SHARDS);
		/* nor be able to pin any amount of memory */
		info->flags &= ~UBLK_F_SHMEM_ZC;
		/* nor be shown what was in memory that the server was to fill, and didn't */
		if (info->flags & UBLK_FEATURES & UBLK_MOVES_DATA)
			return -EINVAL;
	}
	info->flags &= UBLK_FEATURES;
	info->flags |= UBLK_FEATURES_ALWAYS;
	/* where an append's data went is told in the place of a buffer's address */
	if ((info->flags & UBLK_F_ZONED) && !(info->flags & (UBLK_F_USER_COPY | UBLK_F_SUPPORT_ZERO_COPY)))
		return -EINVAL;
	if (info->flags & UBLK_MOVES_DATA)
		info->flags &= ~UBLK_F_NEED_GET_DATA;
	if (info->flags & UBLK_F_BATCH_IO)
		info->flags &= ~(UBLK_F_NEED_GET_DATA | UBLK_F_PER_IO_DAEMON);
	info->nr_hw_queues = min_t(unsigned int, info->nr_hw_queues, nr_cpu_ids);
	info->max_io_buf_bytes = round_down(info->max_io_buf_bytes, PAGE_SIZE);
	info->state = UBLK_S_DEV_DEAD;
	info->ublksrv_pid = -1;
	info->owner_uid = from_kuid(&init_user_ns, current_uid());
	info->owner_gid = from_kgid(&init_user_ns, current_gid());
	return 0;
}

static int ublk_make_tag_set(struct ublk_device *ub)
{
	struct blk_mq_tag_set *set = &ub->tag_set;
	int err;

	set->ops = &ublk_blk_mq_ops;
	set->nr_hw_queues = ub->info.nr_hw_queues;
	set->queue_depth = ub->info.queue_depth;
	set->numa_node = NUMA_NO_NODE;
	set->cmd_size = sizeof(struct ublk_request);
	set->flags = UBLK_TAG_SET_FLAGS;
	set->driver_data = ub;
	err = blk_mq_alloc_tag_set(set);
	ub->tag_set_made = !err;
	return err;
}

static void ublk_stop_in_work(struct work_struct *work);
static void ublk_scan(struct work_struct *work);

int ublk_add(struct ublksrv_ctrl_dev_info *info, void __user *answer)
{
	struct ublk_device *ub;
	u32 wanted = info->dev_id;
	int err = ublk_negotiate(info);

	if (err)
		return err;
	if (mutex_lock_killable(&ublk_devices_mutex))
		return -EINTR;
	err = -EACCES;
	if ((info->flags & UBLK_F_UNPRIVILEGED_DEV) && ublk_unprivileged >= READ_ONCE(ublk_max_unprivileged))
		goto unlock;
	err = -ENOMEM;
	ub = kzalloc(sizeof(*ub), GFP_KERNEL);
	if (!ub)
		goto unlock;
	atomic_inc(&ublk_devices_left);
	ub->info = *info;
	ub->io_timeout = READ_ONCE(ublk_default_timeout);
	mutex_init(&ub->mutex);
	mutex_init(&ub->shmem_mutex);
	xa_init_flags(&ub->buffers, XA_FLAGS_ALLOC);
	spin_lock_init(&ub->lock);
	init_waitqueue_head(&ub->wait);
	INIT_WORK(&ub->stop_work, ublk_stop_in_work);
	INIT_WORK(&ub->scan_work, ublk_scan);
	INIT_WORK(&ub->free_work, ublk_free);
	INIT_DELAYED_WORK(&ub->watch_work, ublk_watch);
	device_initialize(&ub->dev);
	ub->dev.class = &ublk_class;
	ub->dev.release = ublk_release;

	err = ublk_alloc_id(wanted);
	if (err < 0)
		goto put;
	ub->id = err;
	ub->id_used = true;
	ub->info.dev_id = ub->id;
	ub->dev.devt = MKDEV(MAJOR(ublk_devt), ub->id);
	err = dev_set_name(&ub->dev, "ublkc%u", ub->id);
	if (err)
		goto put;
	err = ublk_alloc_queues(ub);
	if (err)
		goto put;
	err = ublk_make_tag_set(ub);
	if (err)
		goto put;
	err = -EFAULT;
	if (copy_to_user(answer, &ub->info, sizeof(ub->info)))
		goto put;
	cdev_init(&ub->cdev, &ublk_file_ops);
	ub->cdev.owner = THIS_MODULE;
	err = cdev_device_add(&ub->cdev, &ub->dev);
	if (err)
		goto put;

	__module_get(THIS_MODULE);
	if (ublk_has(ub, UBLK_F_UNPRIVILEGED_DEV)) {
		ub->unprivileged_counted = true;
		ublk_unprivileged++;
	}
	spin_lock(&ublk_devices_lock);
	idr_replace(&ublk_devices, ub, ub->id);
	spin_unlock(&ublk_devices_lock);
	goto unlock;
put:
	ublk_put(ub);
unlock:
	mutex_unlock(&ublk_devices_mutex);
	return err;
}

/* Under ub->lock: every tag of every queue has a task that will live on. */
bool ublk_all_ready(struct ublk_device *ub)
{
	unsigned int q;

	lockdep_assert_held(&ub->lock);
	if (ub->ready != ub->info.nr_hw_queues)
		return false;
	for (q = 0; q < ub->info.nr_hw_queues; q++)
		if (ub->queues[q]->lost)
			return false;
	return true;
}

static bool ublk_ready_or_over(struct ublk_device *ub)
{
	bool done;

	spin_lock(&ub->lock);
	done = ublk_all_ready(ub) || ub->stopped || READ_ONCE(ub->deleted);
	spin_unlock(&ub->lock);
	return done;
}

/* Until every queue is fetched. */
int ublk_wait_ready(struct ublk_device *ub)
{
	return wait_event_interruptible(ub->wait, ublk_ready_or_over(ub)) ? -EINTR : 0;
}

static void ublk_set_up(struct ublk_device *ub, bool up)
{
	unsigned int q;

	lockdep_assert_held(&ub->lock);
	for (q = 0; q < ub->info.nr_hw_queues; q++)
		WRITE_ONCE(ub->queues[q]->up, up);
}

/*
 * Looking for partitions reads from the disk. Not from START_DEV, which would
 * hold ub->mutex while it waits for a server that may die.
 */
static void ublk_scan(struct work_struct *work)
{
	struct ublk_device *ub = container_of(work, struct ublk_device, scan_work);
	struct gendisk *disk = NULL;

	spin_lock(&ub->lock);
	if (ub->disk) {
		disk = ub->disk;
		get_device(disk_to_dev(disk));
	}
	spin_unlock(&ub->lock);
	if (disk) {
		mutex_lock(&disk->open_mutex);
		bdev_disk_changed(disk, false);
		mutex_unlock(&disk->open_mutex);
		put_disk(disk);
	}
	ublk_put(ub);
}

/* With a reference, which the work puts. The caller has one, too. */
static void ublk_queue_work(struct ublk_device *ub, struct workqueue_struct *wq, struct work_struct *work)
{
	get_device(&ub->dev);
	if (!queue_work(wq, work))
		ublk_put(ub);
}

static void ublk_begin_scan(struct ublk_device *ub, struct gendisk *disk)
{
	/* a disk served by an ordinary user stays unscanned: its content could be anything */
	if (ublk_has(ub, UBLK_F_UNPRIVILEGED_DEV) || ub->plain_daemon)
		return;
	clear_bit(GD_SUPPRESS_PART_SCAN, &disk->state);
	if (ublk_has(ub, UBLK_F_NO_AUTO_PART_SCAN))
		return;
	ublk_queue_work(ub, ublk_wq, &ub->scan_work);
}

/*
 * Zones were asked for, and the disk is not added after all: 6.1 would free its
 * queue while the timer and the works of those requests are still to run.
 */
static void ublk_sync_unadded(struct request_queue *queue)
{
	struct blk_mq_hw_ctx *hctx;
	unsigned long i;

	blk_sync_queue(queue);
	cancel_delayed_work_sync(&queue->requeue_work);
	queue_for_each_hw_ctx(queue, hctx, i)
		cancel_delayed_work_sync(&hctx->run_work);
}

static int ublk_start_locked(struct ublk_device *ub, int pid)
{
	struct gendisk *disk;
	unsigned int seconds;
	int err;

	lockdep_assert_held(&ub->mutex);
	if (READ_ONCE(ub->deleted) || ub->stopped)
		return -ENODEV;
	if (ub->disk)
		return -EEXIST;
	if (!(ub->params.types & UBLK_PARAM_TYPE_BASIC))
		return -EINVAL;
	seconds = READ_ONCE(ub->io_timeout);
	/* 0 is the block layer's own: a look at what takes long, see ublk_request_late() */
	ub->tag_set.timeout = min_t(unsigned int, seconds, INT_MAX / HZ) * HZ;
	disk = ublk_alloc_disk(ub);
	if (IS_ERR(disk))
		return PTR_ERR(disk);
	/* given back by ->free_disk(), which only a disk that was added gets to */
	get_device(&ub->dev);

	spin_lock(&ub->lock);
	if (!ublk_all_ready(ub)) {
		spin_unlock(&ub->lock);
		err = -EAGAIN;
		goto put;
	}
	ub->disk = disk;
	ub->started = true;
	ub->info.state = UBLK_S_DEV_LIVE;
	ub->info.ublksrv_pid = pid;
	ublk_set_up(ub, true);
	spin_unlock(&ub->lock);

	set_bit(GD_SUPPRESS_PART_SCAN, &disk->state);
	err = ublk_has(ub, UBLK_F_ZONED) ? ublk_check_zones(ub, disk) : 0;
	if (!err)
		err = add_disk(disk);
	if (!err) {
		ublk_begin_scan(ub, disk);
		return 0;
	}
	spin_lock(&ub->lock);
	ub->started = false;
	ub->disk = NULL;
	ub->info.state = UBLK_S_DEV_DEAD;
	ublk_set_up(ub, false);
	spin_unlock(&ub->lock);
	ublk_sync_unadded(disk->queue);
put:
	put_disk(disk);
	ublk_put(ub);
	return err;
}

int ublk_start(struct ublk_device *ub, int pid)
{
	int err;

	if (pid <= 0)
		return -EINVAL;
	if (!(READ_ONCE(ub->params.types) & UBLK_PARAM_TYPE_BASIC))
		return -EINVAL;
	do {
		err = ublk_wait_ready(ub);
		if (err)
			return err;
		if (mutex_lock_interruptible(&ub->mutex))
			return -EINTR;
		err = ublk_start_locked(ub, pid);
		mutex_unlock(&ub->mutex);
	} while (err == -EAGAIN); /* the server died in between: wait for the next */
	return err;
}

static void ublk_remove_disk(struct ublk_device *ub)
{
	struct gendisk *disk = ub->disk;

	lockdep_assert_held(&ub->mutex);
	if (!disk)
		return;
	spin_lock(&ub->lock);
	ub->force_abort = true;
	spin_unlock(&ub->lock);
	/* what waits for a server comes back, and fails now */
	ublk_kick(disk);
	ublk_reap_exiting(ub);
	mod_delayed_work(ublk_wq, &ub->watch_work, 0);
	del_gendisk(disk);

	spin_lock(&ub->lock);
	ub->disk = NULL;
	ub->info.state = UBLK_S_DEV_DEAD;
	ublk_set_up(ub, false);
	spin_unlock(&ub->lock);
	put_disk(disk);
}

static void ublk_stop_locked(struct ublk_device *ub)
{
	ublk_remove_disk(ub);
	spin_lock(&ub->lock);
	ub->stopped = ub->started || ub->served;
	spin_unlock(&ub->lock);
	ublk_give_back_armed(ub);
}

static void ublk_stop_in_work(struct work_struct *work)
{
	struct ublk_device *ub = container_of(work, struct ublk_device, stop_work);

	mutex_lock(&ub->mutex);
	ublk_stop_locked(ub);
	WRITE_ONCE(ub->stops, ub->stops + 1);
	mutex_unlock(&ub->mutex);
	wake_up_all(&ub->wait);
	ublk_put(ub);
}

/* Also under ub->lock. */
void ublk_begin_stop(struct ublk_device *ub)
{
	ublk_queue_work(ub, ublk_stop_wq, &ub->stop_work);
}

/*
 * The end of a disk waits for the requests that its server has, and the caller
 * may be that server, or be given up by its user: it can be killed while the
 * work goes on.
 */
int ublk_stop(struct ublk_device *ub)
{
	unsigned int before = READ_ONCE(ub->stops);

	ublk_begin_stop(ub);
	return wait_event_killable(ub->wait, READ_ONCE(ub->stops) != before) ? -EINTR : 0;
}

int ublk_try_stop(struct ublk_device *ub)
{
	struct gendisk *disk;
	int err = 0;

	if (mutex_lock_interruptible(&ub->mutex))
		return -EINTR;
	disk = ub->disk;
	if (!disk) {
		err = -ENODEV;
		goto unlock;
	}
	/* openers come and go under open_mutex, see ublk_blk_open() */
	if (mutex_lock_interruptible(&disk->open_mutex)) {
		err = -EINTR;
		goto unlock;
	}
	if (disk_openers(disk))
		err = -EBUSY;
	else
		ub->no_open = true;
	mutex_unlock(&disk->open_mutex);
unlock:
	mutex_unlock(&ub->mutex);
	return err ? err : ublk_stop(ub);
}

int ublk_update_size(struct ublk_device *ub, u64 sectors)
{
	int err = 0;

	if (sectors > (LLONG_MAX >> SECTOR_SHIFT))
		return -EINVAL;
	if (mutex_lock_interruptible(&ub->mutex))
		return -EINTR;
	if (ublk_has(ub, UBLK_F_ZONED)) {
		/* the block layer's account of zones would lag behind */
		err = -EOPNOTSUPP;
	} else if (ub->disk) {
		ub->params.basic.dev_sectors = sectors;
		set_capacity_and_notify(ub->disk, sectors);
	} else {
		err = -ENODEV;
	}
	mutex_unlock(&ub->mutex);
	return err;
}

/* The device goes when its last user does. */
int ublk_delete(struct ublk_device *ub)
{
	bool first;
	int err = ublk_stop(ub);

	if (err)
		return err;
	if (mutex_lock_interruptible(&ub->mutex))
		return -EINTR;
	/* of a disk that was started in between */
	ublk_stop_locked(ub);
	mutex_lock(&ublk_devices_mutex);
	first = !ub->deleted;
	WRITE_ONCE(ub->deleted, true);
	if (first && ub->unprivileged_counted)
		ublk_unprivileged--;
	mutex_unlock(&ublk_devices_mutex);
	mutex_unlock(&ub->mutex);
	if (!first)
		return 0;
	wake_up_all(&ub->wait);
	cdev_device_del(&ub->cdev, &ub->dev);
	ublk_put(ub);
	/* the caller came through our control file, so this is not the module's last reference */
	module_put(THIS_MODULE);
	return 0;
}
