// SPDX-License-Identifier: Apache-2.0
#include <errno.h>
#include <sys/mman.h>

#include "ring.h"

int ring_make(struct ring *ring, unsigned int sq_entries, unsigned int cq_entries, unsigned int setup_flags)
{
	*ring = (struct ring){ .setup_flags = setup_flags };
	ring->p.flags = setup_flags | IORING_SETUP_CQSIZE;
	ring->p.cq_entries = cq_entries;
	ring->fd = syscall(SYS_io_uring_setup, sq_entries, &ring->p);
	if (ring->fd < 0)
		return -errno;
	ring->enter_fd = ring->fd;
	ring->rings_size = ring->p.cq_off.cqes + ring->p.cq_entries * sizeof(struct io_uring_cqe);
	if (!(setup_flags & SETUP_NO_SQARRAY))
		ring->rings_size = ring->p.sq_off.array + ring->p.sq_entries * sizeof(uint32_t);
	ring->sqes_size = ring->p.sq_entries * sizeof(struct io_uring_sqe);
	ring->rings = mmap(NULL, ring->rings_size, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd, IORING_OFF_SQ_RING);
	ring->sqes = mmap(NULL, ring->sqes_size, PROT_READ | PROT_WRITE, MAP_SHARED, ring->fd, IORING_OFF_SQES);
	if (ring->rings == MAP_FAILED || ring->sqes == MAP_FAILED)
		return -errno;
	if (!(setup_flags & SETUP_NO_SQARRAY))
		for (unsigned int i = 0; i < ring->p.sq_entries; i++)
			ring_word(ring, ring->p.sq_off.array)[i] = i;
	return 0;
}

int ring_register(struct ring *ring, unsigned int opcode, void *arg, unsigned int n)
{
	return syscall(SYS_io_uring_register, ring->fd, opcode, arg, n) < 0 ? -errno : 0;
}

int ring_register_itself(struct ring *ring)
{
	struct io_uring_rsrc_update update = { .offset = -1U, .data = ring->fd };

	if (syscall(SYS_io_uring_register, ring->fd, IORING_REGISTER_RING_FDS, &update, 1) != 1)
		return -errno;
	ring->enter_fd = update.offset;
	ring->enter_flags |= IORING_ENTER_REGISTERED_RING;
	return 0;
}

int ring_enter(struct ring *ring, unsigned int submit, unsigned int wait)
{
	unsigned int flags = ring->enter_flags | (wait ? IORING_ENTER_GETEVENTS : 0);
	long done = syscall(SYS_io_uring_enter, ring->enter_fd, submit, wait, flags, NULL, 0);

	return done < 0 ? -errno : (int)done;
}
