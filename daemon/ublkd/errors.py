# SPDX-License-Identifier: Apache-2.0
"""Errors for people, and their way to the block layer's errno."""

import errno as _errno
import os


class UblkdError(Exception):
    """Something a user can read: what went wrong, and in `hint` what to do next."""

    exit_status = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(UblkdError):
    """What was asked for makes no sense; nothing has been done."""

    exit_status = 2


class ConfigError(UblkdError):
    """A configuration file is wrong; the message names file and key."""

    exit_status = 2


class DriverError(UblkdError):
    """The driver refused a command. `errno` is positive; `dev_id` is -1 if no device is meant."""

    def __init__(self, command: str, dev_id: int, errno: int, hint: str = "", reason: str = "") -> None:
        subject = f"{command} for device {dev_id}" if dev_id >= 0 else command
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(f"{subject}: {reason or os.strerror(errno)} ({name})", hint)
        self.command = command
        self.dev_id = dev_id
        self.errno = errno


_MAX_ERRNO = 4095


def errno_of(exc: BaseException) -> int:
    """The positive errno that fails a request for this exception: EIO if it does not say."""
    number = getattr(exc, "errno", None)
    if isinstance(number, int) and 0 < abs(number) <= _MAX_ERRNO:
        return abs(number)
    if isinstance(exc, TimeoutError):
        return _errno.ETIMEDOUT
    if isinstance(exc, MemoryError):
        return _errno.ENOMEM
    if isinstance(exc, NotImplementedError):
        return _errno.EOPNOTSUPP
    return _errno.EIO
