// SPDX-License-Identifier: GPL-2.0-only
/*
 * Bugs made on purpose, one per load: whether a debug kernel reports them.
 * See provoke.sh. The module never stays.
 */
#include <linux/delay.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/timer.h>

static char *bug = "";
module_param(bug, charp, 0);

static DEFINE_SPINLOCK(spin);
static DEFINE_MUTEX(first);
static DEFINE_MUTEX(second);

static void sleeps_under_a_spinlock(void)
{
	spin_lock(&spin);
	might_sleep();
	spin_unlock(&spin);
}

static void deletes_twice(void)
{
	LIST_HEAD(entry);

	list_del(&entry);
	list_del(&entry);
}

static void nothing(struct timer_list *timer)
{
}

static void frees_a_timer_that_runs(void)
{
	struct timer_list *timer = kmalloc(sizeof(*timer), GFP_KERNEL);

	if (!timer)
		return;
	timer_setup(timer, nothing, 0);
	mod_timer(timer, jiffies + 1000 * HZ);
	kfree(timer);
}

static void locks_in_both_orders(void)
{
	mutex_lock(&first);
	mutex_lock(&second);
	mutex_unlock(&second);
	mutex_unlock(&first);
	mutex_lock(&second);
	mutex_lock(&first);
	mutex_unlock(&first);
	mutex_unlock(&second);
}

static void waits_for_nothing(void)
{
	set_current_state(TASK_UNINTERRUPTIBLE);
	schedule_timeout(15 * HZ);
}

static void forgets_memory(void)
{
	void *volatile memory = kmalloc(100, GFP_KERNEL);

	memory = NULL;
}

static void reads_what_it_freed(void)
{
	volatile char *memory = kmalloc(100, GFP_KERNEL);

	kfree((void *)memory);
	if (memory)
		(void)memory[10];
}

static const struct {
	const char *name;
	void (*make)(void);
} bugs[] = {
	{ "sleep", sleeps_under_a_spinlock },
	{ "list", deletes_twice },
	{ "object", frees_a_timer_that_runs },
	{ "lock", locks_in_both_orders },
	{ "hang", waits_for_nothing },
	{ "leak", forgets_memory },
	{ "free", reads_what_it_freed },
};

static int __init bugs_init(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(bugs); i++) {
		if (!strcmp(bug, bugs[i].name)) {
			bugs[i].make();
			return -ECANCELED;
		}
	}
	return -EINVAL;
}

module_init(bugs_init);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Bugs on purpose");
