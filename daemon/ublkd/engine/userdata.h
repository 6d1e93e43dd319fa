/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an SQE's user_data says about its CQE:
 *
 *   63      32 31   24 23   16 15      0
 *  |  zero    |  slot |  kind |   tag   |
 */
#ifndef UBLKD_USERDATA_H
#define UBLKD_USERDATA_H

#include <stdint.h>

enum ublkd_ud_kind {
	UBLKD_UD_CMD,    /* a ublk I/O command: the transport's */
	UBLKD_UD_TARGET, /* an SQE of the target's */
	UBLKD_UD_WAKE,   /* the poll on the wake descriptor */
};

static inline uint64_t ublkd_ud_pack(enum ublkd_ud_kind kind, uint16_t tag, uint8_t slot)
{
	return (uint64_t)slot << 24 | (uint64_t)kind << 16 | tag;
}

static inline enum ublkd_ud_kind ublkd_ud_kind(uint64_t ud)
{
	return (enum ublkd_ud_kind)(ud >> 16 & 0xff);
}

static inline uint16_t ublkd_ud_tag(uint64_t ud)
{
	return (uint16_t)ud;
}

static inline uint8_t ublkd_ud_slot(uint64_t ud)
{
	return (uint8_t)(ud >> 24);
}

#endif
