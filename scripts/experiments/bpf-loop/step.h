/* SPDX-License-Identifier: Apache-2.0 */
/* The step of a queue as a BPF program, and its way into the kernel. */
#ifndef STEP_H
#define STEP_H

#include <stdbool.h>
#include <stdint.h>

struct ring;

/* What the program knows of its queue; all of it becomes part of its code. */
struct step {
	unsigned int depth;	/* a power of two */
	uint64_t descs;		/* address of the queue's descriptors in the process that serves it */
	bool has_data_sqe;	/* loop: a read or write before each commit */
	bool has_length;	/* null: every request has this result, no descriptor is read */
	int length;
};

/*
 * Attach the step to a ring whose fetch commands have been submitted: from then
 * on io_uring_enter() runs it until a command fails or a signal arrives.
 * The descriptor of the map, which step_detach() takes, or -errno.
 */
int step_attach(const struct step *step, const struct ring *ring);
int step_detach(int map);

#endif
