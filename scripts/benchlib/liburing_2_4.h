// SPDX-License-Identifier: Apache-2.0
/* What kublk calls of liburing 2.4, for Debian 12, which has 2.3. */
#include <errno.h>
#include <linux/io_uring.h>
#include <liburing.h>
#include <sys/mman.h>

static inline int io_uring_free_buf_ring(struct io_uring *ring, struct io_uring_buf_ring *br, unsigned int entries,
					 int group)
{
	int status = io_uring_unregister_buf_ring(ring, group);

	if (!status)
		munmap(br, entries * sizeof(struct io_uring_buf));
	return status;
}

static inline struct io_uring_buf_ring *io_uring_setup_buf_ring(struct io_uring *ring, unsigned int entries,
								 int group, unsigned int flags, int *status)
{
	struct io_uring_buf_reg registration = { .ring_entries = entries, .bgid = group, .flags = flags };
	struct io_uring_buf_ring *br;

	br = mmap(NULL, entries * sizeof(struct io_uring_buf), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
		  0);
	if (br == MAP_FAILED) {
		*status = -errno;
		return NULL;
	}
	registration.ring_addr = (unsigned long)br;
	*status = io_uring_register_buf_ring(ring, &registration, 0);
	if (*status) {
		munmap(br, entries * sizeof(struct io_uring_buf));
		return NULL;
	}
	io_uring_buf_ring_init(br);
	return br;
}

/* It clears what its callers don't set: a command in the place of a multishot one would have that one's flags. */
static inline struct io_uring_sqe *io_uring_get_clear_sqe(struct io_uring *ring)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(ring);

	if (sqe) {
		sqe->flags = 0;
		sqe->ioprio = 0;
		sqe->rw_flags = 0;
		sqe->buf_index = 0;
		sqe->personality = 0;
		sqe->file_index = 0;
		sqe->addr3 = 0;
		sqe->__pad2[0] = 0;
	}
	return sqe;
}
#define io_uring_get_sqe io_uring_get_clear_sqe
