# SPDX-License-Identifier: Apache-2.0
"""Memory that client and server share: what arrives in place, what is copied, and that nothing stays pinned."""

from __future__ import annotations

import pytest
from conftest import results

COPIED = -1
SECOND = 1 << 32
WAITING = -110
"""Cancelled by the client, since it was still waiting."""

REGISTER = {
    "register.without-flag": -95,
    "unregister.without-flag": -95,
    "register.flag": -22,
    "register.reserved": -22,
    "register.nothing": -22,
    "register.half-a-page": -22,
    "register.unaligned": -22,
    "register.too-much": -22,
    "register.no-memory": -14,
    "register.hole": -14,
    "register.bad-argument": -14,
    "unregister.none": -2,
    "unregister.negative": -22,
    "unregister.too-large": -22,
    "register": 0,
    "register.again": -17,
    "register.overlap": -17,
    "register.beside": 1,
    "unregister": 0,
    "unregister.again": -2,
    "register.reuses": 0,
}

IO = {
    "register": 0,
    "start": 0,
    "write": 8192,
    "read": 16384,
    "write.sector": 4608,
    "read.sector": 13312,
    "write.end": 1044480,
    "write.other": COPIED,
    "read.other": COPIED,
    "write.not-registered": COPIED,
    "write.past-end": COPIED,
    "write.in-a-row": 4096,
    "write.scattered": COPIED,
    "write.backwards": COPIED,
    "register.while-live": 1,
    "write.from-read-only": SECOND + 4096,
    "read.into-read-only": COPIED,
    "write.two-buffers": COPIED,
    "recovery.start": 0,
    "recovery.end": 0,
    "recovery.write": 32768,
    "unregister": 0,
    "write.unregistered": COPIED,
    "read.unregistered": COPIED,
    "register.other-place": 0,
    "wrong": 0,
    "stop": 0,
}
"""Of a transfer: the place of its data in a registered buffer, or COPIED."""


@pytest.mark.usefixtures("ours")
def test_requests_with_their_data_in_shared_memory() -> None:
    found = results("shmem")
    assert {name: found.pop(name, None) for name in REGISTER} == REGISTER
    assert found.pop("pages-left-pinned") == 0
    assert found.pop("shards.unregister.while-used") == WAITING
    for kind in ("copy", "get-data", "shards"):
        assert {name: found.pop(f"{kind}.{name}", None) for name in IO} == IO, kind
    assert not found
