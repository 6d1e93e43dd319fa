/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loop target on real files. The linker puts this program between the
 * target and ublkd_sqe_own() (see the Makefile), so it sees every SQE that is
 * about to go to the kernel and can make it shorter, or one that is refused.
 */
#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "fake.h"

#define KIB(n) ((n) << 10)
#define DISK KIB(1024)

void __real_ublkd_sqe_own(struct ublkd_queue *q, struct io_uring_sqe *sqe, struct ublkd_io *io, uint8_t slot);

static struct {
	unsigned count[256]; /* SQEs per opcode */
	uint32_t fallocate_mode[16];
	unsigned nr_fallocate;
	unsigned dsync;
	unsigned fixed; /* of the reads and writes */
	uint32_t shorten_to;   /* reads and writes: at most so many bytes, 0: no limit */
	uint32_t refuse_modes; /* fallocate: refuse a call with one of these bits */
} spy;

static uint8_t plain_opcode(uint8_t opcode)
{
	return opcode == IORING_OP_READ_FIXED  ? IORING_OP_READ :
	       opcode == IORING_OP_WRITE_FIXED ? IORING_OP_WRITE :
						 opcode;
}

void __wrap_ublkd_sqe_own(struct ublkd_queue *q, struct io_uring_sqe *sqe, struct ublkd_io *io, uint8_t slot)
{
	/* A driver's buffer begins at address 0; the fake's is this program's memory. */
	if (sqe->opcode == IORING_OP_READ_FIXED || sqe->opcode == IORING_OP_WRITE_FIXED) {
		CHECK(io->fixed);
		CHECK_EQ(sqe->buf_index, io->tag);
		sqe->addr += (uintptr_t)((struct fake *)q->p.cmdbuf)->pages[io->tag];
		spy.fixed++;
	}
	spy.count[plain_opcode(sqe->opcode)]++;
	if (sqe->opcode == IORING_OP_FALLOCATE) {
		if (spy.nr_fallocate < 16)
			spy.fallocate_mode[spy.nr_fallocate++] = sqe->len;
		if (sqe->len & spy.refuse_modes)
			sqe->len = 1u << 30; /* no mode that any kernel has: EOPNOTSUPP */
	}
	if (plain_opcode(sqe->opcode) == IORING_OP_READ || plain_opcode(sqe->opcode) == IORING_OP_WRITE) {
		if (spy.shorten_to && sqe->len > spy.shorten_to)
			sqe->len = spy.shorten_to;
		spy.dsync += plain_opcode(sqe->opcode) == IORING_OP_WRITE && sqe->rw_flags == RWF_DSYNC;
	}
	__real_ublkd_sqe_own(q, sqe, io, slot);
}

static char out[KIB(64)], in[KIB(64)];

static int disk_file(uint64_t size)
{
	char path[] = "/tmp/ublkd-engine.XXXXXX";
	const int fd = (int)CHECK_SYS(mkostemp(path, O_CLOEXEC));

	CHECK_SYS(unlink(path));
	CHECK_SYS(ftruncate(fd, (off_t)size));
	return fd;
}

static void fill_file(int fd, uint64_t size, int c)
{
	char *bytes = malloc(size);

	CHECK(bytes);
	memset(bytes, c, size);
	CHECK_EQ(CHECK_SYS(pwrite(fd, bytes, size, 0)), size);
	/* Blocks that are only promised would count as used, or not, as the file system likes. */
	CHECK_SYS(fsync(fd));
	free(bytes);
}

/* Are all the file's bytes in [from, to) c? */
static int file_has(int fd, uint64_t from, uint64_t to, int c)
{
	char *bytes = malloc(to - from);
	int yes;

	CHECK(bytes);
	CHECK_EQ(CHECK_SYS(pread(fd, bytes, to - from, (off_t)from)), to - from);
	yes = all_bytes(bytes, to - from, c);
	free(bytes);
	return yes;
}

static uint64_t file_usage(int fd)
{
	struct stat st;

	CHECK_SYS(fstat(fd, &st));
	return (uint64_t)st.st_blocks * 512;
}

static struct fake_request request(uint8_t op, uint64_t offset, uint64_t bytes, void *data)
{
	return (struct fake_request){ .op = op, .sector = offset >> 9, .sectors = (uint32_t)(bytes >> 9), .data = data };
}

static void serve(int fd, uint32_t flags, uint64_t offset, const struct ublkd_transport *tp, struct fake_request *reqs,
		  unsigned n)
{
	struct ublkd_loop_config config = { .fd = fd, .flags = flags, .offset = offset };
	struct ublkd_target *target;
	struct fake *f = fake_new(DISK);

	memset(spy.count, 0, sizeof(spy.count));
	spy.nr_fallocate = spy.dsync = 0;
	CHECK_EQ(ublkd_loop_create(&config, &target), 0);
	fake_serve(f, tp, target, reqs, n);
	ublkd_target_destroy(target);
	fake_free(f);
}

static int32_t ask(int fd, uint32_t flags, const struct ublkd_transport *tp, struct fake_request r)
{
	serve(fd, flags, 0, tp, &r, 1);
	return r.result;
}

static void test_read_write(const struct ublkd_transport *tp, uint64_t offset)
{
	const int fd = disk_file(offset + DISK + KIB(4));
	struct fake_request reqs[] = {
		request(UBLKD_OP_WRITE, KIB(512) - 512, sizeof(out), out),
		request(UBLKD_OP_READ, KIB(512) - 512, sizeof(in), in),
		request(UBLKD_OP_FLUSH, 0, 0, NULL),
	};

	for (size_t i = 0; i < sizeof(out); i++)
		out[i] = (char)(i * 13 + i / 512);
	memset(in, 0, sizeof(in));
	serve(fd, 0, offset, tp, reqs, 3);
	CHECK_EQ(reqs[0].result, sizeof(out));
	CHECK_EQ(reqs[1].result, sizeof(in));
	CHECK_EQ(reqs[2].result, 0);
	CHECK(!memcmp(in, out, sizeof(in)));
	CHECK_EQ(spy.count[IORING_OP_FSYNC], 1);
	CHECK_EQ(spy.dsync, 0);
	CHECK_EQ(CHECK_SYS(pread(fd, in, sizeof(in), (off_t)(offset + KIB(512) - 512))), sizeof(in));
	CHECK(!memcmp(in, out, sizeof(in)));
	CHECK(file_has(fd, 0, offset + KIB(512) - 512, 0));
	CHECK(file_has(fd, offset + KIB(576) - 512, offset + DISK + KIB(4), 0));

	/* FUA is one write that is durable, not a write and a flush. */
	reqs[0] = request(UBLKD_OP_WRITE, 0, 4096, out);
	reqs[0].flags = UBLKD_RQ_FUA;
	serve(fd, 0, offset, tp, reqs, 1);
	CHECK_EQ(reqs[0].result, 4096);
	CHECK_EQ(spy.dsync, 1);
	CHECK_EQ(spy.count[IORING_OP_FSYNC], 0);

	/* The device ends before the file does. */
	CHECK_EQ(ask(fd, 0, tp, request(UBLKD_OP_WRITE, DISK, 512, out)), -EIO);
	CHECK(file_has(fd, offset + DISK, offset + DISK + KIB(4), 0));
	close(fd);
}

/* The kernel hands over less than was asked for: the rest is asked for, and nobody above notices. */
static void test_short(const struct ublkd_transport *tp)
{
	const int fd = disk_file(DISK);
	struct fake_request reqs[] = {
		request(UBLKD_OP_WRITE, KIB(8), sizeof(out), out),
		request(UBLKD_OP_READ, KIB(8), sizeof(in), in),
		request(UBLKD_OP_WRITE, KIB(256), 3 * 512, out),
	};

	spy.shorten_to = 5000;
	memset(in, 0, sizeof(in));
	serve(fd, 0, 0, tp, reqs, 3);
	spy.shorten_to = 0;
	CHECK_EQ(reqs[0].result, sizeof(out));
	CHECK_EQ(reqs[1].result, sizeof(in));
	CHECK_EQ(reqs[2].result, 3 * 512);
	CHECK_EQ(spy.count[IORING_OP_WRITE], (KIB(64) + 4999) / 5000 + 1);
	CHECK_EQ(spy.count[IORING_OP_READ], (KIB(64) + 4999) / 5000);
	CHECK(!memcmp(in, out, sizeof(in)));
	CHECK_EQ(CHECK_SYS(pread(fd, in, sizeof(in), KIB(8))), sizeof(in));
	CHECK(!memcmp(in, out, sizeof(in)));
	close(fd);
}

/* Somebody cuts the backing file. */
static void test_truncated(const struct ublkd_transport *tp)
{
	const int fd = disk_file(KIB(100));

	fill_file(fd, KIB(100), 'a');
	CHECK_EQ(ask(fd, 0, tp, request(UBLKD_OP_READ, KIB(36), KIB(64), in)), KIB(64));
	CHECK_EQ(ask(fd, 0, tp, request(UBLKD_OP_READ, KIB(64), KIB(64), in)), -EIO);
	CHECK_EQ(ask(fd, 0, tp, request(UBLKD_OP_READ, KIB(100), 512, in)), -EIO);
	CHECK_EQ(ask(fd, 0, tp, request(UBLKD_OP_READ, KIB(512), KIB(4), in)), -EIO);
	/* Writing makes it grow again. */
	CHECK_EQ(ask(fd, 0, tp, request(UBLKD_OP_WRITE, KIB(512), KIB(4), out)), KIB(4));
	CHECK_EQ(ask(fd, 0, tp, request(UBLKD_OP_READ, KIB(508), KIB(8), in)), KIB(8));
	CHECK(all_bytes(in, KIB(4), 0));
	CHECK(!memcmp(in + KIB(4), out, KIB(4)));
	close(fd);
}

static void test_read_only(const struct ublkd_transport *tp)
{
	static const uint8_t refused[] = { UBLKD_OP_WRITE, UBLKD_OP_DISCARD, UBLKD_OP_WRITE_ZEROES };
	const int fd = disk_file(DISK);

	fill_file(fd, DISK, 'r');
	for (int i = 0; i < 3; i++)
		CHECK_EQ(ask(fd, UBLKD_LOOP_READ_ONLY, tp, request(refused[i], 0, 4096, out)), -EROFS);
	CHECK(file_has(fd, 0, DISK, 'r'));
	CHECK_EQ(ask(fd, UBLKD_LOOP_READ_ONLY, tp, request(UBLKD_OP_READ, 0, 4096, in)), 4096);
	CHECK_EQ(ask(fd, UBLKD_LOOP_READ_ONLY, tp, request(UBLKD_OP_FLUSH, 0, 0, NULL)), 0);
	close(fd);
}

static void test_discard(const struct ublkd_transport *tp, uint32_t flags)
{
	const int fd = disk_file(DISK);
	uint64_t before;

	fill_file(fd, DISK, 'd');
	before = file_usage(fd);
	CHECK_EQ(ask(fd, flags, tp, request(UBLKD_OP_DISCARD, KIB(128), KIB(512), NULL)), 0);
	CHECK_EQ(spy.nr_fallocate, 1);
	CHECK_EQ(spy.fallocate_mode[0], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
	/* A regular file served as a device has no discard command: tried once, then punched. */
	CHECK_EQ(spy.count[IORING_OP_URING_CMD], !!(flags & UBLKD_LOOP_BLOCK_DEVICE));
	CHECK(file_usage(fd) <= before - KIB(512));
	CHECK(file_has(fd, 0, KIB(128), 'd'));
	CHECK(file_has(fd, KIB(128), KIB(640), 0));
	CHECK(file_has(fd, KIB(640), DISK, 'd'));
	close(fd);
}

/* What is refused once is not tried again, and a discard never turns into writes. */
static void test_discard_refused(const struct ublkd_transport *tp)
{
	const int fd = disk_file(DISK);
	struct fake_request reqs[] = {
		request(UBLKD_OP_DISCARD, 0, KIB(4), NULL),
		request(UBLKD_OP_DISCARD, 0, KIB(8), NULL),
		request(UBLKD_OP_WRITE_ZEROES, 0, KIB(12), NULL),
	};

	fill_file(fd, DISK, 'd');
	spy.refuse_modes = FALLOC_FL_PUNCH_HOLE;
	serve(fd, 0, 0, tp, reqs, 3);
	spy.refuse_modes = 0;
	CHECK_EQ(reqs[0].result, -EOPNOTSUPP);
	CHECK_EQ(reqs[1].result, -EOPNOTSUPP);
	CHECK_EQ(reqs[2].result, 0);
	CHECK_EQ(spy.fallocate_mode[0] & FALLOC_FL_PUNCH_HOLE, FALLOC_FL_PUNCH_HOLE);
	for (unsigned i = 1; i < spy.nr_fallocate; i++)
		CHECK(!(spy.fallocate_mode[i] & FALLOC_FL_PUNCH_HOLE));
	CHECK(file_has(fd, 0, KIB(12), 0));
	CHECK(file_has(fd, KIB(12), DISK, 'd'));
	close(fd);
}

static void test_write_zeroes(const struct ublkd_transport *tp)
{
	const int fd = disk_file(DISK);
	struct fake_request unmap = request(UBLKD_OP_WRITE_ZEROES, KIB(64), KIB(64), NULL);
	struct fake_request keep = request(UBLKD_OP_WRITE_ZEROES, KIB(256), KIB(128), NULL);
	uint64_t before;

	fill_file(fd, DISK, 'z');
	before = file_usage(fd);
	keep.flags = UBLKD_RQ_NOUNMAP;
	CHECK_EQ(ask(fd, 0, tp, keep), 0);
	for (unsigned i = 0; i < spy.nr_fallocate; i++)
		CHECK(!(spy.fallocate_mode[i] & FALLOC_FL_PUNCH_HOLE));
	CHECK_EQ(spy.fallocate_mode[0] & FALLOC_FL_ZERO_RANGE, FALLOC_FL_ZERO_RANGE);
	CHECK(file_usage(fd) >= before);
	CHECK_EQ(ask(fd, 0, tp, unmap), 0);
	CHECK_EQ(spy.fallocate_mode[0] & FALLOC_FL_PUNCH_HOLE, FALLOC_FL_PUNCH_HOLE);
	CHECK(file_usage(fd) <= before - KIB(64));
	CHECK(file_has(fd, KIB(64), KIB(128), 0));
	CHECK(file_has(fd, KIB(128), KIB(256), 'z'));
	CHECK(file_has(fd, KIB(256), KIB(384), 0));
	CHECK(file_has(fd, KIB(384), DISK, 'z'));
	close(fd);
}

/* No kind of fallocate: plain writes, however long the range, and in the right places when they come back short. */
static void test_zeroes_by_writes(const struct ublkd_transport *tp, uint32_t shorten_to)
{
	const int fd = disk_file(4 * DISK);
	struct ublkd_loop_config config = { .fd = fd, .offset = KIB(4) };
	const uint64_t bytes = 2 * DISK + DISK / 2 + 512;
	struct fake_request r = request(UBLKD_OP_WRITE_ZEROES, 512, bytes, NULL);
	struct ublkd_target *target;
	struct fake *f = fake_new(3 * DISK);

	fill_file(fd, 4 * DISK, 'w');
	spy.refuse_modes = ~0u;
	spy.shorten_to = shorten_to;
	memset(spy.count, 0, sizeof(spy.count));
	spy.nr_fallocate = 0;
	CHECK_EQ(ublkd_loop_create(&config, &target), 0);
	fake_serve(f, tp, target, &r, 1);
	spy.refuse_modes = spy.shorten_to = 0;
	ublkd_target_destroy(target);
	fake_free(f);

	CHECK_EQ(r.result, 0);
	CHECK_EQ(spy.nr_fallocate, 2);
	CHECK_EQ(spy.count[IORING_OP_WRITE], shorten_to ? (bytes + shorten_to - 1) / shorten_to : 3);
	CHECK(file_has(fd, 0, KIB(4) + 512, 'w'));
	CHECK(file_has(fd, KIB(4) + 512, KIB(4) + 512 + bytes, 0));
	CHECK(file_has(fd, KIB(4) + 512 + bytes, 4 * DISK, 'w'));
	close(fd);
}

/* tmpfs punches holes, but has no ZERO_RANGE: a refusal that no spy has to make. */
static void test_tmpfs(const struct ublkd_transport *tp)
{
	const int fd = (int)CHECK_SYS(memfd_create("backing", MFD_CLOEXEC));
	struct fake_request keep = request(UBLKD_OP_WRITE_ZEROES, KIB(64), KIB(192), NULL);
	uint64_t before;

	CHECK_SYS(ftruncate(fd, DISK));
	fill_file(fd, DISK, 'm');
	before = file_usage(fd);
	keep.flags = UBLKD_RQ_NOUNMAP;
	CHECK_EQ(ask(fd, 0, tp, keep), 0);
	CHECK_EQ(file_usage(fd), before);
	CHECK(file_has(fd, KIB(64), KIB(256), 0));
	CHECK(file_has(fd, KIB(256), DISK, 'm'));
	CHECK_EQ(ask(fd, 0, tp, request(UBLKD_OP_DISCARD, 0, DISK, NULL)), 0);
	CHECK(file_usage(fd) <= before - DISK);
	close(fd);
}

/* Devices that answer as a failing disk does. */
static void test_errors(const struct ublkd_transport *tp)
{
	struct fake_request zeroes = request(UBLKD_OP_WRITE_ZEROES, 0, KIB(4), NULL);
	int fd = (int)CHECK_SYS(open("/dev/full", O_RDWR | O_CLOEXEC));

	CHECK_EQ(ask(fd, 0, tp, request(UBLKD_OP_WRITE, 0, KIB(4), out)), -ENOSPC);
	CHECK_EQ(ask(fd, 0, tp, zeroes), -ENOSPC);
	CHECK_EQ(spy.count[IORING_OP_WRITE], 1);
	CHECK_EQ(ask(fd, 0, tp, request(UBLKD_OP_DISCARD, 0, KIB(4), NULL)), -EOPNOTSUPP);
	CHECK_EQ(ask(fd, 0, tp, request(UBLKD_OP_FLUSH, 0, 0, NULL)), -EINVAL);
	close(fd);

	fd = (int)CHECK_SYS(open("/dev/null", O_RDONLY | O_CLOEXEC));
	CHECK_EQ(ask(fd, 0, tp, request(UBLKD_OP_READ, 0, KIB(4), in)), -EIO);
	CHECK_EQ(ask(fd, 0, tp, request(UBLKD_OP_WRITE, 0, KIB(4), out)), -EBADF);
	close(fd);
}

/* The results of the target's SQEs are made up: these first, in order, then the real ones. */
static struct ublkd_target_ops bent_ops;
static const struct ublkd_target_ops *real_ops;
static const int32_t *made_up;

static void bent_handle(struct ublkd_target *t, struct ublkd_queue *q, struct ublkd_event *events, unsigned n)
{
	for (unsigned i = 0; i < n; i++)
		if (events[i].kind == UBLKD_EVENT_CQE && *made_up)
			events[i].res = *made_up++;
	real_ops->handle(t, q, events, n);
}

static void serve_bent(const struct ublkd_transport *tp, const int32_t *results, struct fake_request *r,
		       uint64_t retries)
{
	const int fd = disk_file(DISK);
	struct ublkd_loop_config config = { .fd = fd };
	struct ublkd_target *target;
	struct fake *f = fake_new(DISK);

	CHECK_EQ(ublkd_loop_create(&config, &target), 0);
	real_ops = target->ops;
	bent_ops = *real_ops;
	bent_ops.handle = bent_handle;
	target->ops = &bent_ops;
	made_up = results;
	CHECK_EQ(fake_open(f, tp, target), 0);
	CHECK_EQ(fake_run(f, r, 1), UBLKD_RUN_DONE);
	CHECK_EQ(r->answers, 1);
	CHECK_EQ(*made_up, 0);
	CHECK_EQ(f->q->shm->retries, retries);
	fake_close(f);
	ublkd_target_destroy(target);
	fake_free(f);
	close(fd);
}

static void test_results(const struct ublkd_transport *tp)
{
	static const struct {
		uint8_t op;
		int32_t made_up[4];
		int32_t result;
		uint64_t retries;
	} cases[] = {
		{ UBLKD_OP_READ, { -EINTR, -EAGAIN }, KIB(4), 2 },
		{ UBLKD_OP_WRITE, { -EAGAIN, -EINTR, 512 }, KIB(4), 3 },
		{ UBLKD_OP_FLUSH, { -EINTR }, 0, 1 },
		{ UBLKD_OP_DISCARD, { -EINTR }, 0, 1 },
		{ UBLKD_OP_WRITE_ZEROES, { -EAGAIN }, 0, 1 },
		{ UBLKD_OP_READ, { 1024, -EIO }, -EIO, 1 }, /* an error behind a part that went well */
		{ UBLKD_OP_WRITE, { 1024, -ENOSPC }, -ENOSPC, 1 },
		{ UBLKD_OP_WRITE, { -EDQUOT }, -EDQUOT, 0 },
		{ UBLKD_OP_FLUSH, { -EIO }, -EIO, 0 },
		{ UBLKD_OP_DISCARD, { -EIO }, -EIO, 0 },
		{ UBLKD_OP_DISCARD, { -EINVAL }, -EINVAL, 0 }, /* misaligned: no reason to give punching up */
		{ UBLKD_OP_DISCARD, { -ENOSYS }, -EOPNOTSUPP, 0 },
		{ UBLKD_OP_WRITE_ZEROES, { -EIO }, -EIO, 0 },
		{ UBLKD_OP_WRITE_ZEROES, { -EOPNOTSUPP, -ENODEV, 512, -ENOSPC }, -ENOSPC, 0 },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		int32_t results[5] = { 0 };
		struct fake_request r = request(cases[i].op, 0, cases[i].op == UBLKD_OP_FLUSH ? 0 : KIB(4), out);

		memcpy(results, cases[i].made_up, sizeof(cases[i].made_up));
		serve_bent(tp, results, &r, cases[i].retries);
		if (r.result != cases[i].result)
			check_failed(__FILE__, __LINE__, "case %zu: %d, not %d", i, r.result, cases[i].result);
	}
}

static void test_parallel(const struct ublkd_transport *tp, int fd)
{
	enum { N = 256, BYTES = KIB(4) };
	struct ublkd_loop_config config = { .fd = fd };
	struct fake_request *reqs = calloc(N, sizeof(*reqs));
	char *data = malloc(DISK), *back = malloc(DISK);
	struct ublkd_target *target;
	struct fake *f = fake_new(DISK);

	CHECK(reqs && data && back);
	for (size_t i = 0; i < DISK; i++)
		data[i] = (char)(i * 17 + i / BYTES);
	f->p.depth = 32;
	CHECK_EQ(ublkd_loop_create(&config, &target), 0);
	for (size_t i = 0; i < N; i++) {
		reqs[i] = request(UBLKD_OP_WRITE, (i * 37 % N) * BYTES, BYTES, data + (i * 37 % N) * BYTES);
		reqs[i].flags = i % 16 ? 0 : UBLKD_RQ_FUA;
	}
	fake_serve(f, tp, target, reqs, N);
	for (size_t i = 0; i < N; i++)
		reqs[i] = request(UBLKD_OP_READ, i * BYTES, BYTES, back + i * BYTES);
	fake_serve(f, tp, target, reqs, N);
	CHECK(!memcmp(data, back, DISK));
	ublkd_target_destroy(target);
	fake_free(f);
	free(back);
	free(data);
	free(reqs);
	close(fd);
}

static void test_direct(const struct ublkd_transport *tp)
{
	char path[64];
	const int fd = disk_file(DISK);
	int align, direct;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	align = ublkd_dio_align(path, 1);
	CHECK(align == 0 || align == 512 || align == 1024 || align == 2048 || align == 4096);
	CHECK_EQ(ublkd_dio_align("/tmp/none/at/all", 1), 0);
	CHECK_EQ(ublkd_dio_align("/proc/self/stat", 0), 0);
	if (align) {
		direct = (int)CHECK_SYS(open(path, O_RDWR | O_DIRECT | O_CLOEXEC));
		test_parallel(tp, direct);
	}
	close(fd);
}

static void test_can_punch(void)
{
	const int fd = disk_file(KIB(4) + 1);
	const int null = (int)CHECK_SYS(open("/dev/null", O_RDWR | O_CLOEXEC));

	fill_file(fd, KIB(4) + 1, 'p');
	CHECK_EQ(ublkd_can_punch(fd, KIB(4) + 1), 1);
	CHECK(file_has(fd, 0, KIB(4) + 1, 'p'));
	CHECK_EQ(CHECK_SYS(lseek(fd, 0, SEEK_END)), KIB(4) + 1);
	CHECK_EQ(ublkd_can_punch(null, 0), 0);
	CHECK_EQ(ublkd_can_punch(-1, 0), 0);
	close(null);
	close(fd);
}

int main(void)
{
	static const struct ublkd_transport *const transports[] = { &fake_copy, &fake_user_copy, &fake_zero_copy };

	for (int i = 0; i < 3; i++) {
		const struct ublkd_transport *tp = transports[i];

		CHECK_EQ(spy.fixed, 0);
		test_read_write(tp, 0);
		test_read_write(tp, 512 * 9);
		test_short(tp);
		test_truncated(tp);
		test_read_only(tp);
		test_discard(tp, 0);
		test_discard(tp, UBLKD_LOOP_BLOCK_DEVICE);
		test_discard_refused(tp);
		test_write_zeroes(tp);
		test_zeroes_by_writes(tp, 0);
		test_zeroes_by_writes(tp, 100 * 512);
		test_tmpfs(tp);
		test_errors(tp);
		test_results(tp);
		test_parallel(tp, disk_file(DISK));
		test_direct(tp);
	}
	CHECK(spy.fixed > 0);
	test_can_punch();
	return 0;
}
