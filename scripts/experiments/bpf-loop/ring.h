/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An io_uring by its system calls: liburing of 2022 doesn't know the options
 * that are tried here, and what a BPF program needs are the offsets.
 */
#ifndef RING_H
#define RING_H

#include <linux/io_uring.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* What older headers lack. */
#define SETUP_NO_SQARRAY (1U << 16)
#define SETUP_SQ_REWIND (1U << 20)
#define ENTER_NO_IOWAIT (1U << 7)
#define REGISTER_MEM_REGION 34

struct ring {
	int fd;
	unsigned int enter_fd, enter_flags;
	unsigned int setup_flags;
	struct io_uring_params p;
	unsigned char *rings; /* heads, tails and CQEs */
	size_t rings_size;
	struct io_uring_sqe *sqes;
	size_t sqes_size;
	uint32_t sq_tail; /* ours; always 0 with SQ_REWIND */
};

int ring_make(struct ring *ring, unsigned int sq_entries, unsigned int cq_entries, unsigned int setup_flags);
int ring_register(struct ring *ring, unsigned int opcode, void *arg, unsigned int n);
/* io_uring_enter() then has no file to look up. */
int ring_register_itself(struct ring *ring);
int ring_enter(struct ring *ring, unsigned int submit, unsigned int wait);

static inline uint32_t *ring_word(struct ring *ring, uint32_t offset)
{
	return (uint32_t *)(ring->rings + offset);
}

static inline struct io_uring_cqe *ring_cqe(struct ring *ring, uint32_t index)
{
	return (struct io_uring_cqe *)(ring->rings + ring->p.cq_off.cqes) + (index & (ring->p.cq_entries - 1));
}

static inline uint32_t ring_cq_tail(struct ring *ring)
{
	return __atomic_load_n(ring_word(ring, ring->p.cq_off.tail), __ATOMIC_ACQUIRE);
}

/* The n-th entry of the next submission. */
static inline struct io_uring_sqe *ring_sqe(struct ring *ring, unsigned int n)
{
	return &ring->sqes[(ring->sq_tail + n) & (ring->p.sq_entries - 1)];
}

/* To be called before n entries are submitted. */
static inline void ring_publish(struct ring *ring, unsigned int n)
{
	if (ring->setup_flags & SETUP_SQ_REWIND)
		return;
	ring->sq_tail += n;
	__atomic_store_n(ring_word(ring, ring->p.sq_off.tail), ring->sq_tail, __ATOMIC_RELEASE);
}

#endif
