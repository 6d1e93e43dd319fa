/* SPDX-License-Identifier: Apache-2.0 */
/* The memory target: contents, marks, and what memory it takes, whoever copies. */
#include "fake.h"
#include "ramdisk.h"

#define KIB(n) ((n) << 10)

static char out[KIB(64)], in[KIB(64)];

static struct fake_request request(uint8_t op, uint64_t offset, uint64_t bytes, void *data)
{
	return (struct fake_request){ .op = op, .sector = offset >> 9, .sectors = (uint32_t)(bytes >> 9), .data = data };
}

static int32_t ask(struct ramdisk *d, const struct ublkd_transport *tp, uint8_t op, uint64_t offset, uint64_t bytes,
		   void *data)
{
	struct fake_request r = request(op, offset, bytes, data);
	struct fake *f = fake_new(d->size);

	fake_serve(f, tp, d->target, &r, 1);
	fake_free(f);
	return r.result;
}

static void test_contents(const struct ublkd_transport *tp)
{
	struct ramdisk d = ramdisk_new(KIB(1024), -1);

	for (size_t i = 0; i < sizeof(out); i++)
		out[i] = (char)(i * 7 + i / 256);
	CHECK_EQ(ask(&d, tp, UBLKD_OP_WRITE, KIB(60), sizeof(out), out), sizeof(out));
	CHECK(!memcmp(d.base + KIB(60), out, sizeof(out)));
	CHECK_EQ(ask(&d, tp, UBLKD_OP_READ, KIB(60), sizeof(in), in), sizeof(in));
	CHECK(!memcmp(in, out, sizeof(in)));
	/* The bytes before are in a chunk that was written to, and still nothing. */
	CHECK_EQ(ask(&d, tp, UBLKD_OP_READ, 0, KIB(60), in), KIB(60));
	CHECK(all_bytes(in, KIB(60), 0));
	/* One sector in the middle. */
	CHECK_EQ(ask(&d, tp, UBLKD_OP_WRITE, KIB(70) + 512, 512, in), 512);
	CHECK(!memcmp(d.base + KIB(60), out, KIB(10) + 512));
	CHECK(all_bytes(d.base + KIB(70) + 512, 512, 0));
	CHECK(!memcmp(d.base + KIB(71), out + KIB(11), sizeof(out) - KIB(11)));
	CHECK_EQ(ask(&d, tp, UBLKD_OP_FLUSH, 0, 0, NULL), 0);
	ramdisk_free(&d);
}

static void test_marks(const struct ublkd_transport *tp)
{
	struct ramdisk d = ramdisk_new(KIB(512), -1);

	/* Across a boundary: both chunks. */
	CHECK_EQ(ask(&d, tp, UBLKD_OP_WRITE, KIB(128) - 512, 1024, out), 1024);
	for (int c = 0; c < 8; c++)
		CHECK_EQ(d.marks[c], c == 1 || c == 2);
	/* The last sector of one and nothing of the next. */
	CHECK_EQ(ask(&d, tp, UBLKD_OP_WRITE, KIB(320) - 512, 512, out), 512);
	CHECK(d.marks[4] && !d.marks[5]);
	/* A discard of a part leaves the mark, of the whole takes it. */
	CHECK_EQ(ask(&d, tp, UBLKD_OP_DISCARD, KIB(64), KIB(127), NULL), 0);
	CHECK(!d.marks[1] && d.marks[2]);
	CHECK_EQ(ask(&d, tp, UBLKD_OP_DISCARD, KIB(128) + 512, KIB(64) - 512, NULL), 0);
	CHECK(d.marks[2]);
	CHECK_EQ(ask(&d, tp, UBLKD_OP_DISCARD, KIB(128), KIB(64), NULL), 0);
	CHECK(!d.marks[2] && d.marks[4]);
	/* Refused requests leave them alone. */
	CHECK_EQ(ask(&d, tp, UBLKD_OP_WRITE, KIB(512), 512, out), -EIO);
	CHECK_EQ(ask(&d, tp, UBLKD_OP_DISCARD, KIB(256), KIB(512), NULL), -EIO);
	CHECK(d.marks[4]);
	ramdisk_free(&d);
}

static void test_usage(const struct ublkd_transport *tp)
{
	struct ramdisk d = ramdisk_new(KIB(1024) << 10, -1); /* 1 GiB */
	const uint64_t empty = ramdisk_usage(&d);
	uint64_t written;

	/* Reading what nobody wrote costs nothing, wherever it is. */
	for (uint64_t offset = 0; offset < d.size; offset += d.size / 64) {
		memset(in, 1, sizeof(in));
		CHECK_EQ(ask(&d, tp, UBLKD_OP_READ, offset, sizeof(in), in), sizeof(in));
		CHECK(all_bytes(in, sizeof(in), 0));
	}
	CHECK_EQ(ramdisk_usage(&d), empty);
	/* Nor does giving back what was never had. */
	CHECK_EQ(ask(&d, tp, UBLKD_OP_DISCARD, 0, d.size, NULL), 0);
	CHECK_EQ(ramdisk_usage(&d), empty);

	for (uint64_t offset = 0; offset < KIB(1024); offset += sizeof(out))
		CHECK_EQ(ask(&d, tp, UBLKD_OP_WRITE, offset, sizeof(out), out), sizeof(out));
	written = ramdisk_usage(&d);
	CHECK(written >= empty + KIB(1024));
	CHECK_EQ(ask(&d, tp, UBLKD_OP_DISCARD, 0, KIB(512), NULL), 0);
	CHECK(ramdisk_usage(&d) <= written - KIB(512));
	CHECK_EQ(ask(&d, tp, UBLKD_OP_WRITE_ZEROES, KIB(512), KIB(512), NULL), 0);
	CHECK_EQ(ramdisk_usage(&d), empty);
	/* And it stays given back when read. */
	CHECK_EQ(ask(&d, tp, UBLKD_OP_READ, KIB(64), sizeof(in), in), sizeof(in));
	CHECK(all_bytes(in, sizeof(in), 0));
	CHECK_EQ(ramdisk_usage(&d), empty);
	ramdisk_free(&d);
}

/* Write zeroes and discard of parts of chunks and pages; neighbours keep what they have. */
static void test_zeroes(const struct ublkd_transport *tp)
{
	struct ramdisk d = ramdisk_new(KIB(256), -1);

	memset(out, 'x', sizeof(out));
	for (uint64_t offset = 0; offset < d.size; offset += sizeof(out))
		CHECK_EQ(ask(&d, tp, UBLKD_OP_WRITE, offset, sizeof(out), out), sizeof(out));
	CHECK_EQ(ask(&d, tp, UBLKD_OP_WRITE_ZEROES, KIB(63) + 512, KIB(66), NULL), 0);
	CHECK(all_bytes(d.base, KIB(63) + 512, 'x'));
	CHECK(all_bytes(d.base + KIB(63) + 512, KIB(66), 0));
	CHECK(all_bytes(d.base + KIB(129) + 512, d.size - KIB(129) - 512, 'x'));
	CHECK_EQ(ask(&d, tp, UBLKD_OP_READ, KIB(96), sizeof(in), in), sizeof(in));
	CHECK(all_bytes(in, KIB(33) + 512, 0));
	CHECK(all_bytes(in + KIB(33) + 512, sizeof(in) - KIB(33) - 512, 'x'));
	ramdisk_free(&d);
}

/* Sizes that are no multiple of a chunk, or of a page: the marks begin within the disk's last page. */
static void test_tail(const struct ublkd_transport *tp, uint64_t size)
{
	struct ramdisk d = ramdisk_new(size, -1);
	const uint64_t chunks = (size + KIB(64) - 1) / KIB(64);
	const uint64_t tail = size % KIB(64) ? size % KIB(64) : KIB(64);

	CHECK_EQ(ublkd_memory_file_bytes(size), size + chunks);
	memset(out, 't', sizeof(out));
	CHECK_EQ(ask(&d, tp, UBLKD_OP_WRITE, size - tail, tail, out), (int64_t)tail);
	for (uint64_t c = 0; c < chunks; c++)
		CHECK_EQ(d.marks[c], c == chunks - 1);
	CHECK_EQ(ask(&d, tp, UBLKD_OP_READ, size - tail, tail, in), (int64_t)tail);
	CHECK(all_bytes(in, tail, 't'));
	CHECK_EQ(ask(&d, tp, UBLKD_OP_READ, size, 512, in), -EIO);
	CHECK_EQ(ask(&d, tp, UBLKD_OP_WRITE, size - 512, 512, out), 512);

	/* Discarded to its end, the tail is a whole chunk; the marks themselves stay. */
	d.marks[0] = 1;
	CHECK_EQ(ask(&d, tp, UBLKD_OP_DISCARD, size - tail, tail, NULL), 0);
	CHECK_EQ(d.marks[chunks - 1], 0);
	if (chunks > 1)
		CHECK_EQ(d.marks[0], 1);
	CHECK(all_bytes(d.base + size - tail, tail, 0));
	ramdisk_free(&d);
}

/* Many tags at once, over all of the disk. */
static void test_parallel(const struct ublkd_transport *tp)
{
	enum { N = 256, BYTES = KIB(4) };
	struct ramdisk d = ramdisk_new((uint64_t)N * BYTES, -1);
	struct fake_request *reqs = calloc(N, sizeof(*reqs));
	char *data = malloc((size_t)N * BYTES), *back = malloc((size_t)N * BYTES);
	struct fake *f = fake_new(d.size);

	CHECK(reqs && data && back);
	for (size_t i = 0; i < (size_t)N * BYTES; i++)
		data[i] = (char)(i * 31 + i / BYTES);
	f->p.depth = 64;
	for (size_t i = 0; i < N; i++)
		reqs[i] = request(UBLKD_OP_WRITE, i * BYTES, BYTES, data + i * BYTES);
	fake_serve(f, tp, d.target, reqs, N);
	for (size_t i = 0; i < N; i++)
		reqs[i] = request(UBLKD_OP_READ, i * BYTES, BYTES, back + i * BYTES);
	fake_serve(f, tp, d.target, reqs, N);
	CHECK(!memcmp(data, back, (size_t)N * BYTES));
	for (size_t i = 0; i < N; i++)
		reqs[i] = request(UBLKD_OP_DISCARD, i * BYTES, BYTES, NULL);
	fake_serve(f, tp, d.target, reqs, N);
	CHECK(all_bytes(d.base, d.size, 0));
	fake_free(f);
	ramdisk_free(&d);
	free(back);
	free(data);
	free(reqs);
}

int main(void)
{
	static const struct ublkd_transport *const transports[] = { &fake_copy, &fake_user_copy };

	for (int i = 0; i < 2; i++) {
		test_contents(transports[i]);
		test_marks(transports[i]);
		test_usage(transports[i]);
		test_zeroes(transports[i]);
		test_tail(transports[i], KIB(64) * 3 + KIB(20));
		test_tail(transports[i], KIB(64) * 2 + 512);
		test_tail(transports[i], KIB(64) * 2);
		test_tail(transports[i], 512);
		test_tail(transports[i], KIB(4) * 5 + 1536);
		test_parallel(transports[i]);
	}
	return 0;
}
