/* SPDX-License-Identifier: Apache-2.0 */
/* What a test program checks with. A check that fails ends the program. */
#ifndef CHECK_H
#define CHECK_H

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXIT_SKIP 77

static inline __attribute__((noreturn, format(printf, 3, 4))) void check_failed(const char *file, int line,
										const char *fmt, ...)
{
	va_list ap;

	fprintf(stderr, "%s:%d: ", file, line);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
	/* Not exit(): what is still allocated here would be reported as a leak on top. */
	_Exit(1);
}

#define CHECK(cond)                                                           \
	do {                                                                  \
		if (!(cond))                                                  \
			check_failed(__FILE__, __LINE__, "not so: %s", #cond); \
	} while (0)

#define CHECK_EQ(a, b)                                                                                  \
	do {                                                                                            \
		long long check_a = (long long)(a), check_b = (long long)(b);                           \
		if (check_a != check_b)                                                                 \
			check_failed(__FILE__, __LINE__, "%s is %lld, not %s = %lld", #a, check_a, #b, check_b); \
	} while (0)

/* A call that returns -1 and sets errno on failure. */
#define CHECK_SYS(call)                                                                           \
	({                                                                                        \
		long long check_ret = (long long)(call);                                          \
		if (check_ret < 0)                                                                \
			check_failed(__FILE__, __LINE__, "%s: %s", #call, strerror(errno));       \
		check_ret;                                                                        \
	})

#define SKIP(...)                            \
	do {                                 \
		fprintf(stderr, __VA_ARGS__); \
		fputc('\n', stderr);         \
		exit(EXIT_SKIP);             \
	} while (0)

/* All n bytes at p are c? */
static inline int all_bytes(const void *p, size_t n, int c)
{
	const unsigned char *b = p;

	for (size_t i = 0; i < n; i++)
		if (b[i] != (unsigned char)c)
			return 0;
	return 1;
}

#endif
