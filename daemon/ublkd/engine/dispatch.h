/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The one way in and out: every request passes ublkd_dispatch_request() on
 * its way to the target and ublkd_dispatch_done() on its way back. Targets may
 * take what they are given for checked.
 */
#ifndef UBLKD_DISPATCH_H
#define UBLKD_DISPATCH_H

#include "queue.h"

/*
 * The driver delivered a request for tag (described in its iod). It becomes an
 * event of this pass, or is answered here if no target may see it. -EPROTO if
 * the driver broke its own rules.
 */
int ublkd_dispatch_request(struct ublkd_queue *q, uint16_t tag);
/* The driver took tag back: nothing more will come for it. */
void ublkd_dispatch_gone(struct ublkd_queue *q, uint16_t tag);
/* Count and commit all that was answered in this pass. */
void ublkd_dispatch_done(struct ublkd_queue *q);

#endif
