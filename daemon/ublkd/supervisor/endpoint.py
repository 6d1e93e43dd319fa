# SPDX-License-Identifier: Apache-2.0
"""The socket on which a supervisor takes requests: /run/ublkd/N.sock, one JSON object each way.

Never blocks the supervisor: a client that connects and says nothing is dropped when others need its place.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ublkd import inventory
from ublkd.errors import UblkdError

if TYPE_CHECKING:
    from collections.abc import Iterator

PROTOCOL = 1
MAX_BYTES = 64 * 1024
_MAX_CLIENTS = 8
_CONNECT_S = 5.0


def path_of(dev_id: int) -> str:
    """The socket's name."""
    return os.path.join(inventory.runtime_dir(), f"{dev_id}.sock")


class Request:
    """What a client asks for; answered once."""

    def __init__(self, client: socket.socket, body: dict[str, Any]) -> None:
        self.op = body.get("op")
        self.body = body
        self._client = client

    def answer(self, **fields: object) -> None:
        """Send the answer and hang up. A client that is gone, or does not read, misses it."""
        with suppress(OSError):
            self._client.send(json.dumps(fields).encode())
        self._client.close()

    def refuse(self, error: UblkdError) -> None:
        """Answer with an error."""
        self.answer(error=error.message, hint=error.hint, status=error.exit_status)


class Endpoint:
    """The supervisor's end. Of its own user and root, nobody else can connect."""

    def __init__(self, dev_id: int) -> None:
        self.path = path_of(dev_id)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        self._clients: list[socket.socket] = []
        os.makedirs(os.path.dirname(self.path), mode=0o755, exist_ok=True)
        # A name of its own first: at no moment is there a socket that others could connect to.
        new = f"{self.path}.{os.getpid()}"
        with suppress(FileNotFoundError):
            os.unlink(new)
        try:
            self._socket.bind(new)
            os.chmod(new, 0o600)
            self._socket.listen(_MAX_CLIENTS)
            os.rename(new, self.path)
        except OSError:
            self._socket.close()
            with suppress(OSError):
                os.unlink(new)
            raise

    def fds(self) -> list[int]:
        """What to wait for input on; workers close them."""
        return [self._socket.fileno(), *(client.fileno() for client in self._clients)]

    def requests(self) -> Iterator[Request]:
        """What has come in."""
        with suppress(OSError):
            while True:
                client, _ = self._socket.accept()
                client.setblocking(False)
                self._clients.append(client)
                if len(self._clients) > _MAX_CLIENTS:
                    self._clients.pop(0).close()
        for client in list(self._clients):
            try:
                data = client.recv(MAX_BYTES)
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            self._clients.remove(client)
            body = _parse(data)
            if not data or not _may_ask(client):
                client.close()
            elif body is None:
                Request(client, {}).refuse(UblkdError("the request is not one that this supervisor understands"))
            else:
                yield Request(client, body)

    def close(self, unlink: bool) -> None:
        """Hang up; unlink: nobody else has taken over the name."""
        for each in (self._socket, *self._clients):
            each.close()
        if unlink:
            with suppress(FileNotFoundError):
                os.unlink(self.path)


def _parse(data: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) and body.get("protocol") == PROTOCOL else None


def _may_ask(client: socket.socket) -> bool:
    _pid, uid, _gid = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid in (0, os.geteuid())


def ask(dev_id: int, timeout: float, **body: object) -> dict[str, Any]:
    """Send a request to the supervisor of a device: its answer. UblkdError if it refuses or can't be reached."""
    path = path_of(dev_id)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as s:
        s.settimeout(_CONNECT_S)
        try:
            s.connect(path)
            s.send(json.dumps({"protocol": PROTOCOL, **body}).encode())
            s.settimeout(timeout)
            data = s.recv(MAX_BYTES)
        except PermissionError:
            raise UblkdError(f"this user may not ask the supervisor of device {dev_id}", "run as root") from None
        except TimeoutError:
            raise UblkdError(f"the supervisor of device {dev_id} does not answer", "see its log") from None
        except OSError as e:
            raise UblkdError(
                f"the supervisor of device {dev_id} can't be reached at {path}: {e.strerror}",
                "is the device served? see `ublkd list`",
            ) from None
    try:
        answer: dict[str, Any] = json.loads(data)
    except ValueError:
        raise UblkdError(f"the supervisor of device {dev_id} hung up", "see its log") from None
    if "error" in answer:
        error = UblkdError(str(answer["error"]), str(answer.get("hint", "")))
        error.exit_status = int(answer.get("status", 1))
        raise error
    return answer
