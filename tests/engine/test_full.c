/* SPDX-License-Identifier: Apache-2.0 */
/* Backing storage that is full: on a tmpfs of our own, which takes a mount namespace. */
#include <sched.h>
#include <sys/mount.h>

#include "fake.h"
#include "ramdisk.h"

#define FS_BYTES (256 << 10)
#define DISK_BYTES (4 << 20)

static char out[64 << 10], in[64 << 10];

static int32_t ask(struct ublkd_target *target, const struct ublkd_transport *tp, uint8_t op, uint64_t offset,
		   uint32_t bytes, void *data)
{
	struct fake_request r = { .op = op, .sector = offset >> 9, .sectors = bytes >> 9, .data = data };
	struct fake *f = fake_new(DISK_BYTES);

	fake_serve(f, tp, target, &r, 1);
	fake_free(f);
	return r.result;
}

static int backing_file(void)
{
	return (int)CHECK_SYS(open("disk", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
}

/* Write until there is no more room; where that was. */
static uint64_t fill(struct ublkd_target *target, const struct ublkd_transport *tp)
{
	uint64_t offset = 0;
	int32_t ret;

	while ((ret = ask(target, tp, UBLKD_OP_WRITE, offset, sizeof(out), out)) == sizeof(out)) {
		offset += sizeof(out);
		CHECK(offset <= FS_BYTES);
	}
	CHECK_EQ(ret, -ENOSPC);
	CHECK(offset >= FS_BYTES / 2);
	return offset;
}

static void test_memory(const struct ublkd_transport *tp)
{
	struct ramdisk d = ramdisk_new(DISK_BYTES, backing_file());
	uint64_t end;

	memset(out, 'f', sizeof(out));
	/* A chunk with one page in use and holes behind. */
	CHECK_EQ(ask(d.target, tp, UBLKD_OP_WRITE, DISK_BYTES / 2, 4096, out), 4096);
	end = fill(d.target, tp);
	/* The rest of the space page by page. */
	for (uint64_t offset = end; ask(d.target, tp, UBLKD_OP_WRITE, offset, 4096, out) == 4096; offset += 4096)
		CHECK(offset <= FS_BYTES);

	/* What is there can be read, and so can the holes, though no page is left to put there. */
	CHECK_EQ(ask(d.target, tp, UBLKD_OP_READ, 0, sizeof(in), in), sizeof(in));
	CHECK(all_bytes(in, sizeof(in), 'f'));
	CHECK_EQ(ask(d.target, tp, UBLKD_OP_READ, DISK_BYTES / 2, sizeof(in), in), sizeof(in));
	CHECK(all_bytes(in, 4096, 'f'));
	CHECK(all_bytes(in + 4096, sizeof(in) - 4096, 0));
	CHECK_EQ(ask(d.target, tp, UBLKD_OP_READ, DISK_BYTES - sizeof(in), sizeof(in), in), sizeof(in));
	CHECK(all_bytes(in, sizeof(in), 0));

	/* A discard makes room. */
	CHECK_EQ(ask(d.target, tp, UBLKD_OP_DISCARD, 0, sizeof(out), NULL), 0);
	CHECK_EQ(ask(d.target, tp, UBLKD_OP_WRITE, DISK_BYTES / 2, sizeof(out) / 2, out), sizeof(out) / 2);
	ramdisk_free(&d);
}

static void test_loop(const struct ublkd_transport *tp)
{
	struct ublkd_loop_config config = { .fd = backing_file() };
	struct ublkd_target *target;
	uint64_t end;

	CHECK_SYS(ftruncate(config.fd, DISK_BYTES));
	CHECK_EQ(ublkd_loop_create(&config, &target), 0);
	end = fill(target, tp);
	CHECK_EQ(ask(target, tp, UBLKD_OP_READ, 0, sizeof(in), in), sizeof(in));
	CHECK(!memcmp(in, out, sizeof(in)));
	CHECK_EQ(ask(target, tp, UBLKD_OP_DISCARD, 0, sizeof(out), NULL), 0);
	CHECK_EQ(ask(target, tp, UBLKD_OP_WRITE, end, sizeof(out) / 2, out), sizeof(out) / 2);
	ublkd_target_destroy(target);
	close(config.fd);
}

int main(void)
{
	if (unshare(CLONE_NEWNS) < 0 && unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0)
		SKIP("no mount namespace for a small tmpfs: %s", strerror(errno));
	/* Over the whole of /tmp, as nobody else sees it; it goes away with this process. */
	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 || mount("none", "/tmp", "tmpfs", 0, "size=256k") < 0)
		SKIP("no small tmpfs: %s", strerror(errno));
	CHECK_SYS(chdir("/tmp"));
	test_memory(&fake_copy);
	test_memory(&fake_user_copy);
	test_loop(&fake_copy);
	test_loop(&fake_user_copy);
	return 0;
}
