/* SPDX-License-Identifier: Apache-2.0 */
#include "stats.h"

static enum ublkd_shm_op op_index(uint8_t op)
{
	switch (op) {
	case UBLKD_OP_READ:
		return UBLKD_SHM_READ;
	case UBLKD_OP_WRITE:
		return UBLKD_SHM_WRITE;
	case UBLKD_OP_FLUSH:
		return UBLKD_SHM_FLUSH;
	case UBLKD_OP_DISCARD:
		return UBLKD_SHM_DISCARD;
	case UBLKD_OP_WRITE_ZEROES:
		return UBLKD_SHM_WRITE_ZEROES;
	default:
		return UBLKD_SHM_OTHER;
	}
}

void ublkd_stat_complete(struct ublkd_shm_queue *shm, const struct ublkd_io *io, uint64_t ns)
{
	struct ublkd_shm_counters *c = &shm->op[op_index(io->op)];

	ublkd_stat_add(&c->ios, 1);
	ublkd_stat_add(&c->bytes, io->length);
	if (io->result < 0)
		ublkd_stat_add(&c->errors, 1);
	ublkd_stat_add(&c->lat_ns, ns);
	ublkd_stat_add(&c->hist[ublkd_stat_bucket(ns)], 1);
	if (io->op == UBLKD_OP_WRITE && (io->flags & UBLKD_RQ_FUA))
		ublkd_stat_add(&shm->fua, 1);
	ublkd_stat_add(&shm->completed, 1);
}
