/* SPDX-License-Identifier: Apache-2.0 */
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine.h"
#include "error.h"

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

/*
 * The scheduler's own choice goes up with the number of CPUs, from 0.7 ms to 2.8 at 8. With the short one the tasks of
 * our CPU take turns in the middle of a queue's worth of requests. Before Linux 6.12 it is ignored.
 */
#define SLICE_NS 3000000

void ublkd_set_title(const char *title)
{
	unsigned long start = 0, end = 0;
	char stat[2048];
	const char *p;
	size_t n;
	FILE *f;

	prctl(PR_SET_NAME, title, 0, 0, 0);
	f = fopen("/proc/self/stat", "re");
	if (!f)
		return;
	n = fread(stat, 1, sizeof(stat) - 1, f);
	fclose(f);
	stat[n] = '\0';
	/* Fields are counted from behind the name, which may hold anything: arg_start and arg_end are 48 and 49. */
	p = strrchr(stat, ')');
	for (int field = 2; p && field < 48; field++)
		p = strchr(p + 1, ' ');
	if (!p || sscanf(p, " %lu %lu", &start, &end) != 2 || end <= start + 1)
		return;
	memset((void *)start, 0, end - start);
	snprintf((char *)start, end - start, "%s", title);
}

int ublkd_die_with_parent(int parent_pid)
{
	if (prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) < 0)
		return ublkd_error(-errno, "prctl(PR_SET_PDEATHSIG): %s", strerror(errno));
	/* It may have died before the call. */
	if (getppid() != parent_pid)
		return ublkd_error(-ESRCH, "the supervisor is gone");
	return 0;
}

int ublkd_outlive_parent(void)
{
	if (prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0) < 0)
		return ublkd_error(-errno, "prctl(PR_SET_PDEATHSIG): %s", strerror(errno));
	return 0;
}

int ublkd_adopt_orphans(void)
{
	if (prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0)
		return ublkd_error(-errno, "prctl(PR_SET_CHILD_SUBREAPER): %s", strerror(errno));
	return 0;
}

int ublkd_be_io_flusher(void)
{
	if (prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) < 0)
		return ublkd_error(-errno, "prctl(PR_SET_IO_FLUSHER): %s", strerror(errno));
	return 0;
}

int ublkd_be_batch_task(void)
{
	/* struct sched_attr, whose header does not go together with the C library's. */
	struct {
		uint32_t size, policy;
		uint64_t flags;
		int32_t nice;
		uint32_t priority;
		uint64_t runtime, deadline, period;
	} attr = { .size = sizeof(attr), .policy = SCHED_BATCH, .runtime = SLICE_NS };

	if (syscall(SYS_sched_setattr, 0, &attr, 0) < 0)
		return ublkd_error(-errno, "sched_setattr: %s", strerror(errno));
	return 0;
}

int ublkd_private_mounts(void)
{
	if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) < 0)
		return ublkd_error(-errno, "cannot have a mount namespace of our own: %s", strerror(errno));
	return 0;
}

int ublkd_detach_mount(const char *path)
{
	if (umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW) < 0)
		return ublkd_error(-errno, "cannot detach %s: %s", path, strerror(errno));
	return 0;
}
