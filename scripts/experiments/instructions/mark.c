/* SPDX-License-Identifier: Apache-2.0 */
/* Tells count.c to write down what was counted. */
#include "mark.h"

#define STRING_(...) #__VA_ARGS__
#define STRING(...) STRING_(__VA_ARGS__)

int main(void)
{
	__asm__ volatile(".byte " STRING(MARK));
	return 0;
}
