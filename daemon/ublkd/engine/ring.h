/* SPDX-License-Identifier: Apache-2.0 */
#ifndef UBLKD_RING_H
#define UBLKD_RING_H

#include <liburing.h>

/*
 * Set up a ring with the best flags this kernel takes, for the calling thread
 * alone. sq and cq are numbers of entries, rounded up by the kernel.
 */
int ublkd_ring_init(struct io_uring *ring, unsigned sq, unsigned cq, unsigned extra_flags);

#endif
