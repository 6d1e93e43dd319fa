/* SPDX-License-Identifier: Apache-2.0 */
/* Queues that end early: with requests unanswered, with I/O under way, again and again. */
#include <dirent.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#include "fake.h"
#include "ramdisk.h"
#include "stats.h"

enum { DEPTH = 16 };

static unsigned entries(const char *path)
{
	DIR *d = opendir(path);
	unsigned n = 0;

	CHECK(d);
	while (readdir(d))
		n++;
	closedir(d);
	return n;
}

/* Kilobytes of address space. The sanitizer's own grow with time; a leak here would be a buffer per round. */
static unsigned long address_space(void)
{
	unsigned long pages;
	FILE *f = fopen("/proc/self/statm", "re");

	CHECK(f && fscanf(f, "%lu", &pages) == 1);
	fclose(f);
	return pages * (unsigned long)sysconf(_SC_PAGESIZE) / 1024;
}

/* Run until every tag has its request, then leave: the wake descriptor is written to with the last. */
static void wake_at_last(struct fake *f, struct fake_request *r)
{
	const uint64_t one = 1;

	if (r == &f->requests[f->nr_requests - 1])
		CHECK_EQ(write(f->p.wake_fd, &one, sizeof(one)), sizeof(one));
}

static void leave_behind(struct ublkd_target *target, const struct ublkd_transport *tp, struct fake_request what,
			 int wake_fd)
{
	struct fake_request reqs[DEPTH];
	struct fake *f = fake_new(1 << 20);
	void *buffers;

	for (int i = 0; i < DEPTH; i++)
		reqs[i] = what;
	f->p.depth = DEPTH;
	f->p.wake_fd = wake_fd;
	f->hold = true;
	f->on_deliver = wake_at_last;
	CHECK_EQ(fake_open(f, tp, target), 0);
	f->requests = reqs;
	f->nr_requests = DEPTH;
	CHECK_EQ(ublkd_queue_run(f->q), UBLKD_RUN_WAKE);
	CHECK(reqs[DEPTH - 1].delivered);
	/* A discard may be done already; a read from an empty pipe is not. */
	buffers = what.op == UBLKD_OP_READ ? f->q->buffers.base : NULL;
	if (buffers)
		CHECK_EQ(f->q->targets_inflight, DEPTH);
	fake_close(f);
	/* What the kernel may yet write to is still there. */
	if (buffers)
		CHECK_SYS(msync(buffers, 4096, MS_ASYNC));
	fake_free(f);
}

static void test_loop_in_flight(const struct ublkd_transport *tp)
{
	int fds[2];
	struct ublkd_loop_config config;
	struct ublkd_target *target;
	struct fake_request read = { .op = UBLKD_OP_READ, .sectors = 8 };
	const int wake_fd = (int)CHECK_SYS(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));

	/* Reads from an empty pipe wait for as long as one likes. */
	CHECK_SYS(pipe2(fds, O_CLOEXEC));
	config = (struct ublkd_loop_config){ .fd = fds[0] };
	CHECK_EQ(ublkd_loop_create(&config, &target), 0);
	leave_behind(target, tp, read, wake_fd);
	/* The target is good for another queue. */
	leave_behind(target, tp, read, wake_fd);
	ublkd_target_destroy(target);
	close(fds[0]);
	close(fds[1]);
	close(wake_fd);
}

static void test_memory_in_flight(const struct ublkd_transport *tp)
{
	struct ramdisk d = ramdisk_new(1 << 20, -1);
	struct fake_request discard = { .op = UBLKD_OP_DISCARD, .sectors = 2048 };
	const int wake_fd = (int)CHECK_SYS(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));

	leave_behind(d.target, tp, discard, wake_fd);
	ramdisk_free(&d);
	close(wake_fd);
}

/* Never run at all. */
static void test_unused(void)
{
	struct ublkd_null_config config = { 0 };
	struct ublkd_target *target;
	struct fake *f = fake_new(1 << 20);

	f->p.depth = DEPTH;
	f->p.max_io_bytes = 4 << 20;
	CHECK_EQ(ublkd_null_create(&config, &target), 0);
	CHECK_EQ(fake_open(f, &fake_copy, target), 0);
	fake_close(f);
	ublkd_target_destroy(target);
	fake_free(f);
}

static void round_of_all(void)
{
	test_unused();
	test_loop_in_flight(&fake_copy);
	test_loop_in_flight(&fake_user_copy);
	test_memory_in_flight(&fake_copy);
	test_memory_in_flight(&fake_user_copy);
}

int main(void)
{
	unsigned fds;
	unsigned long kib;

	round_of_all(); /* what is made once is there now */
	fds = entries("/proc/self/fd");
	kib = address_space();
	for (int i = 0; i < 20; i++)
		round_of_all();
	CHECK_EQ(entries("/proc/self/fd"), fds);
	/* 64 MiB of buffers in each round are given back; 4 MiB are left to I/O under way. */
	if (address_space() > kib + (200 << 10))
		check_failed(__FILE__, __LINE__, "20 rounds took %lu KiB", address_space() - kib);
	return 0;
}
