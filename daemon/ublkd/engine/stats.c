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

void ublkd_stat_complete(struct ublkd_shm_queue *shm, struct ublkd_stat_run run)
{
	struct ublkd_shm_counters *c = &shm->op[op_index(run.op)];

	ublkd_stat_add(&c->ios, run.ios);
	ublkd_stat_add(&c->bytes, run.bytes);
	ublkd_stat_add(&c->errors, run.errors);
	ublkd_stat_add(&c->lat_ns, run.ns * run.ios);
	ublkd_stat_add(&c->hist[ublkd_stat_bucket(run.ns)], run.ios);
	if (run.op == UBLKD_OP_WRITE)
		ublkd_stat_add(&shm->fua, run.fua);
	ublkd_stat_add(&shm->completed, run.ios);
}
