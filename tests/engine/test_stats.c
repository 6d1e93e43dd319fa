/* SPDX-License-Identifier: Apache-2.0 */
/* The histogram's buckets, the counters, and their place in the segment. */
#include <unistd.h>

#include "fake.h"
#include "stats.h"

/* layout.h in other words: where does bucket i begin? */
static uint64_t bucket_low(unsigned i)
{
	return i == 0 ? 0 : (uint64_t)(4 + (i - 1) % 4) << (8 + (i - 1) / 4);
}

static void test_buckets(void)
{
	const unsigned last = UBLKD_SHM_HIST_BUCKETS - 1;

	for (unsigned i = 0; i <= last; i++) {
		CHECK_EQ(ublkd_stat_bucket(bucket_low(i)), i);
		CHECK_EQ(ublkd_stat_bucket(bucket_low(i + 1) - 1), i);
	}
	CHECK_EQ(ublkd_stat_bucket(bucket_low(last + 1)), last);
	CHECK_EQ(ublkd_stat_bucket(UINT64_MAX), last);
	CHECK_EQ(ublkd_stat_bucket(UINT64_MAX >> 1), last);
}

static uint64_t hist_sum(const struct ublkd_shm_counters *c)
{
	uint64_t sum = 0;

	for (unsigned i = 0; i < UBLKD_SHM_HIST_BUCKETS; i++)
		sum += c->hist[i];
	return sum;
}

static void check_counters(const struct ublkd_shm_counters *c, uint64_t ios, uint64_t bytes, uint64_t errors)
{
	CHECK_EQ(c->ios, ios);
	CHECK_EQ(c->bytes, bytes);
	CHECK_EQ(c->errors, errors);
	CHECK_EQ(hist_sum(c), ios);
	CHECK((c->lat_ns > 0) == (ios > 0));
}

static const struct ublkd_null_config null_config = { .zero_reads = 1 };

static void test_segment(void)
{
	enum { QUEUES = 3, QID = 1 };
	const size_t bytes = UBLKD_SHM_HEADER_BYTES + QUEUES * sizeof(struct ublkd_shm_queue);
	struct ublkd_shm_header *header = aligned_alloc(4096, (bytes + 4095) & ~4095ul);
	struct fake_request reqs[] = {
		{ .op = UBLKD_OP_READ, .sectors = 8 },
		{ .op = UBLKD_OP_READ, .sectors = 16, .sector = 8 },
		{ .op = UBLKD_OP_READ, .sectors = 8, .sector = 1 << 20 }, /* out of range */
		{ .op = UBLKD_OP_WRITE, .sectors = 8 },
		{ .op = UBLKD_OP_WRITE, .sectors = 8, .flags = UBLKD_RQ_FUA },
		{ .op = UBLKD_OP_FLUSH },
		{ .op = UBLKD_OP_DISCARD, .sectors = 64 },
		{ .op = UBLKD_OP_WRITE_ZEROES, .sectors = 32 },
		{ .op = 200, .sectors = 8 },
	};
	enum { N = sizeof(reqs) / sizeof(reqs[0]) };
	struct ublkd_shm_queue *slots, zero;
	struct ublkd_target *target;
	struct fake *f = fake_new(0); /* not what counts where there is a segment */

	CHECK(header);
	memset(header, 0, bytes);
	memset(&zero, 0, sizeof(zero));
	*header = (struct ublkd_shm_header){
		.magic = UBLKD_SHM_MAGIC,
		.version = UBLKD_SHM_VERSION,
		.header_bytes = UBLKD_SHM_HEADER_BYTES,
		.slot_bytes = sizeof(struct ublkd_shm_queue),
		.nr_slots = QUEUES,
		.dev_bytes = 1 << 20,
	};
	slots = (struct ublkd_shm_queue *)((char *)header + UBLKD_SHM_HEADER_BYTES);
	f->p.shm = header;
	f->p.qid = QID;
	f->p.depth = 2;
	CHECK_EQ(ublkd_null_create(&null_config, &target), 0);
	fake_serve(f, &fake_copy, target, reqs, N);

	CHECK(!memcmp(&slots[0], &zero, sizeof(zero)));
	CHECK(!memcmp(&slots[2], &zero, sizeof(zero)));
	CHECK_EQ(slots[QID].pid, getpid());
	CHECK_EQ(slots[QID].started, N);
	CHECK_EQ(slots[QID].completed, N);
	CHECK_EQ(slots[QID].fua, 1);
	CHECK_EQ(slots[QID].run_returns, 1);
	CHECK_EQ(slots[QID].python_entries, 0);
	CHECK(slots[QID].passes > 0);
	CHECK_EQ(f->flushes, slots[QID].passes);
	CHECK(slots[QID].heartbeat_ns > 0 && slots[QID].heartbeat_ns <= ublkd_now_ns());
	check_counters(&slots[QID].op[UBLKD_SHM_READ], 3, (8 + 16 + 8) * 512, 1);
	check_counters(&slots[QID].op[UBLKD_SHM_WRITE], 2, 16 * 512, 0);
	check_counters(&slots[QID].op[UBLKD_SHM_FLUSH], 1, 0, 0);
	check_counters(&slots[QID].op[UBLKD_SHM_DISCARD], 1, 64 * 512, 0);
	check_counters(&slots[QID].op[UBLKD_SHM_WRITE_ZEROES], 1, 32 * 512, 0);
	check_counters(&slots[QID].op[UBLKD_SHM_OTHER], 1, 8 * 512, 1);

	ublkd_target_destroy(target);
	free(header);
	fake_free(f);
}

/* Workers that share a queue: each has its tags, and a slot of its own. */
static void test_shares(void)
{
	enum { DEPTH = 7, SHARES = 3, N = 100 };
	const size_t bytes = UBLKD_SHM_HEADER_BYTES + 2 * SHARES * sizeof(struct ublkd_shm_queue);
	struct ublkd_shm_header *header = aligned_alloc(4096, (bytes + 4095) & ~4095ul);
	struct ublkd_shm_queue *slots;
	struct fake_request reqs[N];

	CHECK(header);
	memset(header, 0, bytes);
	*header = (struct ublkd_shm_header){
		.magic = UBLKD_SHM_MAGIC,
		.version = UBLKD_SHM_VERSION,
		.header_bytes = UBLKD_SHM_HEADER_BYTES,
		.slot_bytes = sizeof(struct ublkd_shm_queue),
		.nr_slots = 2 * SHARES,
		.dev_bytes = 1 << 20,
		.shares = SHARES,
	};
	slots = (struct ublkd_shm_queue *)((char *)header + UBLKD_SHM_HEADER_BYTES);
	for (uint16_t share = 0; share < SHARES; share++) {
		struct ublkd_target *target;
		struct fake *f = fake_new(0);

		for (int i = 0; i < N; i++)
			reqs[i] = (struct fake_request){ .op = UBLKD_OP_READ, .sectors = 8 };
		f->p.shm = header;
		f->p.qid = 1;
		f->p.depth = DEPTH;
		f->p.share = share;
		f->p.shares = SHARES;
		CHECK_EQ(ublkd_null_create(&null_config, &target), 0);
		CHECK_EQ(fake_open(f, &fake_copy, target), 0);
		CHECK_EQ(fake_run(f, reqs, N), UBLKD_RUN_DONE);
		for (int tag = 0; tag < DEPTH; tag++)
			CHECK((f->q->ios[tag].start_ns != 0) == (tag % SHARES == share));
		CHECK_EQ(slots[SHARES + share].completed, N);
		fake_close(f);
		ublkd_target_destroy(target);
		fake_free(f);
	}
	for (int slot = 0; slot < SHARES; slot++)
		CHECK_EQ(slots[slot].completed, 0);
	free(header);
}

static void test_bad_shares(void)
{
	static const struct {
		uint16_t share, shares;
	} bad[] = { { 2, 2 }, { 0, 5 } };
	struct ublkd_target *target;
	struct fake *f = fake_new(1 << 20);

	CHECK_EQ(ublkd_null_create(&null_config, &target), 0);
	f->p.depth = 4;
	for (int i = 0; i < 2; i++) {
		f->p.share = bad[i].share;
		f->p.shares = bad[i].shares;
		CHECK_EQ(fake_open(f, &fake_copy, target), -EINVAL);
		CHECK(strstr(ublkd_last_error(), "share"));
	}
	/* The driver brings batches of any tag. */
	f->p.share = 0;
	f->p.shares = 2;
	CHECK_EQ(fake_open(f, &ublkd_transport_batch_user_copy, target), 0);
	CHECK_EQ(ublkd_queue_fetch(f->q), -EINVAL);
	fake_close(f);
	ublkd_target_destroy(target);
	fake_free(f);
}

/* The device grows and shrinks while the queue runs: the next request is checked against the new size. */
static void resize(struct fake *f, struct fake_request *r)
{
	struct ublkd_shm_header *header = f->p.shm;

	header->dev_bytes = r == &f->requests[1] ? 64 << 10 : r == &f->requests[2] ? 8 << 10 : 16 << 10;
}

static void test_resize(void)
{
	struct ublkd_shm_header *header = aligned_alloc(4096, 8192 + 4096);
	struct fake_request reqs[3];
	struct ublkd_target *target;
	struct fake *f = fake_new(0);

	CHECK(header);
	memset(header, 0, 8192 + 4096);
	*header = (struct ublkd_shm_header){
		.magic = UBLKD_SHM_MAGIC,
		.version = UBLKD_SHM_VERSION,
		.header_bytes = UBLKD_SHM_HEADER_BYTES,
		.slot_bytes = sizeof(struct ublkd_shm_queue),
		.nr_slots = 1,
	};
	for (int i = 0; i < 3; i++)
		reqs[i] = (struct fake_request){ .op = UBLKD_OP_READ, .sector = 31, .sectors = 8 };
	f->p.shm = header;
	f->on_deliver = resize;
	CHECK_EQ(ublkd_null_create(&null_config, &target), 0);
	fake_serve(f, &fake_copy, target, reqs, 3);
	CHECK_EQ(reqs[0].result, -EIO);
	CHECK_EQ(reqs[1].result, 4096);
	CHECK_EQ(reqs[2].result, -EIO);
	ublkd_target_destroy(target);
	free(header);
	fake_free(f);
}

static void test_foreign_segment(void)
{
	struct ublkd_shm_header header = {
		.magic = UBLKD_SHM_MAGIC,
		.version = UBLKD_SHM_VERSION,
		.header_bytes = UBLKD_SHM_HEADER_BYTES,
		.slot_bytes = sizeof(struct ublkd_shm_queue),
		.nr_slots = 2,
	};
	struct ublkd_shm_header bad[4] = { header, header, header, header };
	struct ublkd_target *target;
	struct fake *f = fake_new(1 << 20);

	bad[0].magic++;
	bad[1].version++;
	bad[2].slot_bytes -= 8;
	bad[3].nr_slots = 1; /* ours is queue 1 */
	CHECK_EQ(ublkd_null_create(&null_config, &target), 0);
	f->p.qid = 1;
	for (int i = 0; i < 4; i++) {
		f->p.shm = &bad[i];
		CHECK_EQ(fake_open(f, &fake_copy, target), -EINVAL);
		CHECK(strstr(ublkd_last_error(), "statistics segment"));
	}
	ublkd_target_destroy(target);
	fake_free(f);
}

int main(void)
{
	test_buckets();
	test_segment();
	test_shares();
	test_bad_shares();
	test_resize();
	test_foreign_segment();
	return 0;
}
