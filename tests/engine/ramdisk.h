/* SPDX-License-Identifier: Apache-2.0 */
/* A memory target as the supervisor sets it up, on a memfd or a file of the caller's. */
#ifndef RAMDISK_H
#define RAMDISK_H

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "check.h"
#include "engine.h"

struct ramdisk {
	struct ublkd_target *target;
	char *base;
	uint8_t *marks;
	uint64_t size;
	int fd;
};

/* fd: an empty file on tmpfs, which the disk then owns; -1 for a memfd. */
static inline struct ramdisk ramdisk_new(uint64_t size, int fd)
{
	const uint64_t bytes = ublkd_memory_file_bytes(size);
	struct ramdisk d = { .size = size, .fd = fd };
	struct ublkd_memory_config config;

	if (fd < 0)
		d.fd = (int)CHECK_SYS(memfd_create("disk", MFD_CLOEXEC));
	CHECK_SYS(ftruncate(d.fd, (off_t)bytes));
	CHECK_EQ(posix_fallocate(d.fd, (off_t)size, (off_t)(bytes - size)), 0);
	d.base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, d.fd, 0);
	CHECK(d.base != MAP_FAILED);
	d.marks = (uint8_t *)d.base + size;
	config = (struct ublkd_memory_config){ .base = d.base, .size = size, .fd = d.fd };
	CHECK_EQ(ublkd_memory_create(&config, &d.target), 0);
	return d;
}

static inline void ramdisk_free(struct ramdisk *d)
{
	ublkd_target_destroy(d->target);
	munmap(d->base, ublkd_memory_file_bytes(d->size));
	close(d->fd);
}

/* Memory that the file takes, in bytes. */
static inline uint64_t ramdisk_usage(const struct ramdisk *d)
{
	struct stat st;

	CHECK_SYS(fstat(d->fd, &st));
	return (uint64_t)st.st_blocks * 512;
}

#endif
