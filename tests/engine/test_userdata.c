/* SPDX-License-Identifier: Apache-2.0 */
/* What goes into user_data comes out again, for every tag, kind and slot. */
#include "check.h"
#include "userdata.h"

int main(void)
{
	static const enum ublkd_ud_kind kinds[] = { UBLKD_UD_CMD, UBLKD_UD_TARGET, UBLKD_UD_WAKE };

	for (size_t k = 0; k < sizeof(kinds) / sizeof(kinds[0]); k++) {
		for (unsigned tag = 0; tag <= UINT16_MAX; tag++) {
			for (unsigned slot = 0; slot <= UINT8_MAX; slot += tag % 256 ? 51 : 1) {
				uint64_t ud = ublkd_ud_pack(kinds[k], (uint16_t)tag, (uint8_t)slot);

				CHECK_EQ(ublkd_ud_kind(ud), kinds[k]);
				CHECK_EQ(ublkd_ud_tag(ud), tag);
				CHECK_EQ(ublkd_ud_slot(ud), slot);
				CHECK_EQ(ud >> 32, 0);
			}
		}
	}
	return 0;
}
