# SPDX-License-Identifier: Apache-2.0
"""A RAM disk as an nbdkit Python plugin, as its manual writes one."""

API_VERSION = 2

data = bytearray()


def config(key: str, value: str) -> None:
    if key == "size":
        data.extend(bytes(int(value)))


def open(readonly: bool) -> int:
    return 1


def get_size(h: int) -> int:
    return len(data)


def pread(h: int, buf: bytearray, offset: int, flags: int) -> None:
    buf[:] = data[offset : offset + len(buf)]


def pwrite(h: int, buf: bytearray, offset: int, flags: int) -> None:
    data[offset : offset + len(buf)] = buf


def flush(h: int, flags: int) -> None:
    pass
