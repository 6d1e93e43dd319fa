// SPDX-License-Identifier: GPL-2.0-only
/*
 * ublk for kernels that lack it, or lack much of it: init, exit, parameters.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/miscdevice.h>
#include <linux/module.h>

#include "driver.h"

struct workqueue_struct *ublk_wq;
struct workqueue_struct *ublk_stop_wq;	/* what waits for servers, so that nothing else waits for its turn */
dev_t ublk_devt;

unsigned int ublk_max_unprivileged = 64;
module_param_named(ublks_max, ublk_max_unprivileged, uint, 0644);
MODULE_PARM_DESC(ublks_max, "devices that users without CAP_SYS_ADMIN may add, together (default 64)");

unsigned int ublk_default_timeout;
module_param_named(io_timeout, ublk_default_timeout, uint, 0644);
MODULE_PARM_DESC(io_timeout, "seconds after which a server that does not answer is killed (default 0: never); "
			     "of devices added from then on, see also /sys/class/ublk-char/ublkcN/io_timeout");

static ssize_t io_timeout_show(struct device *dev, struct device_attribute *attr, char *buf)
{
	struct ublk_device *ub = container_of(dev, struct ublk_device, dev);

	return sysfs_emit(buf, "%u\n", READ_ONCE(ub->io_timeout));
}

/* Of disks that start from then on. */
static ssize_t io_timeout_store(struct device *dev, struct device_attribute *attr, const char *buf,
				size_t count)
{
	struct ublk_device *ub = container_of(dev, struct ublk_device, dev);
	unsigned int seconds;
	int err = kstrtouint(buf, 0, &seconds);

	if (err)
		return err;
	if (seconds > INT_MAX / HZ)
		return -ERANGE;
	WRITE_ONCE(ub->io_timeout, seconds);
	return count;
}

static DEVICE_ATTR_RW(io_timeout);

static struct attribute *ublk_attrs[] = {
	&dev_attr_io_timeout.attr,
	NULL,
};
ATTRIBUTE_GROUPS(ublk);

struct class ublk_class = {
	.name = "ublk-char",
	.dev_groups = ublk_groups,
};

static const struct file_operations ublk_control_fops = {
	.owner = THIS_MODULE,
	.open = nonseekable_open,
	.uring_cmd = ublk_control_command,
};

static struct miscdevice ublk_control_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "ublk-control",
	.fops = &ublk_control_fops,
};

static const struct file_operations ublk_probe_fops = {
	.owner = THIS_MODULE,
	.open = nonseekable_open,
};

/*
 * Is the kernel's own driver loaded? To register its names a second time would
 * fail with a stack trace. The class in which its device would be found isn't
 * exported, but any device of that class leads to it.
 */
static int ublk_check_alone(void)
{
	struct miscdevice probe = {
		.minor = MISC_DYNAMIC_MINOR,
		.name = KBUILD_MODNAME "-probe",
		.fops = &ublk_probe_fops,
	};
	struct device *other;
	int err = misc_register(&probe);

	if (err)
		return err;
	other = class_find_device_by_name(probe.this_device->class, ublk_control_device.name);
	misc_deregister(&probe);
	if (!other)
		return 0;
	put_device(other);
	/* not EEXIST, which to modprobe means that this module is loaded */
	pr_err("the kernel's own driver, ublk_drv, is loaded: stop its devices, `modprobe -r ublk_drv`, then load this one\n");
	return -EBUSY;
}

static int __init ublk_load(void)
{
	int err;

	err = ublk_check_alone();
	if (err)
		return err;
	ublk_wq = alloc_workqueue("ublkd", WQ_UNBOUND | WQ_MEM_RECLAIM, 0);
	if (!ublk_wq)
		return -ENOMEM;
	err = -ENOMEM;
	ublk_stop_wq = alloc_workqueue("ublkd_stop", WQ_UNBOUND, 0);
	if (!ublk_stop_wq)
		goto free_wq;
	err = alloc_chrdev_region(&ublk_devt, 0, UBLK_MAX_DEVICES, "ublk-char");
	if (err)
		goto free_stop_wq;
	err = class_register(&ublk_class);
	if (err)
		goto free_region;
	err = misc_register(&ublk_control_device);
	if (err)
		goto free_class;
	return 0;

free_class:
	class_unregister(&ublk_class);
free_region:
	unregister_chrdev_region(ublk_devt, UBLK_MAX_DEVICES);
free_stop_wq:
	destroy_workqueue(ublk_stop_wq);
free_wq:
	destroy_workqueue(ublk_wq);
	return err;
}

/* Devices pin the module until DEL_DEV; what may still go on is the end of one that was deleted. */
static void __exit ublk_unload(void)
{
	misc_deregister(&ublk_control_device);
	ublk_wait_for_devices();
	destroy_workqueue(ublk_stop_wq);
	destroy_workqueue(ublk_wq);
	class_unregister(&ublk_class);
	unregister_chrdev_region(ublk_devt, UBLK_MAX_DEVICES);
}

module_init(ublk_load);
module_exit(ublk_unload);

#if !IS_ENABLED(CONFIG_BLK_DEV_UBLK)
/* Where the kernel has no ublk, programs that load ublk_drv get this one. */
MODULE_ALIAS("ublk_drv");
#endif
MODULE_ALIAS("devname:ublk-control");
MODULE_DESCRIPTION("Userspace block devices");
MODULE_AUTHOR("The ublkd developers");
MODULE_LICENSE("GPL");
