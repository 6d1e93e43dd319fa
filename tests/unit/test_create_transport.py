# SPDX-License-Identifier: Apache-2.0
"""What the driver is asked for: the transport, and whether its commands are for many requests at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ublkd.config.schema import DeviceSpec
from ublkd.control import uapi
from ublkd.control.features import Features
from ublkd.errors import UsageError
from ublkd.supervisor import create
from ublkd.targets.python import PythonTarget

OLD = uapi.F_USER_COPY | uapi.F_USER_RECOVERY | uapi.F_USER_RECOVERY_REISSUE
NEW = OLD | uapi.F_AUTO_BUF_REG | uapi.F_BATCH_IO | uapi.F_QUIESCE
LOOP = ("zero-copy", "copy", "user-copy")
RAM = ("user-copy", "copy")


def choose(features: int, transports: tuple[str, ...], idempotent: bool = True, **settings: Any) -> tuple[str, int]:
    spec = DeviceSpec(target="memory", **settings)
    target: Any = SimpleNamespace(transports=transports, idempotent=idempotent)
    transport = create.choose_transport(spec, target, Features(features))
    return transport, create.choose_flags(spec, target, transport, Features(features))


@pytest.mark.parametrize(
    ("features", "transports", "settings", "wanted"),
    [
        (NEW, LOOP, {}, "zero-copy"),
        (NEW, LOOP, {"batch": "on"}, "zero-copy+batch"),
        (NEW, RAM, {}, "user-copy"),
        (NEW, RAM, {"batch": "on"}, "user-copy+batch"),
        (NEW, RAM, {"batch": "off"}, "user-copy"),
        (NEW, LOOP, {"transport": "user-copy", "batch": "on"}, "user-copy+batch"),
        (NEW, LOOP, {"transport": "copy"}, "copy"),
        (NEW, RAM, {"on_crash": "fail"}, "user-copy"),
        (NEW, RAM, {"idempotent": False}, "user-copy"),
        (OLD, LOOP, {}, "copy"),
        (OLD, RAM, {}, "user-copy"),
        (NEW, PythonTarget.transports, {}, "user-copy"),
        (OLD & ~uapi.F_USER_COPY, PythonTarget.transports, {}, "copy"),
    ],
)
def test_choice(features: int, transports: tuple[str, ...], settings: dict[str, Any], wanted: str) -> None:
    transport, flags = choose(features, transports, **settings)
    assert transport == wanted
    assert bool(flags & uapi.F_BATCH_IO) == wanted.endswith("+batch")
    # A quiesced device with batches would fail requests.
    assert not (flags & uapi.F_BATCH_IO and flags & uapi.F_QUIESCE)
    assert create.transport_of(flags) == wanted
    said = create.about_batch(flags, transport, create.policy_of(flags), settings.get("batch", "off"), features == NEW)
    assert said.startswith("on: " if wanted.endswith("+batch") else "off: ")


@pytest.mark.parametrize(
    ("features", "settings", "why"),
    [
        (OLD, {}, "the driver has no BATCH_IO"),
        (NEW, {"transport": "copy"}, "the transport is copy"),
        (NEW, {"on_crash": "fail"}, "--on-crash is fail"),
    ],
)
def test_asked_for_in_vain(features: int, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=f"--batch on can't be had: {why}"):
        choose(features, RAM, batch="on", **settings)
    transport, flags = choose(features, RAM, **settings)
    about = (flags, transport, create.policy_of(flags))
    assert create.about_batch(*about, "on", features == NEW).startswith(f"off: {why}")
    assert create.about_batch(*about, "off", features == NEW) == "off: --batch is off"


def test_largest_request() -> None:
    usual, set_to = DeviceSpec(target="memory"), DeviceSpec(target="memory", max_io_size="64K")
    for transport in create.TRANSPORTS:
        assert create.max_io_bytes(usual, transport) == (512 << 10 if transport == "copy" else 1 << 20)
        assert create.max_io_bytes(set_to, transport) == 64 << 10


def test_workers_that_share_a_queue() -> None:
    each_tag = uapi.FLAGS["PER_IO_DAEMON"].value
    shards = uapi.FLAGS["SHARDS"].value
    with pytest.raises(UsageError, match="--workers-per-queue needs a driver with PER_IO_DAEMON"):
        choose(OLD, RAM, workers_per_queue=2)
    with pytest.raises(UsageError, match="--batch on can't be had: a queue's requests come in batches to one worker"):
        choose(NEW | each_tag, RAM, workers_per_queue=2, batch="on")
    # a shard is a queue's, not a worker's
    assert choose(NEW | each_tag | shards, RAM)[1] & shards
    assert not choose(NEW | each_tag | shards, RAM, workers_per_queue=2)[1] & shards
