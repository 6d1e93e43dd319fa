/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The same commands, legal and not, for any ublk driver: one line "name result"
 * each. Lines of two drivers are compared by a program.
 *
 *   conformance [FEATURES]   only what these features allow (default: all that the driver has)
 */
#include <pthread.h>
#include <signal.h>

#include "client.h"

#define QUEUES 2
#define DEPTH 4
#define BYTES (8 << 20)

static struct control c;
static uint64_t features;

static void say(const char *name, long result)
{
	printf("%s %ld\n", name, result);
	fflush(stdout);
}

static int raw(uint32_t op, struct ublksrv_ctrl_cmd cmd)
{
	return control_raw(&c, op, &cmd, 400);
}

static uint32_t make(uint64_t flags)
{
	struct ublksrv_ctrl_dev_info info;
	int err = add(&c, &info, QUEUES, DEPTH, flags);

	if (err) {
		errno = -err;
		die("add");
	}
	return info.dev_id;
}

static void drop(uint32_t id)
{
	int err = control(&c, UBLK_U_CMD_DEL_DEV, id, NULL, 0, 0);

	if (err) {
		errno = -err;
		die("delete");
	}
}

static void add_cases(void)
{
	static const struct {
		const char *name;
		unsigned int queues, depth;
		uint64_t flags;
		uint32_t id, header_id;
	} cases[] = {
		{ "add.no-queues", 0, 1, 0, ~0u, ~0u },
		{ "add.no-depth", 1, 0, 0, ~0u, ~0u },
		{ "add.too-deep", 1, 4097, 0, ~0u, ~0u },
		{ "add.too-many-queues", 4097, 1, 0, ~0u, ~0u },
		{ "add.ids-differ", 1, 1, 0, 5, 6 },
		{ "add.id-too-large", 1, 1, 0, 1 << 20, 1 << 20 },
		{ "add.largest-id", 1, 1, 0, (1 << 20) - 1, (1 << 20) - 1 },
		{ "add.deepest", 1, 4096, 0, ~0u, ~0u },
		{ "add.unprivileged-by-root", 1, 1, UBLK_F_UNPRIVILEGED_DEV, ~0u, ~0u },
		{ "add.recovery", 1, 1, UBLK_F_USER_RECOVERY, ~0u, ~0u },
		{ "add.reissue", 1, 1, UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE, ~0u, ~0u },
		{ "add.reissue-alone", 1, 1, UBLK_F_USER_RECOVERY_REISSUE, ~0u, ~0u },
		{ "add.user-copy-drops-get-data", 1, 1, UBLK_F_USER_COPY | UBLK_F_NEED_GET_DATA, ~0u, ~0u },
		{ "add.unknown-flag", 1, 1, 1ull << 60, ~0u, ~0u },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct ublksrv_ctrl_dev_info info = {
			.nr_hw_queues = cases[i].queues,
			.queue_depth = cases[i].depth,
			.max_io_buf_bytes = MAX_IO + 1,
			.dev_id = cases[i].id,
			.flags = cases[i].flags,
			.state = 1,
		};
		int err = raw(UBLK_U_CMD_ADD_DEV, (struct ublksrv_ctrl_cmd){
			.dev_id = cases[i].header_id, .queue_id = 0xffff,
			.len = sizeof(info), .addr = (uintptr_t)&info });
		char name[64];

		say(cases[i].name, err);
		if (err)
			continue;
		snprintf(name, sizeof(name), "%s.flags", cases[i].name);
		/* what a driver only tells, and what not all have, is no difference */
		say(name, info.flags & 0x1bd);
		snprintf(name, sizeof(name), "%s.rest", cases[i].name);
		say(name, info.state * 1000000l + info.max_io_buf_bytes);
		drop(info.dev_id);
	}
}

static void control_cases(void)
{
	static char buf[65536];
	struct ublksrv_ctrl_dev_info info = { .nr_hw_queues = 1, .queue_depth = 1, .dev_id = ~0u };
	struct ublksrv_ctrl_cmd whole = { .dev_id = ~0u, .queue_id = 0xffff, .len = 64, .addr = (uintptr_t)&info };
	struct ublksrv_ctrl_cmd cmd;
	uint32_t id = make(0);
	static const uint32_t ops[] = {
		UBLK_U_CMD_GET_QUEUE_AFFINITY, UBLK_U_CMD_GET_DEV_INFO, UBLK_U_CMD_START_DEV, UBLK_U_CMD_STOP_DEV,
		UBLK_U_CMD_SET_PARAMS, UBLK_U_CMD_GET_PARAMS, UBLK_U_CMD_START_USER_RECOVERY,
		UBLK_U_CMD_END_USER_RECOVERY, UBLK_U_CMD_GET_DEV_INFO2, UBLK_U_CMD_GET_FEATURES,
	};
	char name[64];
	unsigned int i;

	cmd = whole; cmd.queue_id = 0;
	say("add.queue-id", raw(UBLK_U_CMD_ADD_DEV, cmd));
	cmd = whole; cmd.len = 63;
	say("add.short", raw(UBLK_U_CMD_ADD_DEV, cmd));
	cmd = whole; cmd.addr = 0;
	say("add.no-buffer", raw(UBLK_U_CMD_ADD_DEV, cmd));
	cmd = whole; cmd.addr = 0xdead0000;
	say("add.bad-buffer", raw(UBLK_U_CMD_ADD_DEV, cmd));
	info.dev_id = id;
	cmd = whole; cmd.dev_id = id;
	say("add.twice", raw(UBLK_U_CMD_ADD_DEV, cmd));

	for (i = 0; i < sizeof(ops) / sizeof(ops[0]); i++) {
		unsigned int nr = _IOC_NR(ops[i]);

		cmd = (struct ublksrv_ctrl_cmd){ .dev_id = 99999, .queue_id = 0xffff };
		snprintf(name, sizeof(name), "nr%02x.no-device", nr);
		say(name, raw(ops[i], cmd));
		cmd.dev_id = id;
		snprintf(name, sizeof(name), "nr%02x.no-buffer", nr);
		say(name, raw(ops[i], cmd));
		cmd.addr = (uintptr_t)buf;
		cmd.len = 4;
		snprintf(name, sizeof(name), "nr%02x.short", nr);
		say(name, raw(ops[i], cmd));
		cmd.addr = 0xdead0000;
		cmd.len = 64;
		snprintf(name, sizeof(name), "nr%02x.bad-buffer", nr);
		say(name, raw(ops[i], cmd));
		cmd.data[0] = 9999;
		cmd.addr = (uintptr_t)buf;
		memset(buf, 0, sizeof(buf));
		snprintf(name, sizeof(name), "nr%02x.zeroes", nr);
		say(name, raw(ops[i], cmd));
		snprintf(name, sizeof(name), "nr%02x.bare", nr);
		say(name, raw(nr, cmd));
		snprintf(name, sizeof(name), "nr%02x.other-type", nr);
		say(name, raw(nr | 'x' << 8, cmd));
	}
	say("unknown-command", raw(_IOWR('u', 0x55, struct ublksrv_ctrl_cmd),
				   (struct ublksrv_ctrl_cmd){ .dev_id = id }));
	/* STOP came by above: before anything was fetched it changes nothing */
	for (i = 0; i < QUEUES; i++) {
		int err = raw(UBLK_U_CMD_GET_QUEUE_AFFINITY, (struct ublksrv_ctrl_cmd){
			.dev_id = id, .len = 8, .addr = (uintptr_t)buf, .data = { i } });

		snprintf(name, sizeof(name), "affinity.%u", i);
		say(name, err ? err : buf[0]);
	}
	drop(id);
	say("deleted", raw(UBLK_U_CMD_GET_DEV_INFO, (struct ublksrv_ctrl_cmd){
		.dev_id = id, .len = 64, .addr = (uintptr_t)buf }));
}

struct param_case {
	const char *name;
	void (*change)(struct ublk_params *p);
};

static void p_same(struct ublk_params *p) { (void)p; }
static void p_none(struct ublk_params *p) { p->types = 0; }
static void p_no_basic(struct ublk_params *p) { p->types = UBLK_PARAM_TYPE_DISCARD; }
static void p_len0(struct ublk_params *p) { p->len = 0; }
static void p_len_more(struct ublk_params *p) { p->len = sizeof(*p) + 8; }
static void p_len_basic(struct ublk_params *p) { p->len = 40; }
static void p_small_block(struct ublk_params *p) { p->basic.logical_bs_shift = 8; }
static void p_big_block(struct ublk_params *p) { p->basic.logical_bs_shift = p->basic.physical_bs_shift = 13; }
static void p_physical(struct ublk_params *p) { p->basic.logical_bs_shift = 12; p->basic.physical_bs_shift = 9; }
static void p_max(struct ublk_params *p) { p->basic.max_sectors = (MAX_IO >> 9) + 1; }
static void p_max_small(struct ublk_params *p) { p->basic.max_sectors = 7; }
static void p_discard(struct ublk_params *p)
{
	p->types |= UBLK_PARAM_TYPE_DISCARD;
	p->discard = (struct ublk_param_discard){ .discard_granularity = 4096, .max_discard_sectors = 64,
						 .max_discard_segments = 1 };
}
static void p_granularity(struct ublk_params *p) { p_discard(p); p->discard.discard_granularity = 0; }
static void p_segments(struct ublk_params *p) { p_discard(p); p->discard.max_discard_segments = 2; }
static void p_devt(struct ublk_params *p) { p->types |= UBLK_PARAM_TYPE_DEVT; }
static void p_zoned(struct ublk_params *p) { p->types |= UBLK_PARAM_TYPE_ZONED; }
static void p_unknown(struct ublk_params *p) { p->types |= 1 << 30; }
static void p_fua(struct ublk_params *p) { p->basic.attrs = UBLK_ATTR_FUA; }
static void p_huge_shift(struct ublk_params *p) { p->basic.io_opt_shift = 40; }
static void p_huge(struct ublk_params *p) { p->basic.dev_sectors = ~0ull; }

static void param_cases(void)
{
	static const struct param_case cases[] = {
		{ "params.good", p_same }, { "params.no-type", p_none }, { "params.no-basic", p_no_basic },
		{ "params.no-length", p_len0 }, { "params.longer-than-buffer", p_len_more },
		{ "params.basic-only-length", p_len_basic }, { "params.block-256", p_small_block },
		{ "params.block-8192", p_big_block }, { "params.physical-smaller", p_physical },
		{ "params.max-above-buffer", p_max }, { "params.max-below-page", p_max_small },
		{ "params.discard", p_discard }, { "params.no-granularity", p_granularity },
		{ "params.two-segments", p_segments }, { "params.devt", p_devt }, { "params.zoned", p_zoned },
		{ "params.unknown-type", p_unknown }, { "params.fua-without-cache", p_fua },
		{ "params.huge-shift", p_huge_shift }, { "params.huge-size", p_huge },
	};
	uint32_t id = make(0);

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct ublk_params p = plain_params(BYTES), got = { .len = sizeof(got) };
		char name[64];
		int err;

		cases[i].change(&p);
		say(cases[i].name, set_params(&c, id, &p));
		err = control(&c, UBLK_U_CMD_GET_PARAMS, id, &got, sizeof(got), 0);
		snprintf(name, sizeof(name), "%s.read-back", cases[i].name);
		say(name, err ? err : (long)(got.types & ~(UBLK_PARAM_TYPE_DEVT | UBLK_PARAM_TYPE_ZONED)));
	}
	drop(id);
}

/* One I/O command and what it says at once: 1000 if it stays pending. */
static long io_now(struct io_uring *ring, int fd, uint32_t op, unsigned int q, unsigned int tag, int res,
		   uint64_t addr)
{
	struct io_uring_cqe *cqe;
	long result = 1000;

	io_cmd(ring, fd, op, q, tag, res, addr);
	io_uring_submit(ring);
	if (!io_uring_peek_cqe(ring, &cqe)) {
		result = cqe->res;
		io_uring_cqe_seen(ring, cqe);
	}
	return result;
}

static void file_cases(uint32_t id)
{
	int fd = open_char(id), second;
	char path[32], buf[512];
	void *p;

	snprintf(path, sizeof(path), "/dev/ublkc%u", id);
	second = open(path, O_RDWR);
	say("open.second", second < 0 ? -errno : second);
#define MAP(name, len, prot, flags, off) do {						\
		p = mmap(NULL, len, prot, flags, fd, off);				\
		say(name, p == MAP_FAILED ? -errno : 0);				\
		if (p != MAP_FAILED)							\
			munmap(p, len);							\
	} while (0)
	MAP("mmap.good", descs_size(DEPTH), PROT_READ, MAP_SHARED, 0);
	MAP("mmap.private", descs_size(DEPTH), PROT_READ, MAP_PRIVATE, 0);
	MAP("mmap.write", descs_size(DEPTH), PROT_READ | PROT_WRITE, MAP_SHARED, 0);
	MAP("mmap.too-long", descs_size(DEPTH) + 4096, PROT_READ, MAP_SHARED, 0);
	MAP("mmap.last-queue", descs_size(DEPTH), PROT_READ, MAP_SHARED, descs_offset(QUEUES - 1));
	MAP("mmap.no-queue", descs_size(DEPTH), PROT_READ, MAP_SHARED, descs_offset(QUEUES));
	MAP("mmap.inside", descs_size(DEPTH), PROT_READ, MAP_SHARED, descs_offset(0) + 4096);
	say("pread.dead", pread(fd, buf, 512, UBLKSRV_IO_BUF_OFFSET) < 0 ? -errno : 0);
	say("pwrite.dead", pwrite(fd, buf, 512, UBLKSRV_IO_BUF_OFFSET) < 0 ? -errno : 0);
	if (!fork()) {
		MAP("mmap.other-process", descs_size(DEPTH), PROT_READ, MAP_SHARED, 0);
		_exit(0);
	}
	wait(NULL);
	close(fd);
}

struct reader {
	uint32_t id;
	long result;
	int write;
};

static void *reader(void *arg)
{
	static char buf[4096] __attribute__((aligned(4096)));
	struct reader *r = arg;
	char path[32];
	int fd;

	snprintf(path, sizeof(path), "/dev/ublkb%u", r->id);
	fd = open(path, O_RDWR | O_DIRECT);
	r->result = fd < 0 ? -errno : r->write ? pwrite(fd, buf, 4096, 0) : pread(fd, buf, 4096, 0);
	if (r->result < 0)
		r->result = -errno;
	close(fd);
	return NULL;
}

/* A live device whose server does each thing that it should not. */
static void io_cases(const char *kind, uint64_t flags)
{
	static char bufs[QUEUES * DEPTH][MAX_IO];
	uint32_t id = make(flags | UBLK_F_NO_AUTO_PART_SCAN);
	struct ublk_params params = plain_params(BYTES);
	bool user_copy = flags & UBLK_F_USER_COPY;
	struct io_uring_cqe *cqe;
	struct io_uring ring;
	unsigned int q, tag, busy_q = 0, busy_tag = 0;
	struct reader r = { .id = id };
	pthread_t thread;
	char name[64];
	int fd, err;
	uint64_t good, bad;
	pid_t starter;

#define SAY(what, value) do {								\
		snprintf(name, sizeof(name), "%s.%s", kind, what);			\
		say(name, value);							\
	} while (0)
	good = user_copy ? 0 : (uintptr_t)bufs[0];
	bad = user_copy ? (uintptr_t)bufs[0] : 0;
	file_cases(id);
	set_params(&c, id, &params);
	fd = open_char(id);
	struct ublksrv_io_desc *descs[QUEUES];
	for (q = 0; q < QUEUES; q++)
		descs[q] = map_queue(fd, q, DEPTH);
	io_uring_queue_init(64, &ring, 0);
	SAY("fetch.no-queue", io_now(&ring, fd, UBLK_U_IO_FETCH_REQ, QUEUES, 0, 0, good));
	SAY("fetch.no-tag", io_now(&ring, fd, UBLK_U_IO_FETCH_REQ, 0, DEPTH, 0, good));
	if (!(flags & UBLK_F_NEED_GET_DATA))
		SAY("fetch.address", io_now(&ring, fd, UBLK_U_IO_FETCH_REQ, 0, 0, 0, bad));
	SAY("commit.before-fetch", io_now(&ring, fd, UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0, 0, 0, good));
	SAY("get-data.before-fetch", io_now(&ring, fd, UBLK_U_IO_NEED_GET_DATA, 0, 0, 0, good));
	SAY("unknown-command", io_now(&ring, fd, _IOWR('u', 0x3f, struct ublksrv_io_cmd), 0, 0, 0, good));
	SAY("other-type", io_now(&ring, fd, _IOWR('x', 0x20, struct ublksrv_io_cmd), 0, 0, 0, good));
	for (q = 0; q < QUEUES; q++) {
		for (tag = 0; tag < DEPTH; tag++) {
			long res = io_now(&ring, fd, UBLK_U_IO_FETCH_REQ, q, tag, 0,
					  user_copy ? 0 : (uintptr_t)bufs[q * DEPTH + tag]);

			if (res != 1000)
				SAY("fetch", res);
		}
		if (!q)
			SAY("fetch.again", io_now(&ring, fd, UBLK_U_IO_FETCH_REQ, 0, 0, 0, good));
	}
	SAY("fetch.when-ready", io_now(&ring, fd, UBLK_U_IO_FETCH_REQ, 0, 0, 0, good));
	SAY("commit.when-idle", io_now(&ring, fd, UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0, 0, 0, good));
	SAY("start.no-pid", control(&c, UBLK_U_CMD_START_DEV, id, NULL, 0, 0));
	/* nothing has to be served for a start without a look at partitions; the in-kernel driver may look */
	starter = fork();
	if (!starter) {
		struct control other;

		control_open(&other);
		_exit(-control(&other, UBLK_U_CMD_START_DEV, id, NULL, 0, getppid()));
	}
	for (;;) {
		struct __kernel_timespec ts = { 0, 50000000 };

		if (waitpid(starter, &err, WNOHANG))
			break;
		if (!io_uring_wait_cqe_timeout(&ring, &cqe, &ts)) {
			tag = cqe->user_data;
			io_uring_cqe_seen(&ring, cqe);
			for (q = 0; q < QUEUES; q++)
				io_now(&ring, fd, UBLK_U_IO_COMMIT_AND_FETCH_REQ, q, tag, 4096,
				       user_copy ? 0 : (uintptr_t)bufs[q * DEPTH + tag]);
		}
	}
	SAY("start", -WEXITSTATUS(err));
	SAY("start.again.params", set_params(&c, id, &params));
	SAY("recovery.of-a-live-one", control(&c, UBLK_U_CMD_START_USER_RECOVERY, id, NULL, 0, 0));

	for (r.write = 0; r.write < 2; r.write++) {
		const char *op = r.write ? "write" : "read";
		struct __kernel_timespec ts = { 5, 0 };
		char buf[512];
		off_t pos;

		pthread_create(&thread, NULL, reader, &r);
		do {
			err = io_uring_wait_cqe_timeout(&ring, &cqe, &ts);
			if (err)
				break;
			tag = cqe->user_data;
			snprintf(name, sizeof(name), "%s.%s.delivered", kind, op);
			say(name, cqe->res);
			io_uring_cqe_seen(&ring, cqe);
		} while (0);
		busy_tag = tag;
		/* the queue is whose descriptor is this request and whose tag isn't idle */
		for (busy_q = 0; busy_q < QUEUES; busy_q++) {
			long res = io_now(&ring, fd, UBLK_U_IO_FETCH_REQ, busy_q, busy_tag, 0, good);

			(void)res;
			if (io_now(&ring, fd, UBLK_U_IO_COMMIT_AND_FETCH_REQ, busy_q, busy_tag, 0, bad) != -EBUSY)
				break;
		}
		snprintf(name, sizeof(name), "%s.%s.op", kind, op);
		say(name, busy_q < QUEUES ? (long)descs[busy_q][busy_tag].op_flags & 0xff : -1);
		if (busy_q == QUEUES)
			break;
		if (flags & UBLK_F_NEED_GET_DATA && r.write) {
			snprintf(name, sizeof(name), "%s.%s.commit-without-data", kind, op);
			say(name, io_now(&ring, fd, UBLK_U_IO_COMMIT_AND_FETCH_REQ, busy_q, busy_tag, 4096, good));
			/* the CQE may take the way through task work: wait for it */
			io_cmd(&ring, fd, UBLK_U_IO_NEED_GET_DATA, busy_q, busy_tag, 0, good);
			io_uring_submit(&ring);
			err = io_uring_wait_cqe_timeout(&ring, &cqe, &ts);
			snprintf(name, sizeof(name), "%s.%s.get-data", kind, op);
			say(name, err ? err : cqe->res);
			if (!err)
				io_uring_cqe_seen(&ring, cqe);
		} else {
			snprintf(name, sizeof(name), "%s.%s.get-data", kind, op);
			say(name, io_now(&ring, fd, UBLK_U_IO_NEED_GET_DATA, busy_q, busy_tag, 0, good));
		}
		pos = UBLKSRV_IO_BUF_OFFSET + ((off_t)busy_q << UBLK_QID_OFF) + ((off_t)busy_tag << UBLK_TAG_OFF);
		snprintf(name, sizeof(name), "%s.%s.pread", kind, op);
		say(name, (err = pread(fd, buf, 512, pos)) < 0 ? -errno : err);
		snprintf(name, sizeof(name), "%s.%s.pwrite", kind, op);
		say(name, (err = pwrite(fd, buf, 512, pos)) < 0 ? -errno : err);
		snprintf(name, sizeof(name), "%s.%s.pread-past-end", kind, op);
		say(name, (err = pread(fd, buf, 512, pos + 8192)) < 0 ? -errno : err);
		snprintf(name, sizeof(name), "%s.%s.pread-at-end", kind, op);
		say(name, (err = pread(fd, buf, 512, pos + 4096)) < 0 ? -errno : err);
		snprintf(name, sizeof(name), "%s.%s.pread-idle", kind, op);
		say(name, (err = pread(fd, buf, 512, pos ^ (1 << UBLK_TAG_OFF))) < 0 ? -errno : err);
		snprintf(name, sizeof(name), "%s.%s.pread-low", kind, op);
		say(name, (err = pread(fd, buf, 512, 0)) < 0 ? -errno : err);
		snprintf(name, sizeof(name), "%s.%s.commit", kind, op);
		say(name, io_now(&ring, fd, UBLK_U_IO_COMMIT_AND_FETCH_REQ, busy_q, busy_tag, 4096, good));
		pthread_join(thread, NULL);
		snprintf(name, sizeof(name), "%s.%s.result", kind, op);
		say(name, r.result);
	}
	SAY("stop", control(&c, UBLK_U_CMD_STOP_DEV, id, NULL, 0, 0));
	for (q = 0, err = 0; q < QUEUES * DEPTH; q++) {
		struct __kernel_timespec ts = { 2, 0 };

		if (io_uring_wait_cqe_timeout(&ring, &cqe, &ts))
			break;
		err += cqe->res == -ENODEV;
		io_uring_cqe_seen(&ring, cqe);
	}
	SAY("stop.tags-back", err);
	SAY("stop.again", control(&c, UBLK_U_CMD_STOP_DEV, id, NULL, 0, 0));
	SAY("fetch.after-stop", io_now(&ring, fd, UBLK_U_IO_FETCH_REQ, 0, 0, 0, good));
	io_uring_queue_exit(&ring);
	for (q = 0; q < QUEUES; q++)
		munmap(descs[q], descs_size(DEPTH));
	close(fd);
	drop(id);
}

int main(void)
{
	if (getuid())
		return 77;
	setvbuf(stdout, NULL, _IOLBF, 0);
	control_open(&c);
	control(&c, UBLK_U_CMD_GET_FEATURES, ~0u, &features, sizeof(features), 0);
	add_cases();
	control_cases();
	param_cases();
	io_cases("copy", 0);
	io_cases("user-copy", UBLK_F_USER_COPY);
	io_cases("get-data", UBLK_F_NEED_GET_DATA);
	return 0;
}
