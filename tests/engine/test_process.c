/* SPDX-License-Identifier: Apache-2.0 */
/* What a worker does to its process. */
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "engine.h"

static void read_file(const char *path, char *buf, size_t size)
{
	FILE *f = fopen(path, "re");
	size_t n;

	CHECK(f);
	n = fread(buf, 1, size - 1, f);
	fclose(f);
	buf[n] = '\0';
}

static void test_title(void)
{
	char comm[64], cmdline[4096];

	ublkd_set_title("ublkd: 0/3");
	read_file("/proc/self/comm", comm, sizeof(comm));
	CHECK(!strcmp(comm, "ublkd: 0/3\n"));
	read_file("/proc/self/cmdline", cmdline, sizeof(cmdline));
	CHECK(!strcmp(cmdline, "ublkd: 0/3"));

	/* Longer than there is room, with what would break a reading of /proc/self/stat that stops at the first ')'. */
	ublkd_set_title("a) b) (c 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34");
	read_file("/proc/self/comm", comm, sizeof(comm));
	CHECK(!strcmp(comm, "a) b) (c 1 2 3 \n") || !strcmp(comm, "a) b) (c 1 2 3\n"));
	ublkd_set_title("again");
	read_file("/proc/self/cmdline", cmdline, sizeof(cmdline));
	CHECK(!strcmp(cmdline, "again"));
}

static void test_batch_task(void)
{
	if (ublkd_be_batch_task() < 0)
		CHECK_EQ(errno, EPERM); /* in some containers */
	else
		CHECK_EQ(sched_getscheduler(0), SCHED_BATCH);
}

/* A child waits in the pipe for the death of its parent, which dies before it could have said goodbye. */
static void test_die_with_parent(void)
{
	int fds[2], status;
	pid_t parent;
	char c;

	CHECK_EQ(ublkd_die_with_parent((int)getppid() + 1), -ESRCH);
	CHECK(strstr(ublkd_last_error(), "supervisor"));
	CHECK_SYS(prctl(PR_GET_PDEATHSIG, &status, 0, 0, 0));
	CHECK_EQ(status, SIGKILL);
	CHECK_EQ(ublkd_outlive_parent(), 0);
	CHECK_SYS(prctl(PR_GET_PDEATHSIG, &status, 0, 0, 0));
	CHECK_EQ(status, 0);

	CHECK_SYS(pipe(fds));
	parent = (pid_t)CHECK_SYS(fork());
	if (!parent) {
		const pid_t self = getpid();

		if (!fork()) {
			close(fds[0]);
			if (ublkd_die_with_parent((int)self) < 0)
				_exit(1);
			if (write(fds[1], "r", 1) != 1)
				_exit(1);
			for (;;)
				pause();
		}
		for (;;)
			pause();
	}
	close(fds[1]);
	CHECK_EQ(read(fds[0], &c, 1), 1);
	CHECK_SYS(kill(parent, SIGKILL));
	CHECK_EQ(CHECK_SYS(waitpid(parent, &status, 0)), parent);
	/* End of file: the child is gone, and its end of the pipe with it. */
	CHECK_EQ(read(fds[0], &c, 1), 0);
	close(fds[0]);
}

int main(void)
{
	CHECK(ublkd_last_error());
	test_title();
	test_batch_task();
	test_die_with_parent();
	return 0;
}
