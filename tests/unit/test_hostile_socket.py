# SPDX-License-Identifier: Apache-2.0
"""The supervisor's socket, and the settings that come by it, whatever anybody sends."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import JSON, fuzz
from hypothesis import given
from hypothesis import strategies as st

from ublkd.config.schema import SETTINGS, DeviceSpec
from ublkd.errors import UblkdError
from ublkd.supervisor import endpoint, upgrades
from ublkd.supervisor.endpoint import Endpoint

BODIES = st.fixed_dictionaries(
    {"protocol": st.sampled_from([1, 1, 1, 2, "1", None])}, optional={"op": JSON, "settings": JSON, "python": JSON}
)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setenv("UBLKD_RUNTIME_DIR", str(tmp_path))
    end = Endpoint(3)
    yield end
    end.close(unlink=True)
    assert not Path(end.path).exists()


def exchange(served: Endpoint, data: bytes) -> list[endpoint.Request]:
    """What the supervisor takes of a message for a request; a client that gets none is hung up on or told why."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(served.path)
        client.send(data)
        found = list(served.requests())
        for request in found:
            request.answer(ok=True)
        client.settimeout(5)
        said = client.recv(endpoint.MAX_BYTES)
        if data:
            assert json.loads(said) == {"ok": True} if found else "error" in json.loads(said)
    return found


@fuzz
@given(st.binary(max_size=300) | st.binary().map(lambda tail: b'{"protocol": 1, "op": ' + tail))
def test_bytes(served: Endpoint, data: bytes) -> None:
    exchange(served, data)
    assert len(served.fds()) == 1, "nobody is left"


@fuzz
@given(BODIES)
def test_messages(served: Endpoint, body: dict[str, Any]) -> None:
    found = exchange(served, json.dumps(body).encode())
    assert len(found) == (body["protocol"] == 1)


@fuzz
@given(
    JSON
    | st.dictionaries(st.sampled_from(list(SETTINGS)), JSON, max_size=3)
    | st.dictionaries(st.sampled_from([n for n, s in SETTINGS.items() if s.scope == "hot"]), JSON, max_size=3)
)
def test_settings(settings: Any) -> None:
    """Either refused, or only what a live device may change is changed, to a value that is good for it."""
    spec = DeviceSpec(target="null", queues=2)
    try:
        new = upgrades.changed(spec, settings)
    except UblkdError:
        return
    for name, setting in SETTINGS.items():
        if setting.scope != "hot":
            assert getattr(new, name) == getattr(spec, name)
    assert DeviceSpec.from_dict(json.loads(json.dumps(new.to_dict()))) == new
