# SPDX-License-Identifier: Apache-2.0
"""Just enough of QEMU's machine protocol (QMP) to give a command."""

from __future__ import annotations

import json
import socket


class Monitor:
    """A QMP session on a connected socket."""

    def __init__(self, connection: socket.socket, timeout: float = 5.0) -> None:
        connection.settimeout(timeout)
        self._connection = connection
        self._file = connection.makefile("r")
        self._file.readline()
        self.command("qmp_capabilities")

    def command(self, name: str, **arguments: object) -> object:
        """Give a command and return its answer. Raises OSError, also when QEMU refuses it."""
        request = {"execute": name, "arguments": arguments}
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        for line in self._file:
            answer = json.loads(line)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise OSError(f"QEMU refused {name}: {answer['error'].get('desc')}")
        raise OSError("QEMU closed its monitor")
