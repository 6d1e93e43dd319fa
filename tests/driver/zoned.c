/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A zoned disk in memory, and what its users see of it.
 *
 *   zoned cases     commands and I/O, legal and not: one line "name result" each, for any driver
 *   zoned liars     a server that reports zones wrongly, or dies in a report: for ours only
 *   zoned disk      prints the disk's path, serves until stdin ends, then prints how often each operation came
 */
#include <linux/blkzoned.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>

#include "client.h"

#define DEPTH 32
#define ZONES 48
#define ZONE_BYTES (4ull << 20)
#define ZONE_SECTORS (ZONE_BYTES >> 9)
#define CONVENTIONAL 4
#define BYTES (ZONES * ZONE_BYTES)

enum lie { HONEST, NO_ZONES, WRONG_PLACE, TOO_LONG, DIE, REFUSE };

static struct control c;
static uint32_t id;
static struct blk_zone zones[ZONES];
static char *memory;
static unsigned long seen[256];
static enum lie lie;
static bool append_outside;

static void say(const char *name, long result)
{
	printf("%s %ld\n", name, result);
	fflush(stdout);
}

static void set_zones(void)
{
	for (unsigned int i = 0; i < ZONES; i++)
		zones[i] = (struct blk_zone){
			.start = i * ZONE_SECTORS,
			.len = ZONE_SECTORS,
			.wp = i < CONVENTIONAL ? ~0ull : i * ZONE_SECTORS,
			.type = i < CONVENTIONAL ? BLK_ZONE_TYPE_CONVENTIONAL : BLK_ZONE_TYPE_SEQWRITE_REQ,
			.cond = i < CONVENTIONAL ? BLK_ZONE_COND_NOT_WP : BLK_ZONE_COND_EMPTY,
			.capacity = ZONE_SECTORS,
		};
}

static int move(int fd, unsigned int tag, size_t at, size_t len, bool to_client)
{
	off_t pos = UBLKSRV_IO_BUF_OFFSET + ((off_t)tag << UBLK_TAG_OFF);

	for (size_t done = 0; done < len;) {
		ssize_t n = to_client ? pwrite(fd, memory + at + done, len - done, pos + done) :
					pread(fd, memory + at + done, len - done, pos + done);

		if (n <= 0)
			return -EIO;
		done += n;
	}
	return len;
}

static int report(int fd, unsigned int tag, const struct ublksrv_io_desc *desc)
{
	off_t pos = UBLKSRV_IO_BUF_OFFSET + ((off_t)tag << UBLK_TAG_OFF);
	unsigned int first = desc->start_sector / ZONE_SECTORS, n = desc->nr_zones;
	struct blk_zone found[ZONES];
	size_t len;

	if (first >= ZONES)
		return -EINVAL;
	if (n > ZONES - first)
		n = ZONES - first;
	memcpy(found, zones + first, n * sizeof(found[0]));
	switch (lie) {
	case NO_ZONES:
		memset(found, 0, sizeof(found));
		break;
	case WRONG_PLACE:
		found[n - 1].start += 8;
		break;
	case TOO_LONG:
		found[n - 1].len *= 2;
		break;
	case REFUSE:
		return -EIO;
	default:
		break;
	}
	len = n * sizeof(found[0]);
	if (pwrite(fd, found, len, pos) != (ssize_t)len)
		return -EIO;
	return len;
}

static void advance(struct blk_zone *zone, uint64_t sectors)
{
	zone->wp += sectors;
	zone->cond = zone->wp == zone->start + zone->len ? BLK_ZONE_COND_FULL : BLK_ZONE_COND_IMP_OPEN;
}

static void reset(struct blk_zone *zone)
{
	if (zone->type == BLK_ZONE_TYPE_CONVENTIONAL)
		return;
	zone->wp = zone->start;
	zone->cond = BLK_ZONE_COND_EMPTY;
	memset(memory + (zone->start << 9), 0, ZONE_BYTES);
}

static int serve(int fd, unsigned int tag, const struct ublksrv_io_desc *desc, uint64_t *lba)
{
	uint64_t sector = desc->start_sector, sectors = desc->nr_sectors;
	struct blk_zone *zone = sector < ZONES * ZONE_SECTORS ? &zones[sector / ZONE_SECTORS] : NULL;
	unsigned int op = ublksrv_get_op(desc);
	int res;

	seen[op]++;
	if (!zone)
		return -EINVAL;
	switch (op) {
	case UBLK_IO_OP_READ:
		return move(fd, tag, sector << 9, sectors << 9, true);
	case UBLK_IO_OP_ZONE_APPEND:
		if (zone->type == BLK_ZONE_TYPE_CONVENTIONAL || sectors > zone->start + zone->len - zone->wp)
			return -EIO;
		*lba = zone->wp;
		res = move(fd, tag, *lba << 9, sectors << 9, false);
		if (res > 0)
			advance(zone, sectors);
		if (append_outside)
			*lba = zone->start + ZONE_SECTORS;
		return res;
	case UBLK_IO_OP_WRITE:
		if (zone->type != BLK_ZONE_TYPE_CONVENTIONAL) {
			if (sector != zone->wp || sectors > zone->start + zone->len - zone->wp)
				return -EIO;
			advance(zone, sectors);
		}
		return move(fd, tag, sector << 9, sectors << 9, false);
	case UBLK_IO_OP_FLUSH:
		return 0;
	case UBLK_IO_OP_REPORT_ZONES:
		return report(fd, tag, desc);
	case UBLK_IO_OP_ZONE_RESET:
		reset(zone);
		return 0;
	case UBLK_IO_OP_ZONE_RESET_ALL:
		for (unsigned int i = 0; i < ZONES; i++)
			reset(&zones[i]);
		return 0;
	case UBLK_IO_OP_ZONE_OPEN:
		zone->cond = BLK_ZONE_COND_EXP_OPEN;
		return 0;
	case UBLK_IO_OP_ZONE_CLOSE:
		zone->cond = zone->wp == zone->start ? BLK_ZONE_COND_EMPTY : BLK_ZONE_COND_CLOSED;
		return 0;
	case UBLK_IO_OP_ZONE_FINISH:
		zone->wp = zone->start + zone->len;
		zone->cond = BLK_ZONE_COND_FULL;
		return 0;
	}
	return -EOPNOTSUPP;
}

static int ready[2];

/* Until the driver wants no tag any more. */
static void *server(void *arg)
{
	struct ublksrv_io_desc *descs;
	unsigned int tag, tags = DEPTH;
	struct io_uring ring;
	int fd = open_char(id), res;

	(void)arg;
	descs = fd < 0 ? MAP_FAILED : map_queue(fd, 0, DEPTH);
	if (descs == MAP_FAILED || io_uring_queue_init(2 * DEPTH, &ring, 0))
		die("server");
	for (tag = 0; tag < DEPTH; tag++)
		io_cmd(&ring, fd, UBLK_U_IO_FETCH_REQ, 0, tag, 0, 0);
	io_uring_submit(&ring);
	if (write(ready[1], "", 1) != 1)
		die("pipe");
	while (tags) {
		struct io_uring_cqe *cqe;
		uint64_t lba = 0;

		io_uring_submit(&ring);
		if (io_uring_wait_cqe(&ring, &cqe))
			continue;
		tag = cqe->user_data;
		res = cqe->res;
		io_uring_cqe_seen(&ring, cqe);
		if (res) {
			if (res != -ENODEV)
				fprintf(stderr, "tag %u: %d\n", tag, res);
			tags--;
			continue;
		}
		if (lie == DIE && ublksrv_get_op(&descs[tag]) == UBLK_IO_OP_REPORT_ZONES)
			raise(SIGKILL);
		res = serve(fd, tag, &descs[tag], &lba);
		io_cmd(&ring, fd, UBLK_U_IO_COMMIT_AND_FETCH_REQ, 0, tag, res, lba);
	}
	io_uring_queue_exit(&ring);
	munmap(descs, descs_size(DEPTH));
	close(fd);
	return NULL;
}

static struct ublk_params zoned_params(void)
{
	struct ublk_params p = plain_params(BYTES);

	p.types |= UBLK_PARAM_TYPE_ZONED;
	p.basic.logical_bs_shift = 12;
	p.basic.chunk_sectors = ZONE_SECTORS;
	p.zoned = (struct ublk_param_zoned){
		.max_open_zones = 8,
		.max_active_zones = 16,
		.max_zone_append_sectors = MAX_IO >> 9,
	};
	return p;
}

static int make(uint64_t flags)
{
	struct ublksrv_ctrl_dev_info info;
	int err = add(&c, &info, 1, DEPTH, flags);

	id = info.dev_id;
	return err;
}

static int start(void)
{
	return control(&c, UBLK_U_CMD_START_DEV, id, NULL, 0, getpid());
}

static pthread_t start_server(void)
{
	pthread_t thread;
	char byte;

	set_zones();
	pthread_create(&thread, NULL, server, NULL);
	if (read(ready[0], &byte, 1) != 1)
		die("pipe");
	return thread;
}

static void finish(pthread_t thread)
{
	int err = control(&c, UBLK_U_CMD_STOP_DEV, id, NULL, 0, 0);

	pthread_join(thread, NULL);
	if (!err)
		err = control(&c, UBLK_U_CMD_DEL_DEV, id, NULL, 0, 0);
	must(err, "delete");
}

static void param_cases(void)
{
	static const struct {
		const char *name;
		uint32_t chunk, append, open, active;
		bool zoned;
	} cases[] = {
		{ "params.good", ZONE_SECTORS, 128, 8, 16, true },
		{ "params.not-zoned", ZONE_SECTORS, 128, 8, 16, false },
		{ "params.no-chunk", 0, 128, 8, 16, true },
		{ "params.odd-chunk", ZONE_SECTORS + 8, 128, 8, 16, true },
		{ "params.no-append", ZONE_SECTORS, 0, 8, 16, true },
		{ "params.open-all", ZONE_SECTORS, 128, ZONES, 0, true },
		{ "params.open-too-many", ZONE_SECTORS, 128, ZONES + 1, 0, true },
		{ "params.active-too-many", ZONE_SECTORS, 128, 0, ZONES + 1, true },
	};

	say("add.without-user-copy", make(UBLK_F_ZONED));
	if (make(UBLK_F_ZONED | UBLK_F_USER_COPY))
		die("add");
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct ublk_params p = zoned_params();

		if (!cases[i].zoned)
			p.types &= ~UBLK_PARAM_TYPE_ZONED;
		p.basic.chunk_sectors = cases[i].chunk;
		p.zoned.max_zone_append_sectors = cases[i].append;
		p.zoned.max_open_zones = cases[i].open;
		p.zoned.max_active_zones = cases[i].active;
		say(cases[i].name, set_params(&c, id, &p));
	}
	control(&c, UBLK_U_CMD_DEL_DEV, id, NULL, 0, 0);
}

static int open_disk(int flags)
{
	char path[32];

	snprintf(path, sizeof(path), "/dev/ublkb%u", id);
	return open(path, flags);
}

static long attribute(const char *name)
{
	char path[96], text[64] = "";
	FILE *file;

	snprintf(path, sizeof(path), "/sys/block/ublkb%u/queue/%s", id, name);
	file = fopen(path, "r");
	if (!file || !fgets(text, sizeof(text), file))
		return -1;
	fclose(file);
	return strncmp(text, "host-managed", 12) ? atol(text) : 100;
}

static struct {
	struct blk_zone_report head;
	struct blk_zone zones[ZONES + 8];
} reported;

static long get_report(int fd, uint64_t sector, unsigned int n)
{
	memset(&reported, 0, sizeof(reported));
	reported.head.sector = sector;
	reported.head.nr_zones = n;
	return ioctl(fd, BLKREPORTZONE, &reported) ? -errno : (long)reported.head.nr_zones;
}

static long command(int fd, unsigned long op, unsigned int first, unsigned int n)
{
	struct blk_zone_range range = { first * ZONE_SECTORS, n * ZONE_SECTORS };

	return ioctl(fd, op, &range) ? -errno : 0;
}

static long transfer(int fd, unsigned int zone, uint64_t offset, size_t len, bool write)
{
	static char buf[256 << 10] __attribute__((aligned(4096)));
	off_t at = zone * ZONE_BYTES + offset;
	ssize_t n;

	memset(buf, 'a' + zone, sizeof(buf));
	n = write ? pwrite(fd, buf, len, at) : pread(fd, buf, len, at);
	if (n < 0)
		return -errno;
	return write ? n : n + buf[0] + buf[n - 1];
}

/* How a zone is: condition and write pointer, by a report of it alone. */
static void say_zone(int fd, const char *what, unsigned int zone)
{
	char name[64];
	long n = get_report(fd, zone * ZONE_SECTORS, 1);

	snprintf(name, sizeof(name), "%s.condition", what);
	say(name, n == 1 ? reported.zones[0].cond : n);
	snprintf(name, sizeof(name), "%s.written", what);
	say(name, n == 1 ? (long)(reported.zones[0].wp - reported.zones[0].start) : n);
}

static void io_cases(void)
{
	struct ublk_params params = zoned_params();
	pthread_t thread;
	int fd;

	if (make(UBLK_F_ZONED | UBLK_F_USER_COPY))
		die("add");
	if (set_params(&c, id, &params))
		die("params");
	thread = start_server();
	say("start", start());
	say("zoned", attribute("zoned"));
	say("zones", attribute("nr_zones"));
	say("chunk", attribute("chunk_sectors"));
	say("max-open", attribute("max_open_zones"));
	say("max-active", attribute("max_active_zones"));
	say("append-bytes", attribute("zone_append_max_bytes"));
	fd = open_disk(O_RDWR | O_DIRECT);
	if (fd < 0)
		die("disk");
	say("report.all", get_report(fd, 0, ZONES + 8));
	say("report.last", reported.zones[ZONES - 1].start);
	say("report.type", reported.zones[0].type * 10 + reported.zones[ZONES - 1].type);
	say("report.some", get_report(fd, 5 * ZONE_SECTORS, 7));
	say("report.some.first", reported.zones[0].start);
	say("report.past-end", get_report(fd, ZONES * ZONE_SECTORS, 1));
	say_zone(fd, "empty", 5);

	say("write.conventional", transfer(fd, 0, 8192, 4096, true));
	say("read.conventional", transfer(fd, 0, 8192, 4096, false));
	say("write.first", transfer(fd, 5, 0, 4096, true));
	say("write.second", transfer(fd, 5, 4096, 200 << 10, true));
	say("read.back", transfer(fd, 5, 0, 204 << 10, false));
	say_zone(fd, "written", 5);
	say("reset", command(fd, BLKRESETZONE, 5, 1));
	say_zone(fd, "reset", 5);
	say("read.after-reset", transfer(fd, 5, 0, 4096, false));
	say("write.after-reset", transfer(fd, 5, 0, 8192, true));
	say("open", command(fd, BLKOPENZONE, 6, 1));
	say_zone(fd, "open", 6);
	say("close", command(fd, BLKCLOSEZONE, 6, 1));
	say_zone(fd, "close", 6);
	say("finish", command(fd, BLKFINISHZONE, 5, 1));
	say_zone(fd, "finish", 5);
	say("reset.some", command(fd, BLKRESETZONE, 5, 3));
	say("reset.unaligned", ioctl(fd, BLKRESETZONE, &(struct blk_zone_range){ 8, ZONE_SECTORS }) ? -errno : 0);
	say("fill", transfer(fd, ZONES - 1, 0, 256 << 10, true));
	say("reset.all", command(fd, BLKRESETZONE, 0, ZONES));
	say_zone(fd, "reset.all", ZONES - 1);
	say("came.reset-all", seen[UBLK_IO_OP_ZONE_RESET_ALL]);
	say("came.finish", seen[UBLK_IO_OP_ZONE_FINISH]);
	/* what a server must not be asked */
	say("came.unknown", seen[UBLK_IO_OP_WRITE_SAME]);
	close(fd);
	finish(thread);
}

/* Each in a process of its own, whose controller's START comes from outside. */
static void liar_cases(void)
{
	static const struct {
		const char *name;
		enum lie lie;
		uint64_t flags;
		bool start_itself;
	} cases[] = {
		{ "no-zones", NO_ZONES, 0, false },
		{ "wrong-place", WRONG_PLACE, 0, false },
		{ "too-long", TOO_LONG, 0, false },
		{ "refuse", REFUSE, 0, false },
		{ "die", DIE, 0, false },
		{ "die.recovery", DIE, UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE, false },
		{ "die.in-own-start", DIE, UBLK_F_USER_RECOVERY, true },
	};

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
		struct ublk_params params = zoned_params();
		pid_t pid;
		int err;

		lie = cases[i].lie;
		if (make(UBLK_F_ZONED | UBLK_F_USER_COPY | cases[i].flags))
			die("add");
		set_params(&c, id, &params);
		pid = fork();
		if (!pid) {
			pthread_t thread = start_server();

			if (cases[i].start_itself) {
				control_open(&c);
				start();
			}
			pthread_join(thread, NULL);
			_exit(0);
		}
		if (!cases[i].start_itself)
			say(cases[i].name, start());
		else
			waitpid(pid, NULL, 0);
		err = control(&c, UBLK_U_CMD_STOP_DEV, id, NULL, 0, 0);
		if (!cases[i].start_itself)
			waitpid(pid, NULL, 0);
		if (!err)
			err = control(&c, UBLK_U_CMD_DEL_DEV, id, NULL, 0, 0);
		if (cases[i].start_itself)
			say(cases[i].name, err);
		must(err, "delete");
	}
}

static void disk(void)
{
	struct ublk_params params = zoned_params();
	struct pollfd input = { .fd = 0, .events = POLLIN };
	pthread_t thread;
	char line[16];
	int err;

	if (make(UBLK_F_ZONED | UBLK_F_USER_COPY))
		die("add");
	set_params(&c, id, &params);
	thread = start_server();
	errno = -(err = start());
	if (err)
		die("start");
	printf("/dev/ublkb%u\n", id);
	fflush(stdout);
	while (poll(&input, 1, -1) >= 0 && read(0, line, sizeof(line)) > 0)
		append_outside = line[0] == 'o';
	finish(thread);
	printf("{\"append\": %lu, \"reset\": %lu, \"finish\": %lu, \"report\": %lu}\n", seen[UBLK_IO_OP_ZONE_APPEND],
	       seen[UBLK_IO_OP_ZONE_RESET], seen[UBLK_IO_OP_ZONE_FINISH], seen[UBLK_IO_OP_REPORT_ZONES]);
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "cases";

	memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED || pipe(ready))
		die("memory");
	control_open(&c);
	if (!strcmp(what, "disk")) {
		disk();
	} else if (!strcmp(what, "liars")) {
		liar_cases();
	} else {
		param_cases();
		io_cases();
	}
	return 0;
}
