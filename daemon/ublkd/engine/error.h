/* SPDX-License-Identifier: Apache-2.0 */
#ifndef UBLKD_ERROR_H
#define UBLKD_ERROR_H

/*
 * Note one line on a failure for ublkd_last_error(); returns err, so that a
 * caller can `return ublkd_error(-EINVAL, "...")`.
 */
int ublkd_error(int err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#endif
