/* SPDX-License-Identifier: Apache-2.0 */
#include "stats.h"

static enum ublkd_shm_op op_index(uint8_t op)
{
	static const uint8_t index[] = {
		[UBLKD_OP_READ] = UBLKD_SHM_READ,
		[UBLKD_OP_WRITE] = UBLKD_SHM_WRITE,
		[UBLKD_OP_FLUSH] = UBLKD_SHM_FLUSH,
		[UBLKD_OP_DISCARD] = UBLKD_SHM_DISCARD,
		[4] = UBLKD_SHM_OTHER,
		[UBLKD_OP_WRITE_ZEROES] = UBLKD_SHM_WRITE_ZEROES,
	};

	return op < sizeof(index) ? (enum ublkd_shm_op)index[op] : UBLKD_SHM_OTHER;
}

void ublkd_stat_complete(struct ublkd_shm_queue *shm, struct ublkd_stat_run run)
{
	struct ublkd_shm_counters *c = &shm->op[op_index(run.op)];

	ublkd_stat_add(&c->ios, run.ios);
	ublkd_stat_add(&c->bytes, run.bytes);
	if (run.errors)
		ublkd_stat_add(&c->errors, run.errors);
	ublkd_stat_add(&c->lat_ns, run.ns * run.ios);
	ublkd_stat_add(&c->hist[ublkd_stat_bucket(run.ns)], run.ios);
	if (run.fua && run.op == UBLKD_OP_WRITE)
		ublkd_stat_add(&shm->fua, run.fua);
	ublkd_stat_add(&shm->completed, run.ios);
}
