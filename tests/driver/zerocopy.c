/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Requests in a ring's table of registered buffers, and commands for many tags
 * at once: legal and not, for any ublk driver. One line "name result" each.
 *
 *   zerocopy            all that the drivers are to agree on
 *   zerocopy death      servers that die with a request, and with it in a table that lives on
 */
#include <poll.h>
#include <pthread.h>
#include <signal.h>

#include "client.h"

#define DEPTH 4
#define BYTES (8 << 20)
#define LEN 8192
#define SLOTS 32
#define PENDING 1000
#define GROUP 3
#define LISTS 16

/* Where the users below read and write: nobody who looks at a new disk does it here. */
#define SECTOR 8200

static struct control c;
static int backing; /* what the disk has at SECTOR is here at 0 */

static void say(const char *kind, const char *what, long result)
{
	if (kind)
		printf("%s.", kind);
	printf("%s %ld\n", what, result);
	fflush(stdout);
}

struct server {
	const char *kind;
	uint64_t flags;
	uint32_t id;
	struct io_uring ring;
	int fd;
	struct ublksrv_io_desc *descs;
	unsigned int asked;		/* number of the last command */
	unsigned int back;		/* tags given back */
	/* the user's requests that are here */
	unsigned int tags[DEPTH];
	unsigned int n;
	/* batch: lists of tags */
	struct io_uring_buf_ring *lists;
	uint16_t (*lists_mem)[DEPTH];
	unsigned int fetch;		/* number of the FETCH */
	long ended;			/* its result, PENDING while it runs */
	unsigned int longest;		/* list */
};

#define SAY(what, value) say(s->kind, what, value)

static char bufs[DEPTH][MAX_IO] __attribute__((aligned(4096)));

static bool has(const struct server *s, uint64_t flag)
{
	return s->flags & flag;
}

static uint64_t buffer(const struct server *s, unsigned int tag)
{
	return has(s, UBLK_F_USER_COPY | UBLK_F_SUPPORT_ZERO_COPY | UBLK_F_AUTO_BUF_REG) ? 0 : (uintptr_t)bufs[tag];
}

/* The number of a command that was queued. */
static unsigned int number(struct server *s, struct io_uring_sqe *sqe, unsigned int tag)
{
	sqe->user_data = (uint64_t)++s->asked << 32 | tag;
	return s->asked;
}

#define AUTO(index, flags) ((index) | (uint64_t)(flags) << 16)

static struct io_uring_sqe *tag_cmd(struct server *s, uint32_t op, unsigned int q, unsigned int tag, int res,
				    uint64_t addr, uint64_t automatic)
{
	struct io_uring_sqe *sqe = io_cmd(&s->ring, s->fd, op, q, tag, res, addr);

	if (op == UBLK_U_IO_FETCH_REQ || op == UBLK_U_IO_COMMIT_AND_FETCH_REQ)
		sqe->addr = automatic;
	number(s, sqe, tag);
	return sqe;
}

static struct io_uring_sqe *batch(struct server *s, uint32_t op, struct ublk_batch_io cmd, const void *elems)
{
	struct io_uring_sqe *sqe = batch_cmd(&s->ring, s->fd, op, &cmd, elems, GROUP);

	number(s, sqe, 0);
	return sqe;
}

struct elem {
	struct ublk_elem_header head;
	uint64_t addr;
};

static uint16_t batch_flags(const struct server *s)
{
	return buffer(s, 0) ? UBLK_BATCH_F_HAS_BUF_ADDR : 0;
}

/* Elements for these tags, as this kind of device has them. */
static unsigned int elems(const struct server *s, void *to, const unsigned int *tags, unsigned int n, int res)
{
	unsigned int size = elem_size(batch_flags(s));

	for (unsigned int i = 0; i < n; i++) {
		struct elem e = {
			.head = { .tag = tags[i], .buf_index = tags[i], .result = res },
			.addr = buffer(s, tags[i] % DEPTH),
		};

		memcpy((char *)to + i * size, &e, size);
	}
	return size;
}

static struct ublk_batch_io batch_io(const struct server *s, unsigned int n)
{
	return (struct ublk_batch_io){
		.flags = batch_flags(s), .nr_elem = n, .elem_bytes = elem_size(batch_flags(s)),
	};
}

static void send_batch(struct server *s, uint32_t op, const unsigned int *tags, unsigned int n, int res)
{
	static char mem[64][16 * DEPTH];
	char *to = mem[s->asked % 64];

	elems(s, to, tags, n, res);
	batch(s, op, batch_io(s, n), to);
	io_uring_submit(&s->ring);
}

static void answer(struct server *s, unsigned int tag, int res)
{
	if (has(s, UBLK_F_BATCH_IO)) {
		send_batch(s, UBLK_U_IO_COMMIT_IO_CMDS, &tag, 1, res);
		return;
	}
	tag_cmd(s, UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0, tag, res, buffer(s, tag),
		AUTO(tag, UBLK_AUTO_BUF_REG_FALLBACK));
	io_uring_submit(&s->ring);
}

/* A request: of our user, or of somebody else, which is answered at once. */
static void deliver(struct server *s, unsigned int tag)
{
	struct ublksrv_io_desc *desc;

	if (tag >= DEPTH) {
		errno = ERANGE;
		die("a tag that there is not");
	}
	desc = &s->descs[tag];
	if (desc->start_sector >= SECTOR && desc->start_sector < SECTOR + 256 && ublksrv_get_op(desc) < 2)
		s->tags[s->n++] = tag;
	else
		answer(s, tag, desc->nr_sectors << 9);
}

static void provide_list(struct server *s, unsigned int id, void *to, unsigned int bytes)
{
	io_uring_buf_ring_add(s->lists, to, bytes, id, io_uring_buf_ring_mask(LISTS), 0);
	io_uring_buf_ring_advance(s->lists, 1);
}

static void fetch_cqe(struct server *s, int res, unsigned int flags)
{
	unsigned int id = flags >> IORING_CQE_BUFFER_SHIFT;

	if (flags & IORING_CQE_F_BUFFER) {
		if (res / 2u > s->longest)
			s->longest = res / 2;
		for (int i = 0; i < res / 2; i++)
			deliver(s, s->lists_mem[id][i]);
	}
	if (!(flags & IORING_CQE_F_MORE))
		s->ended = res;
}

/* All that has come. The result of command number `of`, if it is among it. */
static long drain(struct server *s, unsigned int of)
{
	struct io_uring_cqe *cqe;
	long result = PENDING;

	while (!io_uring_peek_cqe(&s->ring, &cqe)) {
		unsigned int whose = cqe->user_data >> 32, tag = cqe->user_data, flags = cqe->flags;
		int res = cqe->res;

		io_uring_cqe_seen(&s->ring, cqe);
		if (whose == s->fetch && has(s, UBLK_F_BATCH_IO))
			fetch_cqe(s, res, flags);
		else if (whose == of)
			result = res;
		else if (has(s, UBLK_F_BATCH_IO))
			continue;
		else if (res == -ENODEV)
			s->back++;
		else if (!res)
			deliver(s, tag);
	}
	return result;
}

/* Wait a little for more. */
static void pump(struct server *s)
{
	if (next_cqe(&s->ring))
		drain(s, 0);
}

/* What the command that was queued says at once: PENDING if nothing. */
static long now(struct server *s)
{
	unsigned int of = s->asked;

	io_uring_submit(&s->ring);
	return drain(s, of);
}

static long wait_for(struct server *s)
{
	unsigned int of = s->asked;
	long res = now(s);

	while (res == PENDING) {
		struct pollfd p = { s->ring.ring_fd, POLLIN, 0 };

		poll(&p, 1, 20);
		res = drain(s, of);
	}
	return res;
}

static long tag_now(struct server *s, uint32_t op, unsigned int q, unsigned int tag, int res, uint64_t addr,
		    uint64_t automatic)
{
	tag_cmd(s, op, q, tag, res, addr, automatic);
	return now(s);
}

static long reg(struct server *s, unsigned int tag, uint64_t index)
{
	return tag_now(s, UBLK_U_IO_REGISTER_IO_BUF, 0, tag, 0, index, 0);
}

static long unreg(struct server *s, uint64_t index)
{
	return tag_now(s, UBLK_U_IO_UNREGISTER_IO_BUF, 0, 0, 0, index, 0);
}

/* Between the backing file and a registered buffer: what a write has, or what a read is to get. */
static long fixed(struct server *s, bool write_out, unsigned int index, unsigned int off, unsigned int len)
{
	struct io_uring_sqe *sqe = get_sqe(&s->ring, sizeof(*sqe));

	if (write_out)
		io_uring_prep_write_fixed(sqe, backing, (void *)(uintptr_t)off, len, off, index);
	else
		io_uring_prep_read_fixed(sqe, backing, (void *)(uintptr_t)off, len, off, index);
	number(s, sqe, 0);
	return wait_for(s);
}

/* A control command given by another process while we serve: it may wait for us. */
static int control_and_serve(struct server *s, uint32_t op, uint64_t data)
{
	pid_t pid = fork();
	int status;

	if (!pid) {
		struct control other;

		control_open(&other);
		_exit(-control(&other, op, s->id, NULL, 0, data));
	}
	while (!waitpid(pid, &status, WNOHANG))
		pump(s);
	return -WEXITSTATUS(status);
}

struct user {
	uint32_t id;
	bool write;
	unsigned int at; /* number of its place */
	unsigned char seed;
	long result;
	long wrong; /* bytes that were read */
	bool done;
	pthread_t thread;
};

static void *use(void *arg)
{
	struct user *u = arg;
	unsigned char *buf = aligned_alloc(4096, LEN);
	/* apart, so that no two become one request */
	off_t at = (SECTOR << 9) + u->at * 2 * LEN;
	char path[32];
	int fd;

	snprintf(path, sizeof(path), "/dev/ublkb%u", u->id);
	fd = open(path, O_RDWR | O_DIRECT);
	memset(buf, u->write ? u->seed : ~u->seed, LEN);
	u->result = fd < 0 ? -1 : u->write ? pwrite(fd, buf, LEN, at) : pread(fd, buf, LEN, at);
	if (u->result < 0)
		u->result = -errno;
	else
		for (int i = 0; i < LEN; i++)
			u->wrong += buf[i] != u->seed;
	close(fd);
	free(buf);
	__atomic_store_n(&u->done, true, __ATOMIC_RELEASE);
	return NULL;
}

static void begin(struct server *s, struct user *u, bool write, unsigned int at, unsigned char seed)
{
	*u = (struct user){ .id = s->id, .write = write, .at = at, .seed = seed };
	pthread_create(&u->thread, NULL, use, u);
}

static bool is_done(struct user *u)
{
	return __atomic_load_n(&u->done, __ATOMIC_ACQUIRE);
}

/* Until the user's request is here: its tag. */
static unsigned int await(struct server *s)
{
	while (!s->n)
		pump(s);
	return s->tags[--s->n];
}

static void finish(struct server *s, struct user *u, const char *what)
{
	char name[64];

	while (!is_done(u))
		pump(s);
	pthread_join(u->thread, NULL);
	snprintf(name, sizeof(name), "%s.result", what);
	say(s->kind, name, u->result);
	snprintf(name, sizeof(name), "%s.wrong", what);
	say(s->kind, name, u->wrong);
}

/* The user still waits, after it has had time not to. */
static long kept(struct server *s, struct user *u)
{
	for (int i = 0; i < 10; i++) {
		usleep(20000);
		drain(s, 0);
	}
	return !is_done(u);
}

static void open_server(struct server *s)
{
	struct io_uring_params p = { .flags = IORING_SETUP_CQSIZE, .cq_entries = 256 };
	int err;

	s->fd = open_char(s->id);
	s->descs = map_queue(s->fd, 0, DEPTH);
	err = io_uring_queue_init_params(64, &s->ring, &p);
	if (!err)
		err = io_uring_register_buffers_sparse(&s->ring, SLOTS);
	if (err || s->fd < 0 || s->descs == MAP_FAILED)
		die("a server");
}

static void close_server(struct server *s)
{
	io_uring_queue_exit(&s->ring);
	munmap(s->descs, descs_size(DEPTH));
	close(s->fd);
}

static struct server make(const char *kind, uint64_t flags)
{
	struct server s = { .kind = kind, .flags = flags };
	struct ublk_params params = plain_params(BYTES);
	struct ublksrv_ctrl_dev_info info;
	int err = add(&c, &info, 1, DEPTH, flags | UBLK_F_NO_AUTO_PART_SCAN);

	s.id = info.dev_id;
	if (!err)
		err = set_params(&c, s.id, &params);
	must(err, "add");
	return s;
}

static void add_cases(void)
{
	static const struct {
		const char *name;
		uint64_t flags;
	} cases[] = {
		{ "zero-copy", UBLK_F_SUPPORT_ZERO_COPY },
		{ "zero-copy-get-data", UBLK_F_SUPPORT_ZERO_COPY | UBLK_F_NEED_GET_DATA },
		{ "auto", UBLK_F_AUTO_BUF_REG },
		{ "auto-get-data", UBLK_F_AUTO_BUF_REG | UBLK_F_NEED_GET_DATA },
		{ "all-ways", UBLK_F_AUTO_BUF_REG | UBLK_F_SUPPORT_ZERO_COPY | UBLK_F_USER_COPY },
		{ "batch", UBLK_F_BATCH_IO },
		{ "batch-get-data", UBLK_F_BATCH_IO | UBLK_F_NEED_GET_DATA },
		{ "batch-auto", UBLK_F_BATCH_IO | UBLK_F_AUTO_BUF_REG },
		{ "zoned", UBLK_F_ZONED },
		{ "zoned-auto", UBLK_F_ZONED | UBLK_F_AUTO_BUF_REG },
		{ "zoned-zero-copy", UBLK_F_ZONED | UBLK_F_SUPPORT_ZERO_COPY },
	};
	const uint64_t told = UBLK_F_SUPPORT_ZERO_COPY | UBLK_F_AUTO_BUF_REG | UBLK_F_USER_COPY | UBLK_F_BATCH_IO |
			      UBLK_F_NEED_GET_DATA | UBLK_F_PER_IO_DAEMON | UBLK_F_BUF_REG_OFF_DAEMON | UBLK_F_ZONED;

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct ublksrv_ctrl_dev_info info;
		int err = add(&c, &info, 1, 2, cases[i].flags);

		say("add", cases[i].name, err ? err : (long)(info.flags & told));
		if (!err)
			control(&c, UBLK_U_CMD_DEL_DEV, info.dev_id, NULL, 0, 0);
	}
}

/* A request of the user's that is with the server, which does all that can be done with its pages. */
static void buffer_cases(struct server *s, bool write)
{
	bool automatic = has(s, UBLK_F_AUTO_BUF_REG);
	char kind[32], mem[4096];
	const char *whole = s->kind;
	struct iovec vec = { mem, sizeof(mem) };
	struct io_uring_rsrc_update2 update = { .offset = 9, .data = (uintptr_t)&vec, .nr = 1 };
	struct server other = *s;
	struct user u;
	unsigned int tag, idle;
	long res, late;

	snprintf(kind, sizeof(kind), "%s.%s", whole, write ? "write" : "read");
	s->kind = kind;
	begin(s, &u, write, 0, 0x5a);
	tag = await(s);
	idle = (tag + 1) % DEPTH;
	SAY("op", ublksrv_get_op(&s->descs[tag]));
	SAY("to-register", !!(s->descs[tag].op_flags & UBLK_IO_F_NEED_REG_BUF));
	SAY("sectors", s->descs[tag].nr_sectors);
	if (automatic)
		SAY("auto.slot", reg(s, tag, tag));
	else
		SAY("fixed.early", fixed(s, write, 8, 0, LEN));
	SAY("register.no-slot", reg(s, tag, SLOTS));
	SAY("register.huge-index", reg(s, tag, 1ull << 32 | 20) < 0 ? -1 : unreg(s, 20));
	SAY("register.no-tag", reg(s, DEPTH, 8));
	SAY("register.no-queue", tag_now(s, UBLK_U_IO_REGISTER_IO_BUF, 1, tag, 0, 8, 0));
	SAY("register.idle", reg(s, idle, 8));
	res = reg(s, tag, 8);
	SAY("register", res);
	if (!res) {
		SAY("register.busy", reg(s, tag, 8));
		SAY("register.twice", reg(s, tag, 10));
		SAY("fixed.wrong-way", fixed(s, !write, 8, 0, LEN));
		SAY("fixed.past-end", fixed(s, write, 8, 4096, LEN));
		SAY("fixed.part", fixed(s, write, 10, 512, 1024));
		SAY("unregister.twice", unreg(s, 10));
	}
	io_uring_register(s->ring.ring_fd, IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof(update));
	SAY("unregister.ordinary", unreg(s, 9));
	SAY("unregister.empty", unreg(s, 11));
	SAY("unregister.no-slot", unreg(s, SLOTS));
	SAY("unregister.other-tag", tag_now(s, UBLK_U_IO_UNREGISTER_IO_BUF, 7, 4000, 0, 8, 0));
	SAY("unregister.again", unreg(s, 8));
	/* any task, any ring */
	io_uring_queue_init(8, &other.ring, 0);
	SAY("other-ring.no-table", reg(&other, tag, 8));
	io_uring_register_buffers_sparse(&other.ring, SLOTS);
	res = reg(&other, tag, 8);
	SAY("other-ring.register", res);
	if (!res)
		SAY("other-ring.fixed", fixed(&other, write, 8, 0, LEN));
	else if (automatic)
		SAY("auto.fixed", fixed(s, write, tag, 0, LEN));
	if (!has(s, UBLK_F_BATCH_IO)) {
		SAY("commit.address", tag_now(s, UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0, tag, LEN, 1, AUTO(tag, 0)));
		if (automatic)
			SAY("commit.bad-flag", tag_now(s, UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0, tag, LEN, 0, AUTO(tag, 2)));
	}
	answer(s, tag, LEN);
	SAY("kept", kept(s, &u) == !res);
	late = reg(s, tag, 8);
	SAY("late.register", late);
	if (!late)
		unreg(s, 8);
	if (!res)
		SAY("other-ring.unregister", unreg(&other, 8));
	finish(s, &u, "user");
	SAY("auto.gone", unreg(s, tag));
	io_uring_queue_exit(&other.ring);
	s->kind = whole;
}

/* Automatic registration that doesn't find its place. */
static void auto_cases(struct server *s)
{
	struct server other = *s;
	struct user u;
	unsigned int tag, i;

	/* in the places of all tags: one is given back by the answer, the others by what comes in their place */
	begin(s, &u, true, 0, 0x11);
	tag = await(s);
	for (i = 0; i < DEPTH; i++)
		if (i != tag)
			reg(s, tag, i);
	answer(s, tag, LEN);
	SAY("auto.kept", kept(s, &u));
	for (i = 0; i < SLOTS; i++) {
		struct iovec vec = { bufs[0], 4096 };
		struct io_uring_rsrc_update2 update = { .offset = i, .data = (uintptr_t)&vec, .nr = 1 };

		io_uring_register(s->ring.ring_fd, IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof(update));
	}
	finish(s, &u, "auto.all-updated");
	begin(s, &u, true, 0, 0x22);
	tag = await(s);
	SAY("fallback.to-register", !!(s->descs[tag].op_flags & UBLK_IO_F_NEED_REG_BUF));
	SAY("fallback.unregister", unreg(s, tag));
	/* all tags without the fallback from now on */
	tag_cmd(s, UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0, tag, LEN, 0, AUTO(tag, 0));
	io_uring_submit(&s->ring);
	finish(s, &u, "fallback");
	for (i = 0; i < DEPTH + 1; i++) {
		begin(s, &u, true, 0, 0x33);
		while (!is_done(&u) && !s->n)
			pump(s);
		if (!s->n)
			break;
		tag = await(s);
		tag_cmd(s, UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0, tag, LEN, 0, AUTO(tag, 0));
		io_uring_submit(&s->ring);
		while (!is_done(&u))
			pump(s);
		pthread_join(u.thread, NULL);
	}
	finish(s, &u, "no-fallback");
	io_uring_unregister_buffers(&s->ring);
	io_uring_register_buffers_sparse(&s->ring, SLOTS);
	/* answered through another ring, which has no such buffer */
	do {
		begin(s, &u, true, 0, 0x44);
		tag = await(s);
		if (!(s->descs[tag].op_flags & UBLK_IO_F_NEED_REG_BUF))
			break;
		answer(s, tag, LEN);
		finish(s, &u, "unexpected");
	} while (1);
	io_uring_queue_init(64, &other.ring, 0);
	io_uring_register_buffers_sparse(&other.ring, SLOTS);
	tag_cmd(&other, UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0, tag, LEN, 0, AUTO(tag, UBLK_AUTO_BUF_REG_FALLBACK));
	io_uring_submit(&other.ring);
	SAY("other-ring.kept", kept(s, &u));
	SAY("other-ring.unregister", unreg(s, tag));
	finish(s, &u, "other-ring");
	s->back = 0;
	SAY("stop", control_and_serve(s, UBLK_U_CMD_STOP_DEV, 0));
	while (s->back + other.back < DEPTH) {
		pump(s);
		pump(&other);
	}
	io_uring_queue_exit(&other.ring);
}

static void tag_cases(const char *kind, uint64_t flags)
{
	struct server server = make(kind, flags), *s = &server;
	unsigned int tag;

	open_server(s);
	SAY("register.before-fetch", reg(s, 0, 8));
	SAY("unregister.before-fetch", unreg(s, 8));
	SAY("fetch.address", tag_now(s, UBLK_U_IO_FETCH_REQ, 0, 0, 0, buffer(s, 0) ? 0 : 1, AUTO(0, 0)));
	if (has(s, UBLK_F_AUTO_BUF_REG)) {
		SAY("fetch.bad-flag", tag_now(s, UBLK_U_IO_FETCH_REQ, 0, 0, 0, 0, AUTO(0, 2)));
		SAY("fetch.reserved0", tag_now(s, UBLK_U_IO_FETCH_REQ, 0, 0, 0, 0, 1ull << 24));
		SAY("fetch.reserved1", tag_now(s, UBLK_U_IO_FETCH_REQ, 0, 0, 0, 0, 1ull << 32));
	}
	for (tag = 0; tag < DEPTH; tag++) {
		tag_cmd(s, UBLK_U_IO_FETCH_REQ, 0, tag, 0, buffer(s, tag), AUTO(tag, UBLK_AUTO_BUF_REG_FALLBACK));
		io_uring_submit(&s->ring);
	}
	SAY("prep", (batch(s, UBLK_U_IO_PREP_IO_CMDS, batch_io(s, 1), bufs[0]), now(s)));
	SAY("commit-batch", (batch(s, UBLK_U_IO_COMMIT_IO_CMDS, batch_io(s, 1), bufs[0]), now(s)));
	SAY("register.armed", reg(s, 0, 8));
	SAY("start", control_and_serve(s, UBLK_U_CMD_START_DEV, getpid()));
	buffer_cases(s, true);
	buffer_cases(s, false);
	if (has(s, UBLK_F_AUTO_BUF_REG) && has(s, UBLK_F_SUPPORT_ZERO_COPY)) {
		auto_cases(s);
	} else {
		SAY("stop", control_and_serve(s, UBLK_U_CMD_STOP_DEV, 0));
		while (s->back < DEPTH)
			pump(s);
	}
	close_server(s);
	delete_device(&c, s->id);
}

static long batch_now(struct server *s, uint32_t op, struct ublk_batch_io cmd, const void *elems)
{
	batch(s, op, cmd, elems);
	return now(s);
}

static long fetch_now(struct server *s, struct ublk_batch_io cmd)
{
	batch(s, UBLK_U_IO_FETCH_IO_CMDS, cmd, NULL);
	s->fetch = s->asked;
	s->ended = PENDING;
	io_uring_submit(&s->ring);
	for (int i = 0; i < 5; i++) {
		usleep(4000);
		drain(s, 0);
	}
	return s->ended;
}

/* Room for lists of tags, empty. */
static void open_lists(struct server *s)
{
	struct io_uring_buf_reg buf_ring = { .ring_entries = LISTS, .bgid = GROUP };

	if (!s->lists) {
		s->lists = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		s->lists_mem = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	}
	memset(s->lists, 0, 4096);
	io_uring_buf_ring_init(s->lists);
	buf_ring.ring_addr = (uintptr_t)s->lists;
	if (io_uring_register_buf_ring(&s->ring, &buf_ring, 0))
		die("lists");
}

static void prep_cases(struct server *s)
{
	const unsigned int all[] = { 0, 1, 2, 3 }, twice[] = { 0, 1, 1, 2 }, far[] = { 0, DEPTH };
	struct ublk_batch_io good = batch_io(s, DEPTH), cmd;
	char mem[64 * 16];

#define PREP(what, change) do {								\
		cmd = good;								\
		change;									\
		elems(s, mem, all, DEPTH, 0);						\
		SAY("prep." what, batch_now(s, UBLK_U_IO_PREP_IO_CMDS, cmd, mem));	\
	} while (0)
	PREP("no-queue", cmd.q_id = 1);
	PREP("short-elements", cmd.elem_bytes -= 8);
	PREP("long-elements", cmd.elem_bytes += 8);
	PREP("odd-elements", cmd.elem_bytes += 1);
	PREP("too-many", cmd.nr_elem = DEPTH + 1);
	PREP("unknown-flag", cmd.flags |= 8);
	PREP("zone-flag", cmd.flags |= UBLK_BATCH_F_HAS_ZONE_LBA; cmd.elem_bytes += 8);
	PREP("other-address-flag", cmd.flags ^= UBLK_BATCH_F_HAS_BUF_ADDR; cmd.elem_bytes = elem_size(cmd.flags));
	if (!has(s, UBLK_F_AUTO_BUF_REG))
		PREP("fallback", cmd.flags |= UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK);
	PREP("none", cmd.nr_elem = 0);
	SAY("prep.no-memory", batch_now(s, UBLK_U_IO_PREP_IO_CMDS, good, (void *)0xdead0000));
	SAY("prep.kernel-memory", batch_now(s, UBLK_U_IO_PREP_IO_CMDS, good, (void *)0xffff888000000000));
	elems(s, mem, twice, DEPTH, 0);
	SAY("prep.twice", batch_now(s, UBLK_U_IO_PREP_IO_CMDS, good, mem));
	cmd = batch_io(s, 2);
	elems(s, mem, far, 2, 0);
	SAY("prep.no-tag", batch_now(s, UBLK_U_IO_PREP_IO_CMDS, cmd, mem));
	if (buffer(s, 0)) {
		elems(s, mem, all, DEPTH, 0);
		memset(mem + 16 + 8, 0, 8);
		SAY("prep.no-address", batch_now(s, UBLK_U_IO_PREP_IO_CMDS, good, mem));
	}
	SAY("commit.before-prep", batch_now(s, UBLK_U_IO_COMMIT_IO_CMDS, good, mem));
	/* in two parts */
	elems(s, mem, all, DEPTH, 0);
	cmd = batch_io(s, 1);
	SAY("prep.first", batch_now(s, UBLK_U_IO_PREP_IO_CMDS, cmd, mem));
	SAY("prep.first-again", batch_now(s, UBLK_U_IO_PREP_IO_CMDS, cmd, mem));
	SAY("prep.with-first", batch_now(s, UBLK_U_IO_PREP_IO_CMDS, good, mem));
	cmd = batch_io(s, DEPTH - 1);
	/* is not looked at */
	cmd.reserved = cmd.reserved2 = 1;
	SAY("prep.rest", batch_now(s, UBLK_U_IO_PREP_IO_CMDS, cmd, mem + elem_size(cmd.flags)));
	SAY("prep.ready", batch_now(s, UBLK_U_IO_PREP_IO_CMDS, good, mem));
	SAY("commit.idle", batch_now(s, UBLK_U_IO_COMMIT_IO_CMDS, good, mem));
#undef PREP
}

static void fetch_cases(struct server *s)
{
	struct ublk_batch_io good = { .elem_bytes = 2 }, cmd;
	struct io_uring_sqe *sqe;

#define FETCH(what, change) do {							\
		cmd = good;								\
		change;									\
		SAY("fetch." what, fetch_now(s, cmd));					\
	} while (0)
	FETCH("no-queue", cmd.q_id = 1);
	FETCH("elements", cmd.elem_bytes = 4);
	FETCH("flags", cmd.flags = 1);
	sqe = batch(s, UBLK_U_IO_FETCH_IO_CMDS, good, NULL);
	sqe->flags = sqe->rw_flags = 0;
	SAY("fetch.one-shot", now(s));
	SAY("fetch", fetch_now(s, good));
#undef FETCH
}

/* Requests that come while there is no room for their tags are not lost. */
static void list_cases(struct server *s)
{
	struct ublk_batch_io fetch = { .elem_bytes = 2 };
	struct user u[DEPTH];
	unsigned int i;
	bool write = !has(s, UBLK_F_AUTO_BUF_REG);

	/* take the lists that there are */
	for (i = 0; i < LISTS && s->ended == PENDING; i++) {
		begin(s, &u[0], write, 0, 0x77);
		while (!s->n && s->ended == PENDING)
			pump(s);
		if (!s->n)
			break;
		answer(s, await(s), LEN);
		while (!is_done(&u[0]))
			pump(s);
		pthread_join(u[0].thread, NULL);
	}
	if (s->ended == PENDING) {
		begin(s, &u[0], write, 0, 0x77);
		while (s->ended == PENDING)
			pump(s);
	}
	SAY("lists.none", s->ended);
	for (i = 1; i < DEPTH; i++)
		begin(s, &u[i], write, i, 0x77);
	SAY("lists.still-none", fetch_now(s, fetch));
	usleep(100000);
	provide_list(s, 0, s->lists_mem[0], 1);
	SAY("lists.too-small", fetch_now(s, fetch));
	provide_list(s, 0, (void *)0xdead0000, 8);
	SAY("lists.no-memory", fetch_now(s, fetch));
	/* what was refused is still there: get rid of it */
	io_uring_unregister_buf_ring(&s->ring, GROUP);
	open_lists(s);
	provide_list(s, 0, s->lists_mem[0], 2);
	provide_list(s, 1, s->lists_mem[1], 3);
	s->longest = 0;
	fetch_now(s, fetch);
	while (s->n < 2)
		pump(s);
	SAY("lists.short", s->longest);
	for (i = 2; i < LISTS; i++)
		provide_list(s, i, s->lists_mem[i], sizeof(s->lists_mem[i]));
	if (s->ended != PENDING)
		fetch_now(s, fetch);
	while (s->n < DEPTH)
		pump(s);
	SAY("lists.all", s->n);
	SAY("lists.to-register", !!(s->descs[s->tags[0]].op_flags & UBLK_IO_F_NEED_REG_BUF));
}

/* What is wrong with answers, with all tags in our hands. */
static void commit_cases(struct server *s)
{
	struct ublk_batch_io good = batch_io(s, DEPTH), cmd;
	unsigned int size = good.elem_bytes, mixed[] = { s->tags[0], s->tags[1], DEPTH + 9, s->tags[2] };
	char mem[64 * 16], *edge;

	elems(s, mem, s->tags, DEPTH, LEN);
	cmd = good; cmd.nr_elem = DEPTH + 1;
	SAY("commit.too-many", batch_now(s, UBLK_U_IO_COMMIT_IO_CMDS, cmd, mem));
	cmd = good; cmd.nr_elem = 0;
	SAY("commit.none", batch_now(s, UBLK_U_IO_COMMIT_IO_CMDS, cmd, mem));
	cmd = good; cmd.elem_bytes++;
	SAY("commit.size", batch_now(s, UBLK_U_IO_COMMIT_IO_CMDS, cmd, mem));
	cmd = good; cmd.flags |= 8;
	SAY("commit.flag", batch_now(s, UBLK_U_IO_COMMIT_IO_CMDS, cmd, mem));
	SAY("commit.no-memory", batch_now(s, UBLK_U_IO_COMMIT_IO_CMDS, good, (void *)0xdead0000));
	SAY("commit-and-fetch", tag_now(s, UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0, s->tags[0], LEN, buffer(s, 0), 0));
	SAY("fetch-req", tag_now(s, UBLK_U_IO_FETCH_REQ, 0, s->tags[0], 0, buffer(s, 0), 0));
	SAY("get-data", tag_now(s, UBLK_U_IO_NEED_GET_DATA, 0, s->tags[0], 0, buffer(s, 0), 0));
	edge = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	munmap(edge + 4096, 4096);
	memcpy(edge + 4096 - size, mem, size);
	SAY("commit.partly-memory", batch_now(s, UBLK_U_IO_COMMIT_IO_CMDS, good, edge + 4096 - size));
	if (buffer(s, 0)) {
		elems(s, mem, s->tags, 1, LEN);
		memset(mem + 8, 0, 8);
		cmd = batch_io(s, 1);
		SAY("commit.no-address", batch_now(s, UBLK_U_IO_COMMIT_IO_CMDS, cmd, mem));
	}
	elems(s, mem, mixed, DEPTH, LEN);
	SAY("commit.part", batch_now(s, UBLK_U_IO_COMMIT_IO_CMDS, good, mem));
	cmd = batch_io(s, 2);
	elems(s, mem, s->tags + 2, 2, LEN);
	SAY("commit.rest", batch_now(s, UBLK_U_IO_COMMIT_IO_CMDS, cmd, mem));
	s->n = 0;
}

/* Before the queue has a server. */
static void early_case(void)
{
	struct server server = make("early", UBLK_F_BATCH_IO), *s = &server;

	open_server(s);
	open_lists(s);
	SAY("fetch", fetch_now(s, (struct ublk_batch_io){ .elem_bytes = 2 }));
	close_server(s);
	delete_device(&c, s->id);
}

static void batch_cases(const char *kind, uint64_t flags)
{
	struct server server = make(kind, flags | UBLK_F_BATCH_IO), *s = &server;
	struct ublk_batch_io fetch = { .elem_bytes = 2 };
	struct user u;
	unsigned int i;

	s->flags = flags | UBLK_F_BATCH_IO;
	open_server(s);
	open_lists(s);
	for (i = 0; i < LISTS; i++)
		provide_list(s, i, s->lists_mem[i], sizeof(s->lists_mem[i]));
	SAY("fetch-req.first", tag_now(s, UBLK_U_IO_FETCH_REQ, 0, 0, 0, buffer(s, 0), 0));
	prep_cases(s);
	fetch_cases(s);
	SAY("start", control_and_serve(s, UBLK_U_CMD_START_DEV, getpid()));
	if (has(s, UBLK_F_SUPPORT_ZERO_COPY)) {
		buffer_cases(s, true);
		buffer_cases(s, false);
	} else if (buffer(s, 0)) {
		begin(s, &u, true, 0, 0x66);
		i = await(s);
		SAY("copy.written", bufs[i][0] == 0x66 && bufs[i][LEN - 1] == 0x66);
		answer(s, i, LEN);
		finish(s, &u, "copy.write");
		begin(s, &u, false, 0, 0x67);
		i = await(s);
		memset(bufs[i], 0x67, LEN);
		answer(s, i, LEN);
		finish(s, &u, "copy.read");
	}
	list_cases(s);
	commit_cases(s);
	if (s->ended != PENDING)
		fetch_now(s, fetch);
	usleep(50000);
	drain(s, 0);
	SAY("fetch.runs", s->ended);
	SAY("stop", control_and_serve(s, UBLK_U_CMD_STOP_DEV, 0));
	while (s->ended == PENDING)
		pump(s);
	SAY("fetch.end", s->ended);
	SAY("fetch.after-stop", fetch_now(s, fetch));
	send_batch(s, UBLK_U_IO_PREP_IO_CMDS, (unsigned int[]){ 0, 1, 2, 3 }, DEPTH, 0);
	SAY("prep.after-stop", drain(s, s->asked));
	close_server(s);
	delete_device(&c, s->id);
}

/* All tags of the device. */
static void arm(struct server *s)
{
	unsigned int all[DEPTH], tag;

	for (tag = 0; tag < DEPTH; tag++)
		all[tag] = tag;
	if (has(s, UBLK_F_BATCH_IO)) {
		open_lists(s);
		for (tag = 0; tag < LISTS; tag++)
			provide_list(s, tag, s->lists_mem[tag], sizeof(s->lists_mem[tag]));
		send_batch(s, UBLK_U_IO_PREP_IO_CMDS, all, DEPTH, 0);
		fetch_now(s, (struct ublk_batch_io){ .elem_bytes = 2 });
		return;
	}
	for (tag = 0; tag < DEPTH; tag++) {
		tag_cmd(s, UBLK_U_IO_FETCH_REQ, 0, tag, 0, buffer(s, tag), AUTO(tag, UBLK_AUTO_BUF_REG_FALLBACK));
		io_uring_submit(&s->ring);
	}
}

#define HOLDS 8 /* slot */

/* A process that has the request in a table of its own, and nothing else of the device. */
static pid_t hold(struct server *s, unsigned int tag, volatile int *held)
{
	pid_t pid = fork();

	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, 0);
	io_uring_queue_init(8, &s->ring, 0);
	io_uring_register_buffers_sparse(&s->ring, SLOTS);
	if (reg(s, tag, HOLDS))
		_exit(1);
	close(s->fd);
	munmap(s->descs, descs_size(DEPTH));
	*held = 1;
	for (;;)
		pause();
}

/* A server, in a process of its own: the first keeps the user's request, the second answers it. */
static pid_t serve(struct server *s, bool first, volatile int *held, volatile pid_t *holder)
{
	pid_t pid = fork();
	unsigned int tag;

	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	s->n = 0;
	open_server(s);
	arm(s);
	tag = await(s);
	if (first) {
		if (!has(s, UBLK_F_SUPPORT_ZERO_COPY))
			*held = 1;
		else if (!reg(s, tag, HOLDS))
			*holder = hold(s, tag, held);
		for (;;)
			pause();
	}
	if (has(s, UBLK_F_AUTO_BUF_REG)) {
		fixed(s, true, tag, 0, LEN);
	} else if (has(s, UBLK_F_SUPPORT_ZERO_COPY)) {
		reg(s, tag, HOLDS);
		fixed(s, true, HOLDS, 0, LEN);
		unreg(s, HOLDS);
	} else {
		pwrite(backing, bufs[tag], LEN, 0);
	}
	answer(s, tag, LEN);
	for (;;)
		pump(s);
}

static void death(const char *kind, uint64_t flags)
{
	struct {
		volatile int held;
		volatile pid_t holder;
	} *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct server server, *s = &server;
	unsigned char got[LEN];
	struct user u;
	pid_t pid;
	int res;

	flags |= UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE;
	server = make(kind, flags);
	pid = serve(s, true, &shared->held, &shared->holder);
	SAY("start", control(&c, UBLK_U_CMD_START_DEV, s->id, NULL, 0, pid));
	begin(s, &u, true, 0, 0x88);
	while (!shared->held)
		usleep(1000);
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	usleep(300000);
	SAY("waits", !is_done(&u));
	if (shared->holder) {
		/* the server is no more, but what it had may still be written to */
		SAY("held", control(&c, UBLK_U_CMD_START_USER_RECOVERY, s->id, NULL, 0, 0));
		kill(shared->holder, SIGKILL);
	}
	while ((res = control(&c, UBLK_U_CMD_START_USER_RECOVERY, s->id, NULL, 0, 0)) == -EBUSY)
		usleep(1000);
	SAY("recovery.start", res);
	pid = serve(s, false, NULL, NULL);
	SAY("recovery.end", control(&c, UBLK_U_CMD_END_USER_RECOVERY, s->id, NULL, 0, pid));
	pthread_join(u.thread, NULL);
	SAY("result", u.result);
	res = pread(backing, got, LEN, 0);
	for (unsigned int i = 0; i < LEN; i++)
		res -= got[i] == 0x88;
	SAY("wrong", res);
	SAY("stop", control(&c, UBLK_U_CMD_STOP_DEV, s->id, NULL, 0, 0));
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	delete_device(&c, s->id);
}

/* A server that stops its own device while it has a request in its own table, and is killed: it must not wait for itself. */
static void self_stop(const char *kind, uint64_t flags)
{
	volatile int *held = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct server server = make(kind, flags | UBLK_F_USER_RECOVERY), *s = &server;
	struct user u;
	int status;
	pid_t pid = fork();

	if (!pid) {
		unsigned int tag;

		prctl(PR_SET_PDEATHSIG, SIGKILL);
		s->n = 0;
		open_server(s);
		arm(s);
		tag = await(s);
		if (!has(s, UBLK_F_AUTO_BUF_REG) && reg(s, tag, HOLDS))
			_exit(1);
		control_open(&c);
		*held = 1;
		control(&c, UBLK_U_CMD_STOP_DEV, s->id, NULL, 0, 0);
		_exit(2);
	}
	SAY("self-stop.start", control(&c, UBLK_U_CMD_START_DEV, s->id, NULL, 0, pid));
	begin(s, &u, true, 0, 0x99);
	while (!*held)
		usleep(1000);
	usleep(300000);
	SAY("self-stop.waits", !is_done(&u));
	kill(pid, SIGKILL);
	waitpid(pid, &status, 0);
	SAY("self-stop.killed", WIFSIGNALED(status));
	pthread_join(u.thread, NULL);
	SAY("self-stop.result", u.result);
	SAY("self-stop.stop", control(&c, UBLK_U_CMD_STOP_DEV, s->id, NULL, 0, 0));
	delete_device(&c, s->id);
}

int main(int argc, char **argv)
{
	if (getuid())
		return 77;
	setvbuf(stdout, NULL, _IOLBF, 0);
	backing = memfd_create("backing", 0);
	if (backing < 0 || ftruncate(backing, BYTES))
		die("memfd");
	control_open(&c);
	if (argc > 1 && !strcmp(argv[1], "death")) {
		death("zero-copy", UBLK_F_SUPPORT_ZERO_COPY);
		death("auto", UBLK_F_AUTO_BUF_REG);
		death("auto-zero-copy", UBLK_F_AUTO_BUF_REG | UBLK_F_SUPPORT_ZERO_COPY);
		death("batch", UBLK_F_BATCH_IO);
		death("batch-auto", UBLK_F_BATCH_IO | UBLK_F_AUTO_BUF_REG | UBLK_F_SUPPORT_ZERO_COPY);
		self_stop("zero-copy", UBLK_F_SUPPORT_ZERO_COPY);
		self_stop("auto", UBLK_F_AUTO_BUF_REG);
		self_stop("batch-auto", UBLK_F_BATCH_IO | UBLK_F_AUTO_BUF_REG);
		return 0;
	}
	add_cases();
	tag_cases("plain", 0);
	tag_cases("user-copy", UBLK_F_USER_COPY);
	tag_cases("zero-copy", UBLK_F_SUPPORT_ZERO_COPY);
	tag_cases("auto", UBLK_F_AUTO_BUF_REG);
	tag_cases("auto-zero-copy", UBLK_F_AUTO_BUF_REG | UBLK_F_SUPPORT_ZERO_COPY | UBLK_F_USER_COPY);
	early_case();
	batch_cases("batch", 0);
	batch_cases("batch-user-copy", UBLK_F_USER_COPY);
	batch_cases("batch-auto", UBLK_F_AUTO_BUF_REG | UBLK_F_SUPPORT_ZERO_COPY);
	return 0;
}
