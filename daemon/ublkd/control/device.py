# SPDX-License-Identifier: Apache-2.0
"""A device's nodes in /dev."""

import errno
import os
import stat
import time

from ublkd.errors import DriverError

_FIRST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.05


def path_of(dev_id: int) -> str:
    """The disk."""
    return f"/dev/ublkb{dev_id}"


def char_path_of(dev_id: int) -> str:
    """The server's side of it."""
    return f"/dev/ublkc{dev_id}"


def wait_for_node(path: str, timeout: float) -> None:
    """Until path is a device node: devtmpfs is at once, a udev of its own /dev may take its time."""
    deadline = time.monotonic() + timeout
    pause = _FIRST_PAUSE_S
    while True:
        try:
            mode = os.stat(path).st_mode
            if stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
                return
            raise DriverError(f"waiting for {path}", -1, errno.EEXIST, "remove it", "not a device node")
        except FileNotFoundError:
            pass
        if time.monotonic() >= deadline:
            raise DriverError(
                f"waiting for {path}",
                -1,
                errno.ETIMEDOUT,
                "is /dev a devtmpfs, or udev running? in a container, /dev must be the host's",
            )
        time.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_S)


def open_char(dev_id: int, timeout: float = 5.0) -> int:
    """Open /dev/ublkcN: a file descriptor. The driver allows one open file; udev may hold it for a moment."""
    path = char_path_of(dev_id)
    deadline = time.monotonic() + timeout
    wait_for_node(path, timeout)
    pause = _FIRST_PAUSE_S
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            if exc.errno != errno.EBUSY or time.monotonic() >= deadline:
                raise DriverError(f"open {path}", -1, exc.errno or errno.EIO, _open_hint(exc.errno)) from exc
        time.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE_S)


def _open_hint(number: int | None) -> str:
    if number == errno.EBUSY:
        return "another process serves this device or still has it open or mapped"
    if number in (errno.EACCES, errno.EPERM):
        return "run as root, or as the device's owner"
    return ""
