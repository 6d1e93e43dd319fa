/* SPDX-License-Identifier: Apache-2.0 */
/* Commands for many tags at once: what they may look like, and what becomes of a driver that does not do as told. */
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fake.h"

enum { N = 1000 };

static struct ublkd_target *null_target(void)
{
	struct ublkd_null_config config = { 0 };
	struct ublkd_target *target;

	CHECK_EQ(ublkd_null_create(&config, &target), 0);
	return target;
}

static struct fake_request *writes(void)
{
	struct fake_request *reqs = calloc(N, sizeof(*reqs));

	CHECK(reqs);
	for (int i = 0; i < N; i++)
		reqs[i] = (struct fake_request){ .op = UBLKD_OP_WRITE, .sectors = 8 };
	return reqs;
}

/* Serve N writes with what is set in f; the result of the run. */
static int serve(struct fake *f, struct fake_request *reqs)
{
	struct ublkd_target *target = null_target();
	int ret;

	CHECK_EQ(fake_open(f, &ublkd_transport_batch_user_copy, target), 0);
	ret = fake_run(f, reqs, N);
	fake_close(f);
	ublkd_target_destroy(target);
	return ret;
}

static void test_depth(uint16_t depth)
{
	struct ublkd_target *target = null_target();
	struct fake_request *reqs = writes();
	struct fake *f = fake_new(1 << 20);

	f->p.depth = depth;
	fake_serve(f, &ublkd_transport_batch_user_copy, target, reqs, N);
	CHECK_EQ(f->batch.preps, 1);
	CHECK_EQ(f->batch.fetches, 1);
	CHECK(f->batch.most_commit == (depth < 60 ? depth : 60));
	ublkd_target_destroy(target);
	free(reqs);
	fake_free(f);
}

/* There are more requests than buffers: the rest comes with the next FETCH. */
static void test_starved(void)
{
	struct ublkd_target *target = null_target();
	struct fake_request *reqs = writes();
	struct fake *f = fake_new(1 << 20);

	f->p.depth = 500;
	f->batch.one_by_one = true;
	fake_serve(f, &ublkd_transport_batch_user_copy, target, reqs, N);
	CHECK(f->batch.starved > 0);
	CHECK_EQ(f->batch.fetches, f->batch.starved + 1);
	ublkd_target_destroy(target);
	free(reqs);
	fake_free(f);
}

/* Errors end the queue with what the driver said, and a line on it. */
static void test_errors(void)
{
	static const struct {
		int prep, commit, fetch;
		const char *line;
	} cases[] = {
		{ .prep = -EINVAL, .line = "did not take the tags" },
		{ .commit = -EBUSY, .line = "did not take answers" },
		{ .fetch = -EINVAL, .line = "ended the fetching" },
		{ .fetch = -ENOBUFS, .line = "ended the fetching" }, /* once would be none */
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct fake_request *reqs = writes();
		struct fake *f = fake_new(1 << 20);

		f->p.depth = 4;
		f->batch.prep_error = cases[i].prep;
		f->batch.commit_error = cases[i].commit;
		f->batch.fetch_error = cases[i].fetch;
		CHECK_EQ(serve(f, reqs), cases[i].prep + cases[i].commit + cases[i].fetch);
		CHECK(strstr(ublkd_last_error(), cases[i].line));
		free(reqs);
		fake_free(f);
	}
}

/* Tags that there are not, or that are in use, reach nobody. */
static void test_false_tags(void)
{
	static const uint16_t beyond[] = { 4 }, far[] = { 0xffff }, twice[] = { 1, 1 };
	static const struct {
		const uint16_t *tags;
		unsigned n;
	} cases[] = { { beyond, 1 }, { far, 1 }, { twice, 2 } };

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct fake_request *reqs = writes();
		struct fake *f = fake_new(1 << 20);

		f->p.depth = 4;
		f->batch.false_tags = cases[i].tags;
		f->batch.nr_false_tags = cases[i].n;
		CHECK_EQ(serve(f, reqs), -EPROTO);
		free(reqs);
		fake_free(f);
	}
}

/* The driver gives no more out while the target has requests: they are answered, and then all is over. */
static void test_gone_with_requests_in_hand(void)
{
	struct ublkd_loop_config config = { 0 };
	struct ublkd_target *target;
	struct fake_request reqs[64] = { 0 };
	struct fake *f = fake_new(1 << 20);
	static char data[4096];
	unsigned answered = 0;

	config.fd = (int)CHECK_SYS(memfd_create("backing", MFD_CLOEXEC));
	CHECK_SYS(ftruncate(config.fd, 1 << 20));
	for (int i = 0; i < 64; i++)
		reqs[i] = (struct fake_request){ .op = UBLKD_OP_WRITE, .sectors = 8, .data = data };
	f->p.depth = 32;
	f->batch.stop_after = 50;
	CHECK_EQ(ublkd_loop_create(&config, &target), 0);
	CHECK_EQ(fake_open(f, &ublkd_transport_batch_zero_copy, target), 0);
	CHECK_EQ(fake_run(f, reqs, 64), UBLKD_RUN_DONE);
	for (int i = 0; i < 64; i++) {
		CHECK(reqs[i].answers <= 1);
		CHECK(!reqs[i].answers || reqs[i].result == 4096);
		answered += reqs[i].answers;
	}
	CHECK_EQ(answered, 50);
	CHECK_EQ(f->q->live, 0);
	fake_close(f);
	ublkd_target_destroy(target);
	close(config.fd);
	fake_free(f);
}

/* Where a process that we fork has its lists of tags. */
static uintptr_t place_in_child(void)
{
	struct fake *f = fake_new(1 << 20);
	struct ublkd_target *target = null_target();
	uintptr_t place;
	int fds[2], status;
	pid_t pid;

	CHECK_SYS(pipe(fds));
	pid = (pid_t)CHECK_SYS(fork());
	if (!pid) {
		if (fake_open(f, &ublkd_transport_batch_user_copy, target) < 0 || ublkd_queue_fetch(f->q) < 0)
			_exit(1);
		place = (uintptr_t)f->batch.ring->bufs[0].addr;
		_exit(write(fds[1], &place, sizeof(place)) != sizeof(place));
	}
	CHECK_EQ(read(fds[0], &place, sizeof(place)), sizeof(place));
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
	close(fds[0]);
	close(fds[1]);
	ublkd_target_destroy(target);
	fake_free(f);
	return place;
}

/* A kernel thread may write there when the process has ended, whoever's memory it then has before it. */
static void test_places_of_lists(void)
{
	const uintptr_t one = place_in_child(), two = place_in_child();
	void *usual = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(usual != MAP_FAILED);
	CHECK(one != two);
	/* Nor near to what programs have by themselves. */
	CHECK((one ^ (uintptr_t)usual) >> 40 && (one ^ (uintptr_t)malloc) >> 40);
	munmap(usual, 4096);
}

int main(void)
{
	static const uint16_t depths[] = { 1, 2, 3, 59, 60, 61, 64, 128, 129, 1000, 4096 };

	for (size_t i = 0; i < sizeof(depths) / sizeof(depths[0]); i++)
		test_depth(depths[i]);
	test_starved();
	test_errors();
	test_false_tags();
	test_gone_with_requests_in_hand();
	test_places_of_lists();
	return 0;
}
