// SPDX-License-Identifier: Apache-2.0
/*
 * A ublk server of one queue, for measuring what a request costs at depth 1:
 * null on user copy, or loop on automatic buffer registration with the target's
 * request linked to its commit. Its loop is in user space, or a BPF program.
 *
 *	server [-o OPTION,...] [FILE]
 *
 * Prints the device's path when there is one, and serves until SIGTERM.
 */
#include <pthread.h>
#include <signal.h>

#include "client.h"
#include "ring.h"
#include "step.h"

#define DEPTH 128
#define SIZE (128ull << 20)

enum option {
	BPF,		/* the loop is a BPF program */
	NO_DESC,	/* the length is taken for 4 KiB: no descriptor is read */
	PLAIN_FILES,	/* no registered files */
	PLAIN_RING,	/* the ring is not registered */
	SQARRAY,	/* with the array of indices that rings had at first */
	NO_REWIND,	/* with head and tail of the submission queue */
	NO_IOWAIT,	/* waiting is not waiting for I/O */
	TASK_WORK,	/* no DEFER_TASKRUN */
	TWO_ENTERS,	/* submit, then wait */
	NO_LINK,	/* loop: the commit is sent when the target's request is done */
	NO_BATCH,	/* SCHED_OTHER */
	REGION,		/* try to register the descriptors as a region of the ring; serve nothing */
	OPTIONS
};

static const char *const names[OPTIONS] = {
	"bpf",	     "no-desc",	  "plain-files", "plain-ring", "sqarray",  "no-rewind",
	"no-iowait", "task-work", "two-enters",	 "no-link",    "no-batch", "region",
};

static bool option[OPTIONS];

struct queue {
	struct ring ring;
	int char_fd, file;
	int char_index, file_index;
	struct ublksrv_io_desc *descs;
	pthread_barrier_t fetched;
	int end;
};

__attribute__((noreturn)) static void give_up(const char *what, int err)
{
	errno = -err;
	die(what);
}

/* Linux's slices of 0.7 ms on one CPU would cut passes of a deep queue: as ublkd does it. */
static void batch_task(void)
{
	struct {
		uint32_t size, policy;
		uint64_t flags;
		int32_t nice;
		uint32_t priority;
		uint64_t runtime, deadline, period;
	} attr = { .size = sizeof(attr), .policy = SCHED_BATCH, .runtime = 3000000 };

	if (syscall(SYS_sched_setattr, 0, &attr, 0) < 0)
		die("sched_setattr");
}

static bool has_data_sqe(const struct queue *q)
{
	return q->file >= 0 && !option[NO_LINK];
}

static void prepare_command(const struct queue *q, struct io_uring_sqe *sqe, uint32_t op)
{
	memset(sqe, 0, sizeof(*sqe));
	sqe->opcode = IORING_OP_URING_CMD;
	sqe->fd = q->char_index;
	sqe->flags = option[PLAIN_FILES] ? 0 : IOSQE_FIXED_FILE;
	sqe->cmd_op = op;
}

static void prepare_data(const struct queue *q, struct io_uring_sqe *sqe)
{
	memset(sqe, 0, sizeof(*sqe));
	sqe->fd = q->file_index;
	sqe->flags = option[PLAIN_FILES] ? 0 : IOSQE_FIXED_FILE;
	if (!option[NO_LINK])
		sqe->flags |= IOSQE_IO_LINK | IOSQE_CQE_SKIP_SUCCESS;
	sqe->user_data = ~0ull; /* a failure ends the experiment */
}

static void fill_command(const struct queue *q, struct io_uring_sqe *sqe, unsigned int tag, int result)
{
	struct ublksrv_io_cmd cmd = { .tag = tag, .result = result };

	sqe->user_data = tag;
	memcpy((char *)sqe + 48, &cmd, sizeof(cmd));
	if (q->file >= 0)
		sqe->addr = tag; /* the buffer that the tag's next request gets */
}

static void fill_data(struct io_uring_sqe *sqe, unsigned int tag, const struct ublksrv_io_desc *desc)
{
	sqe->opcode = ublksrv_get_op(desc) == UBLK_IO_OP_READ ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED;
	sqe->off = desc->start_sector << 9;
	sqe->len = desc->nr_sectors << 9;
	sqe->buf_index = tag;
}

static int result_of(const struct ublksrv_io_desc *desc)
{
	if (option[NO_DESC])
		return 4096;
	return ublksrv_get_op(desc) <= UBLK_IO_OP_WRITE ? (int)(desc->nr_sectors << 9) : 0;
}

/* Everything in the entries that doesn't change: a pass then writes only what does. */
static void prepare_entries(struct queue *q)
{
	bool pairs = has_data_sqe(q);

	for (unsigned int i = 0; i < q->ring.p.sq_entries; i++)
		if (pairs && i % 2 == 0)
			prepare_data(q, &q->ring.sqes[i]);
		else
			prepare_command(q, &q->ring.sqes[i], UBLK_U_IO_COMMIT_AND_FETCH_REQ);
}

static void fetch_all(struct queue *q)
{
	int done;

	for (unsigned int tag = 0; tag < DEPTH; tag++) {
		struct io_uring_sqe *sqe = ring_sqe(&q->ring, tag);

		prepare_command(q, sqe, UBLK_U_IO_FETCH_REQ);
		fill_command(q, sqe, tag, 0);
	}
	ring_publish(&q->ring, DEPTH);
	done = ring_enter(&q->ring, DEPTH, 0);
	if (done != DEPTH)
		give_up("fetch", done);
	prepare_entries(q);
}

/* The entries that one CQE makes, from the n-th on; how many. */
static unsigned int answer(struct queue *q, unsigned int n, const struct io_uring_cqe *cqe)
{
	unsigned int tag = cqe->user_data & (DEPTH - 1);
	const struct ublksrv_io_desc *desc = &q->descs[tag];
	struct io_uring_sqe *sqe = ring_sqe(&q->ring, n);

	if (q->file >= 0 && option[NO_LINK] && !(cqe->user_data & DEPTH)) {
		prepare_data(q, sqe);
		fill_data(sqe, tag, desc);
		sqe->user_data = tag | DEPTH;
		return 1;
	}
	if (q->file >= 0 && option[NO_LINK])
		prepare_command(q, sqe, UBLK_U_IO_COMMIT_AND_FETCH_REQ);
	if (!has_data_sqe(q)) {
		fill_command(q, sqe, tag, result_of(desc));
		return 1;
	}
	fill_data(sqe, tag, desc);
	fill_command(q, ring_sqe(&q->ring, n + 1), tag, result_of(desc));
	return 2;
}

static int loop_in_user_space(struct queue *q)
{
	struct ring *ring = &q->ring;
	uint32_t *head = ring_word(ring, ring->p.cq_off.head), at = *head;
	unsigned int n = 0;
	int done;

	for (;;) {
		if (option[TWO_ENTERS] && n) {
			done = ring_enter(ring, n, 0);
			n = 0;
			if (done < 0)
				return done;
		}
		done = ring_enter(ring, n, 1);
		if (done < 0 && done != -EINTR)
			return done;
		n = 0;
		for (uint32_t tail = ring_cq_tail(ring); at != tail; at++) {
			const struct io_uring_cqe *cqe = ring_cqe(ring, at);

			if (cqe->res < 0)
				return cqe->res;
			n += answer(q, n, cqe);
		}
		__atomic_store_n(head, at, __ATOMIC_RELEASE);
		ring_publish(ring, n);
	}
}

static int loop_in_kernel(struct queue *q)
{
	struct step step = {
		.depth = DEPTH,
		.descs = (uintptr_t)q->descs,
		.has_data_sqe = has_data_sqe(q),
		.has_length = option[NO_DESC],
		.length = 4096,
	};
	int map = step_attach(&step, &q->ring), done;

	if (map < 0)
		return map;
	do
		done = ring_enter(&q->ring, 0, 1);
	while (done == -EINTR);
	step_detach(map);
	if (done < 0)
		fprintf(stderr, "server: io_uring_enter: %s\n", strerror(-done));
	return done < 0 ? done : ring_cqe(&q->ring, *ring_word(&q->ring, q->ring.p.cq_off.head))->res;
}

static void make_ring(struct queue *q)
{
	unsigned int flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_SUBMIT_ALL;
	struct io_uring_rsrc_register buffers = { .nr = DEPTH, .flags = IORING_RSRC_REGISTER_SPARSE };
	int files[2] = { q->char_fd, q->file }, err;

	if (!option[TASK_WORK])
		flags |= IORING_SETUP_DEFER_TASKRUN;
	if (!option[SQARRAY])
		flags |= SETUP_NO_SQARRAY;
	if (!option[SQARRAY] && !option[NO_REWIND])
		flags |= SETUP_SQ_REWIND;
	err = ring_make(&q->ring, 2 * DEPTH, 4 * DEPTH, flags);
	if (err)
		give_up("io_uring_setup", err);
	if (!option[PLAIN_RING] && (err = ring_register_itself(&q->ring)))
		give_up("registering the ring", err);
	if (!option[PLAIN_FILES] && (err = ring_register(&q->ring, IORING_REGISTER_FILES, files, q->file < 0 ? 1 : 2)))
		give_up("registering files", err);
	if (q->file >= 0 && (err = ring_register(&q->ring, IORING_REGISTER_BUFFERS2, &buffers, sizeof(buffers))))
		give_up("registering buffers", err);
	if (option[NO_IOWAIT])
		q->ring.enter_flags |= ENTER_NO_IOWAIT;
	q->char_index = option[PLAIN_FILES] ? q->char_fd : 0;
	q->file_index = option[PLAIN_FILES] ? q->file : 1;
}

/* Could BPF see the driver's descriptors as memory of the ring? */
static void try_region(struct queue *q)
{
	struct { uint64_t user_addr, size; uint32_t flags, id; uint64_t mmap_offset, reserved[4]; } region = {
		.user_addr = (uintptr_t)q->descs,
		.size = descs_size(DEPTH),
		.flags = 1, /* memory of the caller */
	};
	struct { uint64_t region, flags, reserved[2]; } reg = { .region = (uintptr_t)&region };
	int err = ring_register(&q->ring, REGISTER_MEM_REGION, &reg, 1);

	printf("descriptors as a region: %s\n", strerror(-err));
	region.user_addr = (uintptr_t)mmap(NULL, region.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	err = ring_register(&q->ring, REGISTER_MEM_REGION, &reg, 1);
	printf("plain memory as a region: %s\n", strerror(-err));
	fflush(stdout);
}

static void *serve(void *arg)
{
	struct queue *q = arg;

	if (!option[NO_BATCH])
		batch_task();
	make_ring(q);
	if (option[REGION])
		try_region(q);
	fetch_all(q);
	pthread_barrier_wait(&q->fetched);
	q->end = option[BPF] ? loop_in_kernel(q) : loop_in_user_space(q);
	if (q->end != -ENODEV) {
		/* with the process go the ring and its commands, and the driver ends the device */
		fprintf(stderr, "server: the queue ended: %s\n", strerror(-q->end));
		_exit(1);
	}
	return NULL;
}

static void read_options(char *text)
{
	for (char *word = strtok(text, ","); word; word = strtok(NULL, ",")) {
		int i = 0;

		while (i < OPTIONS && strcmp(word, names[i]))
			i++;
		if (i == OPTIONS) {
			fprintf(stderr, "server: no option %s\n", word);
			exit(2);
		}
		option[i] = true;
	}
}

int main(int argc, char **argv)
{
	static struct queue q = { .file = -1 };
	struct ublksrv_ctrl_dev_info info;
	struct ublk_params params = plain_params(SIZE);
	struct control c;
	pthread_t thread;
	sigset_t signals;
	int opt, sig, err;

	while ((opt = getopt(argc, argv, "o:")) != -1) {
		if (opt != 'o')
			return 2;
		read_options(optarg);
	}
	if (optind < argc) {
		q.file = open(argv[optind], O_RDWR | O_DIRECT | O_CLOEXEC);
		if (q.file < 0)
			die(argv[optind]);
	}
	sigemptyset(&signals);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	sigprocmask(SIG_BLOCK, &signals, NULL);
	control_open(&c);
	err = add(&c, &info, 1, DEPTH, q.file < 0 ? UBLK_F_USER_COPY | UBLK_F_NO_AUTO_PART_SCAN :
					     UBLK_F_AUTO_BUF_REG | UBLK_F_NO_AUTO_PART_SCAN);
	if (err)
		give_up("adding a device", err);
	err = set_params(&c, info.dev_id, &params);
	if (err)
		give_up("setting its parameters", err);
	q.char_fd = open_char(info.dev_id);
	if (q.char_fd < 0)
		die("the char device");
	q.descs = map_queue(q.char_fd, 0, DEPTH);
	if (q.descs == MAP_FAILED)
		die("mapping the queue");
	pthread_barrier_init(&q.fetched, NULL, 2);
	pthread_create(&thread, NULL, serve, &q);
	pthread_barrier_wait(&q.fetched);
	err = control(&c, UBLK_U_CMD_START_DEV, info.dev_id, NULL, 0, getpid());
	if (err)
		give_up("starting the device", err);
	printf("/dev/ublkb%u\n", info.dev_id);
	fflush(stdout);
	sigwait(&signals, &sig);
	control(&c, UBLK_U_CMD_STOP_DEV, info.dev_id, NULL, 0, 0);
	pthread_join(thread, NULL);
	munmap(q.descs, descs_size(DEPTH));
	close(q.char_fd);
	control(&c, UBLK_U_CMD_DEL_DEV, info.dev_id, NULL, 0, 0);
	control_close(&c);
	return q.end != -ENODEV;
}
