/* SPDX-License-Identifier: Apache-2.0 */
#include "fake.h"

static char data[64 << 10];

static void serve(const struct ublkd_transport *tp, int zero_reads, struct fake_request *reqs, unsigned n)
{
	struct ublkd_null_config config = { .zero_reads = zero_reads };
	struct ublkd_target *target;
	struct fake *f = fake_new(8ull << 30);

	CHECK_EQ(ublkd_null_create(&config, &target), 0);
	fake_serve(f, tp, target, reqs, n);
	ublkd_target_destroy(target);
	fake_free(f);
}

static void test_reads(const struct ublkd_transport *tp)
{
	struct fake_request read = { .op = UBLKD_OP_READ, .sectors = sizeof(data) >> 9, .data = data };
	struct fake_request again = read;

	memset(data, 1, sizeof(data));
	serve(tp, 1, &read, 1);
	CHECK_EQ(read.result, sizeof(data));
	CHECK(all_bytes(data, sizeof(data), 0));

	/* Asked not to, it leaves the memory alone. */
	serve(tp, 0, &again, 1);
	CHECK_EQ(again.result, sizeof(data));
	CHECK(all_bytes(data, sizeof(data), FAKE_JUNK));
}

static void test_others(const struct ublkd_transport *tp)
{
	struct fake_request reqs[] = {
		{ .op = UBLKD_OP_WRITE, .sectors = 128 },
		{ .op = UBLKD_OP_WRITE, .sectors = 1, .flags = UBLKD_RQ_FUA },
		{ .op = UBLKD_OP_FLUSH },
		{ .op = UBLKD_OP_DISCARD, .sectors = 8 },
		{ .op = UBLKD_OP_WRITE_ZEROES, .sectors = 8, .flags = UBLKD_RQ_NOUNMAP },
		/* Longer than a result can count. */
		{ .op = UBLKD_OP_DISCARD, .sectors = 3u << 21 },
		{ .op = UBLKD_OP_WRITE_ZEROES, .sectors = (4u << 21) - 1 },
	};

	serve(tp, 1, reqs, sizeof(reqs) / sizeof(reqs[0]));
	CHECK_EQ(reqs[0].result, 64 << 10);
	CHECK_EQ(reqs[1].result, 512);
	for (unsigned i = 2; i < sizeof(reqs) / sizeof(reqs[0]); i++)
		CHECK_EQ(reqs[i].result, 0);
}

int main(void)
{
	test_reads(&fake_copy);
	test_reads(&fake_user_copy);
	test_others(&fake_copy);
	test_others(&fake_user_copy);
	return 0;
}
