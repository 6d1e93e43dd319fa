/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A RAM disk of one process per queue, each with its own open file, and a
 * controller that kills them. On stdin: "quiet MS", "kill N", "quit"; on stdout
 * the disk's path, then one line of JSON for each command.
 */
#include <signal.h>

#include "client.h"

#define QUEUES 4
#define DEPTH 32
#define BYTES (64 << 20)

struct shared {
	struct {
		volatile int64_t last_us;	/* completion */
		volatile int64_t gap_us;	/* longest between two, since reset */
		volatile uint64_t done;
	} queue[QUEUES];
};

static struct shared *shared;
static char *disk;
static struct ublksrv_ctrl_dev_info info;

static int serve(struct ublksrv_io_desc *desc, char *buf)
{
	size_t at = desc->start_sector << 9, len = (size_t)desc->nr_sectors << 9;

	switch (ublksrv_get_op(desc)) {
	case UBLK_IO_OP_READ:
		memcpy(buf, disk + at, len);
		return len;
	case UBLK_IO_OP_WRITE:
		memcpy(disk + at, buf, len);
		return len;
	case UBLK_IO_OP_FLUSH:
		return 0;
	}
	return -EOPNOTSUPP;
}

static void worker(unsigned int q)
{
	struct ublksrv_io_desc *descs;
	struct io_uring ring;
	unsigned int tag;
	char *bufs;
	int fd, err;

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	fd = open_char(info.dev_id);
	if (fd < 0)
		die("open");
	descs = map_queue(fd, q, DEPTH);
	if (descs == MAP_FAILED)
		die("mmap");
	bufs = mmap(NULL, (size_t)DEPTH * MAX_IO, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	err = io_uring_queue_init(2 * DEPTH, &ring, 0);
	if (err < 0 || bufs == MAP_FAILED)
		die("ring");
	for (tag = 0; tag < DEPTH; tag++)
		io_cmd(&ring, fd, UBLK_U_IO_FETCH_REQ, q, tag, 0, (uintptr_t)(bufs + tag * MAX_IO));
	for (;;) {
		struct io_uring_cqe *cqe;
		unsigned int head, n = 0;

		err = io_uring_submit_and_wait(&ring, 1);
		if (err < 0 && err != -EINTR)
			exit(3);
		io_uring_for_each_cqe(&ring, head, cqe) {
			int64_t now, gap;

			n++;
			tag = cqe->user_data;
			if (cqe->res == -EBUSY) {
				/* the one before us isn't quite gone */
				usleep(200);
				io_cmd(&ring, fd, UBLK_U_IO_FETCH_REQ, q, tag, 0, (uintptr_t)(bufs + tag * MAX_IO));
				continue;
			}
			if (cqe->res == -ENODEV)
				exit(0);
			if (cqe->res) {
				fprintf(stderr, "queue %u tag %u: %d\n", q, tag, cqe->res);
				exit(4);
			}
			err = serve(&descs[tag], bufs + tag * MAX_IO);
			io_cmd(&ring, fd, UBLK_U_IO_COMMIT_AND_FETCH_REQ, q, tag, err,
			       (uintptr_t)(bufs + tag * MAX_IO));
			now = now_us();
			gap = now - shared->queue[q].last_us;
			if (shared->queue[q].last_us && gap > shared->queue[q].gap_us)
				shared->queue[q].gap_us = gap;
			shared->queue[q].last_us = now;
			shared->queue[q].done++;
		}
		io_uring_cq_advance(&ring, n);
	}
}

static pid_t start_worker(unsigned int q)
{
	pid_t pid = fork();

	if (!pid) {
		worker(q);
		exit(0);
	}
	return pid;
}

static void reset(void)
{
	for (unsigned int q = 0; q < QUEUES; q++) {
		shared->queue[q].gap_us = 0;
		shared->queue[q].last_us = now_us();
	}
}

static int64_t worst_gap(int but)
{
	int64_t worst = 0;

	for (int q = 0; q < QUEUES; q++)
		if (q != but && shared->queue[q].gap_us > worst)
			worst = shared->queue[q].gap_us;
	return worst;
}

static int state_of(struct control *c, unsigned int q)
{
	struct ublk_queue_state states[QUEUES];
	int n = control(c, UBLK_U_CMD_GET_QUEUE_STATES, info.dev_id, states, sizeof(states), 0);

	if (n != (int)info.nr_hw_queues) {
		errno = -n;
		die("queue states");
	}
	return states[q].state;
}

int main(void)
{
	struct ublk_params params = plain_params(BYTES);
	pid_t pids[QUEUES];
	struct control c;
	char line[64];
	int err, n;

	setvbuf(stdout, NULL, _IOLBF, 0);
	control_open(&c);
	err = add(&c, &info, QUEUES, DEPTH,
		  UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE | UBLK_F_SHARDS | UBLK_F_NO_AUTO_PART_SCAN);
	if (!err && (!(info.flags & UBLK_F_SHARDS) || info.nr_hw_queues != QUEUES))
		err = -ENOTSUP;
	if (!err)
		err = set_params(&c, info.dev_id, &params);
	if (err) {
		fprintf(stderr, "add: %d\n", err);
		return 2;
	}
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	disk = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	for (unsigned int q = 0; q < QUEUES; q++)
		pids[q] = start_worker(q);
	err = control(&c, UBLK_U_CMD_START_DEV, info.dev_id, NULL, 0, getpid());
	if (err) {
		fprintf(stderr, "start: %d\n", err);
		return 2;
	}
	printf("/dev/ublkb%u\n", info.dev_id);

	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "quiet %d", &n) == 1) {
			uint64_t before[QUEUES], least = ~0ull;

			for (int j = 0; j < QUEUES; j++)
				before[j] = shared->queue[j].done;
			reset();
			usleep(n * 1000);
			for (int j = 0; j < QUEUES; j++)
				if (shared->queue[j].done - before[j] < least)
					least = shared->queue[j].done - before[j];
			printf("{\"gap_us\": %lld, \"done\": %llu}\n", (long long)worst_gap(-1),
			       (unsigned long long)least);
		} else if (sscanf(line, "kill %d", &n) == 1) {
			int64_t worst = 0, takeover = 0, total = 0;

			for (int i = 0; i < n; i++) {
				unsigned int q = random() % QUEUES;
				uint64_t before[QUEUES];
				int64_t from, took;

				for (int j = 0; j < QUEUES; j++)
					before[j] = shared->queue[j].done;
				reset();
				from = now_us();
				kill(pids[q], SIGKILL);
				waitpid(pids[q], NULL, 0);
				pids[q] = start_worker(q);
				while (state_of(&c, q) != UBLK_QUEUE_SERVED) {
					if (now_us() - from > PATIENCE_MS * 1000ll) {
						fprintf(stderr, "queue %u is not served again\n", q);
						return 5;
					}
					usleep(500);
				}
				took = now_us() - from;
				total += took;
				if (took > takeover)
					takeover = took;
				usleep(20000 + random() % 20000);
				if (worst_gap(q) > worst)
					worst = worst_gap(q);
				/* all go on, the dead one's queue too */
				for (int j = 0; j < QUEUES; j++) {
					while (shared->queue[j].done == before[j]) {
						if (now_us() - from > PATIENCE_MS * 1000ll) {
							fprintf(stderr, "kill %d: queue %d stands still\n", i, j);
							return 5;
						}
						usleep(500);
					}
				}
			}
			printf("{\"gap_us\": %lld, \"takeover_us\": %lld, \"worst_takeover_us\": %lld}\n",
			       (long long)worst, (long long)(total / (n ? n : 1)), (long long)takeover);
		} else if (!strncmp(line, "quit", 4)) {
			break;
		}
	}
	err = control(&c, UBLK_U_CMD_STOP_DEV, info.dev_id, NULL, 0, 0);
	for (unsigned int q = 0; q < QUEUES; q++)
		waitpid(pids[q], NULL, 0);
	if (!err)
		err = control(&c, UBLK_U_CMD_DEL_DEV, info.dev_id, NULL, 0, 0);
	printf("{\"end\": %d}\n", err);
	return err ? 6 : 0;
}
