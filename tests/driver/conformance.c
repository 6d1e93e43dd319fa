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

	must(err, "add");
	return info.dev_id;
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
		delete_device(&c, info.dev_id);
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
	delete_device(&c, id);
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
	delete_device(&c, id);
}

/* Where the readers below read and write: nobody who looks at a new disk does it here. */
#define SECTOR 8200
#define PENDING 1000

struct server {
	struct io_uring ring;
	int fd;
	struct ublksrv_io_desc *descs[QUEUES];
	uint64_t flags;
	unsigned int asked;	/* number of the last command */
	unsigned int back;	/* tags given back */
	unsigned int op;	/* of the reader's request */
	struct delivery {
		bool there;
		unsigned int q, tag;
		int res;
	} request;		/* the reader's */
};

/* The tag's buffer, or 0 where there are none. */
static uint64_t buffer(const struct server *s, unsigned int q, unsigned int tag)
{
	static char bufs[QUEUES * DEPTH][MAX_IO];

	return s->flags & UBLK_F_USER_COPY ? 0 : (uintptr_t)bufs[q * DEPTH + tag];
}

static void send_io(struct server *s, uint32_t op, unsigned int q, unsigned int tag, int res, uint64_t addr)
{
	struct io_uring_sqe *sqe = io_cmd(&s->ring, s->fd, op, q, tag, res, addr);

	sqe->user_data = (uint64_t)++s->asked << 32 | q << 16 | tag;
	io_uring_submit(&s->ring);
}

/* A tag comes back: with the reader's request, or with one of somebody else, which is served at once. */
static void deliver(struct server *s, unsigned int q, unsigned int tag, int res)
{
	struct ublksrv_io_desc *desc;

	if (res == -ENODEV) {
		s->back++;
		return;
	}
	if (res < 0 || q >= QUEUES || tag >= DEPTH) {
		errno = -res;
		die("a command failed that should not");
	}
	desc = &s->descs[q][tag];
	if (desc->start_sector == SECTOR && ublksrv_get_op(desc) == s->op && !s->request.there)
		s->request = (struct delivery){ true, q, tag, res };
	else if (res == UBLK_IO_RES_NEED_GET_DATA)
		send_io(s, UBLK_U_IO_NEED_GET_DATA, q, tag, 0, buffer(s, q, tag));
	else
		send_io(s, UBLK_U_IO_COMMIT_AND_FETCH_REQ, q, tag, desc->nr_sectors << 9, buffer(s, q, tag));
}

/* All that has come. The result of command number `of`, if it is among it and is no request. */
static long drain(struct server *s, unsigned int of)
{
	struct io_uring_cqe *cqe;
	long result = PENDING;

	while (!io_uring_peek_cqe(&s->ring, &cqe)) {
		uint64_t whose = cqe->user_data;
		int res = cqe->res;

		io_uring_cqe_seen(&s->ring, cqe);
		if (of && whose >> 32 == of && res < 0)
			result = res;
		else
			deliver(s, whose >> 16 & 0xffff, whose & 0xffff, res);
	}
	return result;
}

/* Wait a little for more. */
static void pump(struct server *s)
{
	if (next_cqe(&s->ring))
		drain(s, 0);
}

/* One I/O command and what it says at once: PENDING if it wasn't refused. */
static long io_now(struct server *s, uint32_t op, unsigned int q, unsigned int tag, int res, uint64_t addr)
{
	send_io(s, op, q, tag, res, addr);
	return drain(s, s->asked);
}

/* NEED_GET_DATA, and its result, which may come a little later. */
static long get_data(struct server *s, uint64_t addr)
{
	const struct delivery *d = &s->request;
	unsigned int number;

	send_io(s, UBLK_U_IO_NEED_GET_DATA, d->q, d->tag, 0, addr);
	for (number = s->asked;;) {
		struct io_uring_cqe *cqe;
		uint64_t whose;
		int res;

		if (io_uring_wait_cqe(&s->ring, &cqe))
			continue;
		whose = cqe->user_data;
		res = cqe->res;
		io_uring_cqe_seen(&s->ring, cqe);
		if (whose >> 32 == number)
			return res;
		deliver(s, whose >> 16 & 0xffff, whose & 0xffff, res);
	}
}

/* A control command given by another process while we serve: it may wait for us. */
static int control_and_serve(struct server *s, uint32_t op, uint32_t id, uint64_t data)
{
	pid_t pid = fork();
	int status;

	if (!pid) {
		struct control other;

		control_open(&other);
		_exit(-control(&other, op, id, NULL, 0, data));
	}
	while (!waitpid(pid, &status, WNOHANG))
		pump(s);
	return -WEXITSTATUS(status);
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
	bool done;
};

static void *reader(void *arg)
{
	static char buf[4096] __attribute__((aligned(4096)));
	struct reader *r = arg;
	char path[32];
	int fd;

	snprintf(path, sizeof(path), "/dev/ublkb%u", r->id);
	fd = open(path, O_RDWR | O_DIRECT);
	r->result = fd < 0 ? -errno : r->write ? pwrite(fd, buf, 4096, SECTOR << 9) :
						 pread(fd, buf, 4096, SECTOR << 9);
	if (r->result < 0)
		r->result = -errno;
	close(fd);
	__atomic_store_n(&r->done, true, __ATOMIC_RELEASE);
	return NULL;
}

static void say_of(const char *kind, const char *op, const char *what, long result)
{
	char name[96];

	if (op)
		snprintf(name, sizeof(name), "%s.%s.%s", kind, op, what);
	else
		snprintf(name, sizeof(name), "%s.%s", kind, what);
	say(name, result);
}

static long copied(ssize_t bytes)
{
	return bytes < 0 ? -errno : bytes;
}

/* A request that is with the server, which does each thing that it should not, and then answers. */
static void request_cases(struct server *s, const char *kind, uint32_t id, int write)
{
	const char *op = write ? "write" : "read";
	struct delivery *d = &s->request;
	struct reader r = { .id = id, .write = write };
	bool user_copy = s->flags & UBLK_F_USER_COPY;
	pthread_t thread;
	char buf[512];
	uint64_t good, bad;
	off_t pos;

	s->op = write ? UBLK_IO_OP_WRITE : UBLK_IO_OP_READ;
	d->there = false;
	pthread_create(&thread, NULL, reader, &r);
	while (!d->there)
		pump(s);
	good = buffer(s, d->q, d->tag);
	bad = user_copy ? (uintptr_t)buf : 0;
	say_of(kind, op, "delivered", d->res);
	say_of(kind, op, "op", s->descs[d->q][d->tag].op_flags & 0xff);
	say_of(kind, op, "sectors", s->descs[d->q][d->tag].nr_sectors);
	say_of(kind, op, "fetch", io_now(s, UBLK_U_IO_FETCH_REQ, d->q, d->tag, 0, good));
	say_of(kind, op, "commit-bad-address",
	       io_now(s, UBLK_U_IO_COMMIT_AND_FETCH_REQ, d->q, d->tag, 4096, bad));
	if (s->flags & UBLK_F_NEED_GET_DATA && write)
		say_of(kind, op, "commit-without-data",
		       io_now(s, UBLK_U_IO_COMMIT_AND_FETCH_REQ, d->q, d->tag, 4096, good));
	say_of(kind, op, "get-data", get_data(s, good));
	pos = UBLKSRV_IO_BUF_OFFSET + ((off_t)d->q << UBLK_QID_OFF) + ((off_t)d->tag << UBLK_TAG_OFF);
	say_of(kind, op, "pread", copied(pread(s->fd, buf, 512, pos)));
	say_of(kind, op, "pwrite", copied(pwrite(s->fd, buf, 512, pos)));
	say_of(kind, op, "pread-past-end", copied(pread(s->fd, buf, 512, pos + 8192)));
	say_of(kind, op, "pread-at-end", copied(pread(s->fd, buf, 512, pos + 4096)));
	say_of(kind, op, "pread-idle", copied(pread(s->fd, buf, 512, pos ^ (1 << UBLK_TAG_OFF))));
	say_of(kind, op, "pread-low", copied(pread(s->fd, buf, 512, 0)));
	say_of(kind, op, "commit", io_now(s, UBLK_U_IO_COMMIT_AND_FETCH_REQ, d->q, d->tag, 4096, good));
	while (!__atomic_load_n(&r.done, __ATOMIC_ACQUIRE))
		pump(s);
	pthread_join(thread, NULL);
	say_of(kind, op, "result", r.result);
}

/* A live device. */
static void io_cases(const char *kind, uint64_t flags)
{
	uint32_t id = make(flags | UBLK_F_NO_AUTO_PART_SCAN);
	struct ublk_params params = plain_params(BYTES);
	struct server s = { .flags = flags };
	unsigned int q, tag;
	uint64_t good, bad;

#define SAY(what, value) say_of(kind, NULL, what, value)
	file_cases(id);
	set_params(&c, id, &params);
	s.fd = open_char(id);
	for (q = 0; q < QUEUES; q++)
		s.descs[q] = map_queue(s.fd, q, DEPTH);
	io_uring_queue_init(64, &s.ring, 0);
	good = buffer(&s, 0, 0);
	bad = good ? 0 : (uintptr_t)&s;
	SAY("fetch.no-queue", io_now(&s, UBLK_U_IO_FETCH_REQ, QUEUES, 0, 0, good));
	SAY("fetch.no-tag", io_now(&s, UBLK_U_IO_FETCH_REQ, 0, DEPTH, 0, good));
	if (!(flags & UBLK_F_NEED_GET_DATA))
		SAY("fetch.address", io_now(&s, UBLK_U_IO_FETCH_REQ, 0, 0, 0, bad));
	SAY("commit.before-fetch", io_now(&s, UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0, 0, 0, good));
	SAY("get-data.before-fetch", io_now(&s, UBLK_U_IO_NEED_GET_DATA, 0, 0, 0, good));
	SAY("unknown-command", io_now(&s, _IOWR('u', 0x3f, struct ublksrv_io_cmd), 0, 0, 0, good));
	SAY("other-type", io_now(&s, _IOWR('x', 0x20, struct ublksrv_io_cmd), 0, 0, 0, good));
	for (q = 0; q < QUEUES; q++) {
		for (tag = 0; tag < DEPTH; tag++) {
			long res = io_now(&s, UBLK_U_IO_FETCH_REQ, q, tag, 0, buffer(&s, q, tag));

			if (res != PENDING)
				SAY("fetch", res);
		}
		if (!q)
			SAY("fetch.again", io_now(&s, UBLK_U_IO_FETCH_REQ, 0, 0, 0, good));
	}
	SAY("fetch.when-ready", io_now(&s, UBLK_U_IO_FETCH_REQ, 0, 0, 0, good));
	SAY("commit.when-idle", io_now(&s, UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0, 0, 0, good));
	SAY("start.no-pid", control(&c, UBLK_U_CMD_START_DEV, id, NULL, 0, 0));
	SAY("start", control_and_serve(&s, UBLK_U_CMD_START_DEV, id, getpid()));
	SAY("start.again.params", set_params(&c, id, &params));
	SAY("recovery.of-a-live-one", control(&c, UBLK_U_CMD_START_USER_RECOVERY, id, NULL, 0, 0));
	request_cases(&s, kind, id, 0);
	request_cases(&s, kind, id, 1);
	SAY("stop", control_and_serve(&s, UBLK_U_CMD_STOP_DEV, id, 0));
	while (s.back < QUEUES * DEPTH)
		pump(&s);
	SAY("stop.again", control(&c, UBLK_U_CMD_STOP_DEV, id, NULL, 0, 0));
	SAY("fetch.after-stop", io_now(&s, UBLK_U_IO_FETCH_REQ, 0, 0, 0, good));
	io_uring_queue_exit(&s.ring);
	for (q = 0; q < QUEUES; q++)
		munmap(s.descs[q], descs_size(DEPTH));
	close(s.fd);
	delete_device(&c, id);
#undef SAY
}

int main(void)
{
	if (getuid())
		return 77;
	setvbuf(stdout, NULL, _IOLBF, 0);
	control_open(&c);
	control(&c, UBLK_U_CMD_GET_FEATURES, ~0u, &features, sizeof(features), 0);
	say("features", features);
	add_cases();
	control_cases();
	param_cases();
	io_cases("copy", 0);
	io_cases("user-copy", UBLK_F_USER_COPY);
	io_cases("get-data", UBLK_F_NEED_GET_DATA);
	return 0;
}
