/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The one way in and out: every request passes ublkd_dispatch_requests() on
 * its way to the target and ublkd_dispatch_done() on its way back. Targets may
 * take what they are given for checked.
 */
#ifndef UBLKD_DISPATCH_H
#define UBLKD_DISPATCH_H

#include "queue.h"

/*
 * The driver delivered requests for n tags (described in their iods). Each
 * becomes an event of this pass, or is answered here if no target may see it.
 * All are gone through; -EPROTO if the driver broke its own rules with one.
 */
int ublkd_dispatch_requests(struct ublkd_queue *q, const uint16_t *tags, unsigned n);
/* The driver took tag back: nothing more will come for it. */
void ublkd_dispatch_gone(struct ublkd_queue *q, uint16_t tag);
/* Count and commit all that was answered in this pass. */
void ublkd_dispatch_done(struct ublkd_queue *q);

#endif
