/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Random commands from several processes that die at random moments.
 *
 *   fuzz SECONDS SEED [faults]
 *
 * Servers with bad manners (wrong tags, wrong addresses, other threads,
 * answers that make no sense), controllers that give any command to any
 * device, users of the disks. Only that the kernel keeps well counts, and that
 * all devices can be deleted at the end. With "faults" most of them may see the
 * failures that the kernel's fault injection is set up for.
 */
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>

#include "client.h"

#define DEVICES 3
#define QUEUES 2
#define DEPTH 8
#define BYTES (4 << 20)
#define ACTORS 7

static uint32_t ids[DEVICES]; /* any number may be one of them, and not for long */
static unsigned int seed;
static bool faults;

/* Of all processes: what went well, so that one sees that anything did. */
static struct {
	unsigned long commands, ios;
} *well;

static void count(unsigned long *what)
{
	__atomic_fetch_add(what, 1, __ATOMIC_RELAXED);
}

static unsigned int rnd(unsigned int n)
{
	return rand_r(&seed) % n;
}

static bool one_in(unsigned int n)
{
	return !rnd(n);
}

static uint32_t any_id(void)
{
	return one_in(20) ? rnd(200) : ids[rnd(DEVICES)];
}

#define MEMORY (1 << 20)
static char *memory; /* of all processes: what one registers is what another one's I/O comes from */

static void *any_memory(void)
{
	switch (rnd(12)) {
	case 0:
		return NULL;
	case 1:
		return (void *)0xdead0000;
	case 2:
		return (void *)0xffff888000000000;
	default:
		return memory + rnd(MEMORY / 2);
	}
}

static const uint64_t recovery[] = {
	0,
	UBLK_F_USER_RECOVERY,
	UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE,
	UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_FAIL_IO,
	UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE | UBLK_F_SHARDS,
	UBLK_F_USER_RECOVERY | UBLK_F_SHARDS,
};

/* Who moves the data, and by which commands; what the driver doesn't have it drops. */
static uint64_t any_transport(void)
{
	uint64_t flags = 0;

	if (one_in(3))
		flags |= UBLK_F_USER_COPY;
	if (one_in(3))
		flags |= UBLK_F_SUPPORT_ZERO_COPY;
	if (one_in(3))
		flags |= UBLK_F_AUTO_BUF_REG;
	if (one_in(3))
		flags |= UBLK_F_BATCH_IO;
	return flags;
}

static struct ublk_params zoned_params(void)
{
	struct ublk_params params = plain_params(BYTES);

	params.types |= UBLK_PARAM_TYPE_ZONED;
	params.basic.chunk_sectors = 2048;
	params.zoned.max_zone_append_sectors = 128;
	return params;
}

static void controller(void)
{
	struct control c;
	unsigned int i, n = 20 + rnd(200);

	control_open(&c);
	for (i = 0; i < n; i++) {
		struct ublksrv_ctrl_dev_info info = {
			.nr_hw_queues = one_in(20) ? rnd(70000) : 1 + rnd(QUEUES),
			.queue_depth = one_in(20) ? rnd(70000) : 1 + rnd(DEPTH),
			.max_io_buf_bytes = one_in(10) ? rnd(1 << 30) : MAX_IO,
			.flags = recovery[rnd(6)],
		};
		struct ublk_params params = one_in(6) ? zoned_params() : plain_params(BYTES);
		struct ublksrv_ctrl_cmd cmd = { .queue_id = 0xffff };
		struct ublk_shmem_buf_reg buffer;
		uint32_t op = _IOWR('u', rnd(32), struct ublksrv_ctrl_cmd);

		cmd.dev_id = info.dev_id = any_id();
		if (one_in(4))
			info.flags |= UBLK_F_USER_COPY | (one_in(4) ? UBLK_F_ZONED : 0);
		else if (one_in(4))
			info.flags |= UBLK_F_NEED_GET_DATA;
		else if (one_in(2))
			info.flags |= any_transport();
		if (one_in(3))
			info.flags |= UBLK_F_QUIESCE & -!!info.flags;
		if (one_in(3))
			info.flags |= UBLK_F_SHMEM_ZC;
		switch (rnd(15)) {
		case 0:
		case 1:
			op = UBLK_U_CMD_ADD_DEV;
			cmd.addr = (uintptr_t)&info;
			cmd.len = sizeof(info);
			break;
		case 2:
		case 3:
			op = UBLK_U_CMD_SET_PARAMS;
			for (unsigned int k = one_in(2) ? rnd(6) : 0; k; k--)
				((char *)&params)[rnd(sizeof(params))] = rnd(256);
			cmd.addr = (uintptr_t)&params;
			cmd.len = one_in(8) ? rnd(200) : sizeof(params);
			break;
		case 4:
		case 5:
			op = UBLK_U_CMD_START_DEV;
			cmd.data[0] = getpid();
			break;
		case 6:
			op = UBLK_U_CMD_START_USER_RECOVERY;
			break;
		case 7:
			op = UBLK_U_CMD_END_USER_RECOVERY;
			cmd.data[0] = getpid();
			break;
		case 8:
			if (!one_in(4))
				continue;
			op = one_in(2) ? UBLK_U_CMD_DEL_DEV_ASYNC : UBLK_U_CMD_DEL_DEV;
			break;
		case 10:
			/* memory that others register, too, and that nobody has */
			op = one_in(3) ? UBLK_U_CMD_UNREG_BUF : UBLK_U_CMD_REG_BUF;
			buffer = (struct ublk_shmem_buf_reg){
				.addr = (uintptr_t)any_memory() & -4096ul,
				.len = one_in(20) ? (uint64_t)rnd(1 << 20) << 13 : (1 + rnd(16)) * 4096,
				.flags = rnd(8) ? rnd(2) : rnd(16),
			};
			cmd.addr = (uintptr_t)(one_in(20) ? any_memory() : &buffer);
			cmd.len = sizeof(buffer);
			cmd.data[0] = rnd(4);
			break;
		case 9:
			op = one_in(2) ? UBLK_U_CMD_QUIESCE_DEV : UBLK_U_CMD_UPDATE_SIZE;
			cmd.data[0] = rnd(300);
			break;
		case 11:
			if (!one_in(4))
				continue;
			op = one_in(2) ? UBLK_U_CMD_TRY_STOP_DEV : UBLK_U_CMD_STOP_DEV;
			break;
		default:
			if (one_in(4))
				op = _IOR('u', one_in(2) ? 0x60 : rnd(256), struct ublksrv_ctrl_cmd);
			if (one_in(4))
				op = rnd(one_in(2) ? 64 : 1u << 31);
			cmd.addr = (uintptr_t)any_memory();
			cmd.len = rnd(one_in(2) ? 70000 : 200);
			cmd.data[0] = rnd(8);
			cmd.queue_id = rnd(4);
			cmd.dev_path_len = one_in(8) ? rnd(5000) : 0;
			/* those above are rarer on purpose */
			if ((op & 0xff) == 0x05 || (op & 0xff) == 0x14 || (op & 0xff) == 0x07)
				continue;
		}
		if (control_raw(&c, op, &cmd, 1 + rnd(300)) >= 0)
			count(&well->commands);
	}
	control_close(&c);
}

#define SLOTS 24
#define GROUP 1
#define LISTS 4

#define NOBODY (~0ull) /* user_data of what no answer is expected to */
#define FETCHED (~1ull)

/* What is done with requests whose pages are in a ring's table, and with the table. */
static void use_table(struct io_uring *ring, int fd, int backing)
{
	struct iovec vec = { any_memory(), rnd(9000) };
	struct io_uring_rsrc_update2 update = { .offset = rnd(SLOTS + 2), .data = (uintptr_t)&vec, .nr = 1 };
	struct io_uring_sqe *sqe;

	switch (rnd(5)) {
	case 0:
		sqe = io_cmd(ring, fd, UBLK_U_IO_REGISTER_IO_BUF, rnd(QUEUES), rnd(DEPTH), 0, rnd(SLOTS + 2));
		break;
	case 1:
		sqe = io_cmd(ring, fd, UBLK_U_IO_UNREGISTER_IO_BUF, rnd(QUEUES), rnd(DEPTH), 0, rnd(SLOTS + 2));
		break;
	case 2:
		if (one_in(4))
			io_uring_register(ring->ring_fd, IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof(update));
		return;
	case 3:
		if (one_in(20)) {
			io_uring_unregister_buffers(ring);
			io_uring_register_buffers_sparse(ring, 1 + rnd(SLOTS));
		}
		return;
	default:
		sqe = get_sqe(ring, sizeof(*sqe));
		if (one_in(2))
			io_uring_prep_read_fixed(sqe, backing, (void *)(uintptr_t)rnd(9000), rnd(9000), 0, rnd(SLOTS));
		else
			io_uring_prep_write_fixed(sqe, backing, (void *)(uintptr_t)rnd(9000), rnd(9000), 0, rnd(SLOTS));
	}
	sqe->user_data = NOBODY;
	if (one_in(10))
		sqe->flags |= IOSQE_ASYNC;
}

/* Where a request is to be registered by itself. */
static uint64_t any_place(void)
{
	return rnd(SLOTS + 1) | (one_in(2) ? UBLK_AUTO_BUF_REG_FALLBACK << 16 : 0) | (one_in(60) ? 1ull << (17 + rnd(40)) : 0);
}

/* Lists of tags, in memory of ours or where there is none, and sometimes too short. */
static void provide_list(struct io_uring_buf_ring *lists, unsigned int id)
{
	void *to = one_in(10) ? any_memory() : memory + MEMORY / 2 + id * 256;

	io_uring_buf_ring_add(lists, to, one_in(4) ? rnd(2 * DEPTH + 2) : 2 * DEPTH, id, LISTS - 1, 0);
	io_uring_buf_ring_advance(lists, 1);
}

static void batch(struct io_uring *ring, int fd, uint32_t op, unsigned int q, unsigned int flags, const void *elems,
		  unsigned int n, uint64_t whose)
{
	struct ublk_batch_io cmd = {
		.q_id = q, .flags = flags, .nr_elem = n,
		.elem_bytes = op == UBLK_U_IO_FETCH_IO_CMDS ? sizeof(uint16_t) : elem_size(flags),
	};
	struct io_uring_sqe *sqe;

	if (one_in(60))
		((unsigned char *)&cmd)[rnd(sizeof(cmd))] = rnd(256);
	sqe = batch_cmd(ring, fd, op, &cmd, elems, GROUP + one_in(40));
	sqe->user_data = whose;
	if (one_in(60))
		sqe->flags |= IOSQE_ASYNC;
}

/* Elements in memory that others write to at the same time: what they say may change while they are read. */
static void *any_elems(unsigned int flags, const uint16_t *tags, unsigned int n, bool honest)
{
	static char bufs[DEPTH][MAX_IO];
	unsigned int size = elem_size(flags);
	char *mem = one_in(20) ? any_memory() : memory + MEMORY / 2 + 4096 + rnd(64) * 1024;
	static char own[24 * 64];

	for (unsigned int i = 0; i < n; i++) {
		struct {
			struct ublk_elem_header head;
			uint64_t more[2];
		} elem = {
			.head = { .tag = tags[i], .buf_index = rnd(SLOTS), .result = honest ? MAX_IO : (int)rnd(1 << 20) - 999 },
			.more = { (uintptr_t)bufs[tags[i] % DEPTH], rnd(2048) },
		};

		memcpy(own + i * size, &elem, size);
	}
	if (mem < memory || mem >= memory + MEMORY - 4096)
		return mem;
	memcpy(mem, own, n * size);
	return mem;
}

/* A server that takes its requests in batches. It knows neither what the device is nor whose tags come. */
static void batch_server(struct io_uring *ring, int fd, int backing, bool honest)
{
	struct io_uring_buf_ring *lists = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct io_uring_buf_reg reg = { .ring_addr = (uintptr_t)lists, .ring_entries = LISTS, .bgid = GROUP };
	unsigned int q, i, idle = 0, rounds = 50 + rnd(2000), queues = 1 + rnd(QUEUES), first = rnd(QUEUES);
	static const unsigned int flags[] = { 0, UBLK_BATCH_F_HAS_BUF_ADDR, UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK };
	uint16_t all[DEPTH];

	io_uring_buf_ring_init(lists);
	io_uring_register_buf_ring(ring, &reg, 0);
	for (i = 0; i < LISTS; i++)
		provide_list(lists, i);
	for (i = 0; i < DEPTH; i++)
		all[i] = i;
	for (i = 0; i < queues * 3; i++) {
		q = (first + i / 3) % QUEUES;
		/* which flags are right depends on the device, and so does how many tags there are */
		for (unsigned int n = DEPTH; n; n--)
			batch(ring, fd, UBLK_U_IO_PREP_IO_CMDS, q, flags[i % 3], any_elems(flags[i % 3], all, n, true), n,
			      NOBODY);
		io_uring_submit(ring);
	}
	for (i = 0; i < queues * (1 + rnd(2)); i++)
		batch(ring, fd, UBLK_U_IO_FETCH_IO_CMDS, (first + i) % QUEUES, 0, NULL, 0, FETCHED);
	io_uring_submit(ring);
	while (rounds-- && idle < 40) {
		struct io_uring_cqe *cqe = next_cqe(ring);

		if (!cqe) {
			idle++;
			continue;
		}
		if (cqe->user_data == FETCHED) {
			unsigned int id = cqe->flags >> IORING_CQE_BUFFER_SHIFT, n = cqe->res / 2;
			bool more = cqe->flags & IORING_CQE_F_MORE;
			uint16_t tags[DEPTH];

			if (cqe->flags & IORING_CQE_F_BUFFER && id < LISTS && cqe->res > 0 && n <= DEPTH) {
				idle = 0;
				memcpy(tags, memory + MEMORY / 2 + id * 256, 2 * n);
				for (q = 0; q < QUEUES; q++)
					for (i = 0; i < 3; i++)
						if (!one_in(40))
							batch(ring, fd, UBLK_U_IO_COMMIT_IO_CMDS, q, flags[i],
							      any_elems(flags[i], tags, n, honest), n, NOBODY);
				if (!one_in(10))
					provide_list(lists, id);
			}
			if (!more) {
				if (one_in(2))
					provide_list(lists, rnd(LISTS));
				batch(ring, fd, UBLK_U_IO_FETCH_IO_CMDS, rnd(QUEUES), 0, NULL, 0, FETCHED);
				idle++;
			}
		}
		io_uring_cqe_seen(ring, cqe);
		if (one_in(4))
			use_table(ring, fd, backing);
		if (!honest && one_in(8)) {
			unsigned int f = rnd(16);

			batch(ring, fd, _IOWR('u', 0x25 + rnd(3), struct ublk_batch_io), rnd(QUEUES + 1), f,
			      any_elems(f, all, rnd(DEPTH), false), rnd(DEPTH + 3), NOBODY);
		}
		io_uring_submit(ring);
	}
}

struct thread_args {
	struct io_uring *ring;
	int fd;
};

static void *other_thread(void *arg)
{
	struct thread_args *t = arg;
	char buf[512];

	for (int i = 0; i < 30; i++) {
		off_t pos = UBLKSRV_IO_BUF_OFFSET + ((off_t)(i % QUEUES) << UBLK_QID_OFF) +
			    ((off_t)(i % DEPTH) << UBLK_TAG_OFF);

		if (pread(t->fd, buf, sizeof(buf), pos) < 0)
			usleep(100);
		if (pwrite(t->fd, buf, sizeof(buf), pos + 512) < 0)
			usleep(100);
	}
	return NULL;
}

static void server(void)
{
	unsigned int queues = 1 + rnd(QUEUES), first = rnd(QUEUES), depth = DEPTH;
	unsigned int flags = one_in(3) ? IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN : 0;
	bool honest = !one_in(4);
	struct thread_args args;
	struct io_uring ring;
	unsigned int i, idle = 0, rounds = 50 + rnd(2000);
	pthread_t thread;
	bool threaded = one_in(3);
	static char bufs[QUEUES * DEPTH][MAX_IO];
	int backing = memfd_create("backing", 0), fd;

	fd = open_char(ids[rnd(DEVICES)]);
	if (fd < 0)
		return;
	if (one_in(10))
		flags = IORING_SETUP_SQPOLL;
	if (io_uring_queue_init(64, &ring, flags))
		return;
	if (!one_in(4))
		io_uring_register_buffers_sparse(&ring, SLOTS);
	for (i = 0; i < QUEUES; i++)
		map_queue(fd, i, one_in(6) ? rnd(5000) : depth);
	if (one_in(6))
		mmap(NULL, 4096, PROT_READ | (one_in(2) ? PROT_WRITE : 0), MAP_PRIVATE, fd, rnd(1 << 20) & ~4095);
	args = (struct thread_args){ &ring, fd };
	if (threaded)
		pthread_create(&thread, NULL, other_thread, &args);
	if (one_in(3)) {
		batch_server(&ring, fd, backing, honest);
		goto end;
	}
	for (i = 0; i < queues * depth; i++) {
		unsigned int q = (first + i / depth) % QUEUES;
		uint64_t addr = honest || one_in(2) ? (uintptr_t)bufs[q * DEPTH + i % depth] : (uintptr_t)any_memory();

		io_cmd(&ring, fd, UBLK_U_IO_FETCH_REQ, q, i % depth, 0, addr);
		/* where the driver doesn't copy a buffer is refused */
		io_cmd(&ring, fd, UBLK_U_IO_FETCH_REQ, q, i % depth, 0, 0)->addr = any_place();
		if (one_in(50)) {
			struct io_uring_sqe *sqe = get_sqe(&ring, 64);

			io_uring_prep_nop(sqe);
			sqe->user_data = ~0ull;
		}
	}
	io_uring_submit(&ring);
	while (rounds-- && idle < 40) {
		struct io_uring_cqe *cqe = next_cqe(&ring);

		if (!cqe) {
			idle++;
			continue;
		}
		if (cqe->user_data < DEPTH && (cqe->res == 0 || cqe->res == 1)) {
			unsigned int tag = cqe->user_data, q;
			bool want = cqe->res == 1;

			idle = 0;
			io_uring_cqe_seen(&ring, cqe);
			/* whose tag it was is anybody's guess */
			for (q = 0; q < QUEUES; q++) {
				int res = honest ? MAX_IO : (int)rnd(1 << 20) - (1 << 17);
				uint64_t addr = one_in(2) ? (uintptr_t)bufs[q * DEPTH + tag] :
						one_in(6) ? (uintptr_t)any_memory() : 0;

				if (one_in(60))
					continue;
				io_cmd(&ring, fd, want ? UBLK_U_IO_NEED_GET_DATA : UBLK_U_IO_COMMIT_AND_FETCH_REQ, q,
				       tag, res, addr ? addr : (uintptr_t)bufs[q * DEPTH + tag]);
				if (one_in(4))
					use_table(&ring, fd, backing);
				io_cmd(&ring, fd, UBLK_U_IO_COMMIT_AND_FETCH_REQ, q, tag, res, 0)->addr = any_place();
			}
		} else {
			io_uring_cqe_seen(&ring, cqe);
		}
		if (!honest && one_in(8)) {
			struct io_uring_sqe *sqe;

			io_cmd(&ring, fd, _IOWR('u', 0x20 + rnd(9), struct ublksrv_io_cmd), rnd(QUEUES + 1),
			       rnd(DEPTH + 2), rnd(9999), (uintptr_t)any_memory());
			sqe = get_sqe(&ring, 64);
			io_uring_prep_nop(sqe);
			sqe->user_data = ~0ull;
			if (one_in(2))
				sqe->flags |= IOSQE_ASYNC;
		}
		io_uring_submit(&ring);
	}
end:
	if (one_in(2))
		io_uring_queue_exit(&ring);
	if (threaded)
		pthread_join(thread, NULL);
	/* the rest goes with the process */
}

static void user(void)
{
	static char own[128 << 10] __attribute__((aligned(4096)));
	char *buf = one_in(2) ? own : memory;
	char path[32];
	int fd, i, n = 10 + rnd(200);

	snprintf(path, sizeof(path), "/dev/ublkb%u", ids[rnd(DEVICES)]);
	fd = open(path, O_RDWR | O_NONBLOCK | (one_in(2) ? O_DIRECT : 0));
	if (fd < 0) {
		usleep(20000);
		return;
	}
	alarm(10);
	for (i = 0; i < n; i++) {
		size_t len = (1 + rnd(sizeof(own) / 4096)) * 4096;
		off_t at = (off_t)rnd(BYTES / 4096) * 4096;

		if (one_in(2) ? pread(fd, buf, len, at) < 0 : pwrite(fd, buf, len, at) < 0)
			usleep(1000);
		else
			count(&well->ios);
		if (one_in(20))
			fsync(fd);
		if (one_in(40))
			fallocate(fd, 3, at, len);
	}
}

static void (*const kinds[])(void) = { controller, controller, server, server, server, user, user };

/* A first device that works, so that there is something to break. */
static void set_table(struct control *c)
{
	struct ublksrv_ctrl_dev_info info;
	struct ublk_params params;
	int i;

	for (i = 0; i < DEVICES; i++) {
		ids[i] = 10 + i;
		info = (struct ublksrv_ctrl_dev_info){
			.nr_hw_queues = QUEUES,
			.queue_depth = DEPTH,
			.max_io_buf_bytes = MAX_IO,
			.dev_id = ids[i],
			.flags = recovery[rnd(6)] | any_transport() | (one_in(2) ? UBLK_F_SHMEM_ZC : 0),
		};
		if (one_in(4))
			info.flags |= UBLK_F_USER_COPY | UBLK_F_ZONED;
		params = info.flags & UBLK_F_ZONED ? zoned_params() : plain_params(BYTES);
		control(c, UBLK_U_CMD_ADD_DEV, ids[i], &info, sizeof(info), 0);
		set_params(c, ids[i], &params);
	}
}

static void take_faults(void)
{
	int fd = open("/proc/self/make-it-fail", O_WRONLY);

	if (fd < 0 || write(fd, "1", 1) != 1)
		die("make-it-fail");
	close(fd);
}

static pid_t launch(int kind)
{
	unsigned int next = rand_r(&seed);
	pid_t pid = fork();

	if (pid)
		return pid;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	seed = next;
	if (faults && !one_in(3))
		take_faults();
	kinds[kind]();
	_exit(0);
}

int main(int argc, char **argv)
{
	int64_t until = now_us() + (argc > 1 ? atoll(argv[1]) : 20) * 1000000ll;
	pid_t pids[ACTORS] = { 0 };
	struct control c;
	unsigned long deaths = 0, generations = 0;
	int i, left = 0;

	seed = argc > 2 ? atoi(argv[2]) : time(NULL);
	faults = argc > 3;
	if (faults && access("/proc/self/make-it-fail", W_OK))
		die("make-it-fail");
	printf("seed %u\n", seed);
	fflush(stdout);
	memory = mmap(NULL, MEMORY, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	well = mmap(NULL, sizeof(*well), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED || well == MAP_FAILED)
		die("memory");
	control_open(&c);
	set_table(&c);
	while (now_us() < until) {
		for (i = 0; i < ACTORS; i++) {
			int kind = i;

			if (pids[i] && !waitpid(pids[i], NULL, WNOHANG)) {
				if (one_in(60)) {
					kill(pids[i], SIGKILL);
					deaths++;
				}
				continue;
			}
			pids[i] = launch(kind);
			generations++;
		}
		if (one_in(100))
			set_table(&c);
		usleep(5000 + rnd(10000));
	}
	for (i = 0; i < ACTORS; i++)
		kill(pids[i], SIGKILL);
	/* users of a disk that waits for a server go only with the disk */
	for (i = 0; i < 300; i++) {
		int res = control(&c, UBLK_U_CMD_DEL_DEV, i < 200 ? (uint32_t)i : ids[i % DEVICES], NULL, 0, 0);

		if (res && res != -ENODEV) {
			fprintf(stderr, "device %d can't be deleted: %d\n", i, res);
			left++;
		}
	}
	for (i = 0; i < ACTORS; i++) {
		int waited = 0;

		while (!waitpid(pids[i], NULL, WNOHANG) && waited++ < 30000)
			usleep(10000);
		if (waited >= 30000) {
			fprintf(stderr, "actor %d (pid %d) does not end\n", i, pids[i]);
			left++;
		}
	}
	printf("%lu processes, %lu killed, %d left\n", generations, deaths, left);
	printf("%lu commands and %lu reads and writes went well\n", well->commands, well->ios);
	return left ? 1 : 0;
}
