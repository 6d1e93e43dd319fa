/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A RAM disk whose server registers memory that it shares with its client:
 * which requests come with their data in place, and which are copied. One line
 * "name result" for each case.
 */
#include <pthread.h>
#include <sys/uio.h>

#include "client.h"

#define DEPTH 16
#define BYTES (8 << 20)
#define PAGE 4096ul
#define BUF_BYTES (1ul << 20)

/* Between client and server. */
static struct shared {
	char first[BUF_BYTES];	/* registered */
	char second[BUF_BYTES];	/* later, and read-only */
	char disk[BYTES];
	volatile int hold;	/* requests are kept */
	volatile int held;
	volatile int wrong;	/* a request with a place that is none */
	/* of the last read or write */
	volatile uint32_t op_flags;
	volatile uint64_t addr;
} *shared;

static char *bases[16];
static struct control c;
static uint32_t id;
static char other[BUF_BYTES] __attribute__((aligned(4096)));

static void say(const char *name, long result)
{
	printf("%s %ld\n", name, result);
	fflush(stdout);
}

static int reg(void *p, size_t len, uint32_t flags, uint32_t reserved)
{
	struct ublk_shmem_buf_reg r = { .addr = (uintptr_t)p, .len = len, .flags = flags, .reserved = reserved };

	return control(&c, UBLK_U_CMD_REG_BUF, id, &r, sizeof(r), 0);
}

static int unreg(long index)
{
	return control(&c, UBLK_U_CMD_UNREG_BUF, id, NULL, 0, index);
}

static int serve(const struct ublksrv_io_desc *desc, char *buf)
{
	size_t at = desc->start_sector << 9, len = (size_t)desc->nr_sectors << 9;
	unsigned int op = ublksrv_get_op(desc);

	if (op == UBLK_IO_OP_FLUSH)
		return 0;
	if ((op != UBLK_IO_OP_READ && op != UBLK_IO_OP_WRITE) || at + len > BYTES)
		return -EOPNOTSUPP;
	shared->op_flags = desc->op_flags;
	shared->addr = desc->addr;
	if (desc->op_flags & UBLK_IO_F_SHMEM_ZC) {
		unsigned int index = ublk_shmem_zc_index(desc->addr);
		uint32_t offset = ublk_shmem_zc_offset(desc->addr);

		if (index >= 16 || !bases[index] || offset + len > BUF_BYTES) {
			shared->wrong = 1;
			return -EIO;
		}
		buf = bases[index] + offset;
	}
	if (op == UBLK_IO_OP_READ)
		memcpy(buf, shared->disk + at, len);
	else
		memcpy(shared->disk + at, buf, len);
	return len;
}

static void server(void)
{
	static char bufs[DEPTH][MAX_IO];
	struct ublksrv_io_desc *descs;
	struct io_uring ring;
	unsigned int tag, tags = DEPTH;
	int fd = open_char(id);

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	descs = fd < 0 ? MAP_FAILED : map_queue(fd, 0, DEPTH);
	if (descs == MAP_FAILED || io_uring_queue_init(2 * DEPTH, &ring, 0))
		die("server");
	for (tag = 0; tag < DEPTH; tag++)
		io_cmd(&ring, fd, UBLK_U_IO_FETCH_REQ, 0, tag, 0, (uintptr_t)bufs[tag]);
	while (tags) {
		struct io_uring_cqe *cqe;
		int res;

		io_uring_submit(&ring);
		if (io_uring_wait_cqe(&ring, &cqe))
			continue;
		tag = cqe->user_data;
		res = cqe->res;
		io_uring_cqe_seen(&ring, cqe);
		if (res == UBLK_IO_RES_NEED_GET_DATA) {
			io_cmd(&ring, fd, UBLK_U_IO_NEED_GET_DATA, 0, tag, 0, (uintptr_t)bufs[tag]);
			continue;
		}
		if (res) {
			tags--;
			continue;
		}
		while (shared->hold) {
			shared->held = 1;
			usleep(1000);
		}
		io_cmd(&ring, fd, UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0, tag, serve(&descs[tag], bufs[tag]),
		       (uintptr_t)bufs[tag]);
	}
	_exit(0);
}

static pid_t start_server(void)
{
	pid_t pid = fork();

	if (!pid)
		server();
	return pid;
}

static int open_disk(void)
{
	char path[32];
	int fd;

	snprintf(path, sizeof(path), "/dev/ublkb%u", id);
	fd = open(path, O_RDWR | O_DIRECT);
	if (fd < 0)
		die(path);
	return fd;
}

static void fill(char *p, size_t len)
{
	static unsigned int seed = 1;

	for (size_t i = 0; i < len; i++)
		p[i] = rand_r(&seed);
}

/* One transfer: where its data was, -1 if it was copied, -2 if it is wrong. */
static long transfer(int fd, const struct iovec *vec, int n, off_t at, bool write)
{
	ssize_t len = 0, done = 0;

	for (int i = 0; i < n; i++) {
		if (write)
			fill(vec[i].iov_base, vec[i].iov_len);
		len += vec[i].iov_len;
	}
	if (!write)
		fill(shared->disk + at, len);
	if ((write ? pwritev(fd, vec, n, at) : preadv(fd, vec, n, at)) != len)
		return -errno * 1000;
	for (int i = 0; i < n; i++) {
		if (memcmp(vec[i].iov_base, shared->disk + at + done, vec[i].iov_len))
			return -2;
		done += vec[i].iov_len;
	}
	return shared->op_flags & UBLK_IO_F_SHMEM_ZC ? (long)shared->addr : -1;
}

static long one(int fd, void *p, size_t len, off_t at, bool write)
{
	return transfer(fd, &(struct iovec){ p, len }, 1, at, write);
}

/* Pages pinned and not given up, on the whole machine. */
static long pinned(void)
{
	long acquired = -1, released = -1, value;
	char name[64];
	FILE *file = fopen("/proc/sys/vm/stat_refresh", "r");

	if (file) {
		(void)!fgets(name, sizeof(name), file);
		fclose(file);
	}
	file = fopen("/proc/vmstat", "r");
	while (file && fscanf(file, "%63s %ld", name, &value) == 2) {
		if (!strcmp(name, "nr_foll_pin_acquired"))
			acquired = value;
		if (!strcmp(name, "nr_foll_pin_released"))
			released = value;
	}
	if (!file || acquired < 0 || released < 0)
		die("/proc/vmstat");
	fclose(file);
	return acquired - released;
}

static void make(uint64_t flags)
{
	struct ublk_params params = plain_params(BYTES);
	struct ublksrv_ctrl_dev_info info;
	int err = add(&c, &info, 1, DEPTH, flags | UBLK_F_NO_AUTO_PART_SCAN);

	id = info.dev_id;
	if (!err)
		err = set_params(&c, id, &params);
	must(err, "add");
}

static void register_cases(void)
{
	char *p = shared->first, *half;

	half = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (half == MAP_FAILED || mprotect(half + PAGE, PAGE, PROT_NONE))
		die("memory");
	make(0);
	say("register.without-flag", reg(p, BUF_BYTES, 0, 0));
	say("unregister.without-flag", unreg(0));
	delete_device(&c, id);
	make(UBLK_F_SHMEM_ZC);
	say("register.flag", reg(p, BUF_BYTES, 2, 0));
	say("register.reserved", reg(p, BUF_BYTES, 0, 1));
	say("register.nothing", reg(p, 0, 0, 0));
	say("register.half-a-page", reg(p, PAGE / 2, 0, 0));
	say("register.unaligned", reg(p + 512, PAGE, 0, 0));
	say("register.too-much", reg(p, (1ul << 32) + PAGE, 0, 0));
	say("register.no-memory", reg((void *)0xdead0000, PAGE, 0, 0));
	say("register.hole", reg(half, 2 * PAGE, 0, 0));
	say("register.bad-argument", control(&c, UBLK_U_CMD_REG_BUF, id, (void *)0xdead0000, 24, 0));
	say("unregister.none", unreg(0));
	say("unregister.negative", unreg(-1));
	say("unregister.too-large", unreg(65536));
	say("register", reg(p, BUF_BYTES, 0, 0));
	say("register.again", reg(p, BUF_BYTES, 0, 0));
	say("register.overlap", reg(p + BUF_BYTES - PAGE, 2 * PAGE, 0, 0));
	say("register.beside", reg(shared->second, PAGE, 0, 0));
	say("unregister", unreg(0));
	say("unregister.again", unreg(0));
	say("register.reuses", reg(p, PAGE, 0, 0));
	delete_device(&c, id);
}

struct writer {
	int fd;
	bool done;
};

static void *writer(void *arg)
{
	struct writer *w = arg;

	one(w->fd, shared->first, PAGE, 0, true);
	__atomic_store_n(&w->done, true, __ATOMIC_RELEASE);
	return NULL;
}

static void io_cases(const char *kind, uint64_t flags)
{
	char *a = shared->first, *b = shared->second, name[64];
	struct ublksrv_ctrl_cmd cmd;
	struct writer w = { 0 };
	pthread_t thread;
	pid_t pid;
	int fd, err;

#define SAY(what, value) do {						\
		snprintf(name, sizeof(name), "%s.%s", kind, what);	\
		say(name, value);					\
	} while (0)
	make(flags | UBLK_F_SHMEM_ZC | UBLK_F_USER_RECOVERY);
	bases[0] = a;
	bases[1] = b;
	SAY("register", reg(a, BUF_BYTES, 0, 0));
	pid = start_server();
	err = control(&c, UBLK_U_CMD_START_DEV, id, NULL, 0, pid);
	SAY("start", err);
	fd = open_disk();
	SAY("write", one(fd, a + 2 * PAGE, 65536, 0, true));
	SAY("read", one(fd, a + 4 * PAGE, 65536, 65536, false));
	SAY("write.sector", one(fd, a + PAGE + 512, 512, 512, true));
	SAY("read.sector", one(fd, a + 3 * PAGE + 1024, 1024, 2048, false));
	SAY("write.end", one(fd, a + BUF_BYTES - PAGE, PAGE, 0, true));
	SAY("write.other", one(fd, other, 65536, 8192, true));
	SAY("read.other", one(fd, other, 65536, 16384, false));
	SAY("write.not-registered", one(fd, b, PAGE, 4096, true));
	SAY("write.past-end", one(fd, a + BUF_BYTES - PAGE, 2 * PAGE, 0, true));
	SAY("write.in-a-row", transfer(fd, (struct iovec[]){ { a + PAGE, PAGE }, { a + 2 * PAGE, PAGE } }, 2, 0, true));
	SAY("write.scattered", transfer(fd, (struct iovec[]){ { a, PAGE }, { a + 2 * PAGE, PAGE } }, 2, 0, true));
	SAY("write.backwards", transfer(fd, (struct iovec[]){ { a + PAGE, PAGE }, { a, PAGE } }, 2, 0, true));
	SAY("register.while-live", reg(b, BUF_BYTES, UBLK_SHMEM_BUF_READ_ONLY, 0));
	SAY("write.from-read-only", one(fd, b + PAGE, PAGE, 4096, true));
	SAY("read.into-read-only", one(fd, b + PAGE, PAGE, 4096, false));
	SAY("write.two-buffers", one(fd, a + BUF_BYTES - PAGE, 2 * PAGE, 0, true));

	/* buffers outlive the server, whose successor finds them where they were */
	kill(pid, SIGKILL);
	waitpid(pid, NULL, 0);
	while ((err = control(&c, UBLK_U_CMD_START_USER_RECOVERY, id, NULL, 0, 0)) == -EBUSY)
		usleep(10000);
	SAY("recovery.start", err);
	pid = start_server();
	SAY("recovery.end", control(&c, UBLK_U_CMD_END_USER_RECOVERY, id, NULL, 0, pid));
	SAY("recovery.write", one(fd, a + 8 * PAGE, PAGE, 4096, true));

	/* a buffer that a request uses can't go */
	shared->held = 0;
	shared->hold = 1;
	w.fd = fd;
	pthread_create(&thread, NULL, writer, &w);
	while (!shared->held)
		usleep(1000);
	if (flags & UBLK_F_SHARDS) {
		cmd = (struct ublksrv_ctrl_cmd){ .dev_id = id, .queue_id = 0xffff, .data = { 0 } };
		SAY("unregister.while-used", control_raw(&c, UBLK_U_CMD_UNREG_BUF, &cmd, 200));
	}
	shared->hold = 0;
	pthread_join(thread, NULL);
	SAY("unregister", unreg(0));
	SAY("write.unregistered", one(fd, a, 65536, 0, true));
	SAY("read.unregistered", one(fd, a, 65536, 65536, false));
	SAY("register.other-place", reg(a + PAGE, PAGE, 0, 0));
	bases[0] = NULL;
	close(fd);
	SAY("wrong", shared->wrong);
	SAY("stop", control(&c, UBLK_U_CMD_STOP_DEV, id, NULL, 0, 0));
	waitpid(pid, NULL, 0);
	delete_device(&c, id);
#undef SAY
}

int main(void)
{
	uint64_t features = 0;
	long before, left;
	int i;

	control_open(&c);
	control(&c, UBLK_U_CMD_GET_FEATURES, ~0u, &features, sizeof(features), 0);
	if (!(features & UBLK_F_SHMEM_ZC))
		return 77;
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shared == MAP_FAILED)
		die("memory");
	before = pinned();
	register_cases();
	io_cases("copy", 0);
	io_cases("get-data", UBLK_F_NEED_GET_DATA);
	if (features & UBLK_F_SHARDS)
		io_cases("shards", UBLK_F_SHARDS);
	/* devices were deleted with buffers registered; what direct I/O pinned goes a moment later */
	for (i = 0; (left = pinned() - before) && i < 1000; i++)
		usleep(10000);
	say("pages-left-pinned", left);
	return 0;
}
