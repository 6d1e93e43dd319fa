# SPDX-License-Identifier: Apache-2.0
"""An NFS server behind a cable that can be pulled: the kernel's own, in a network namespace, and no other program.

What rpc.mountd would tell the kernel when it asks (who the client is, what it may see) is told beforehand.
"""

from __future__ import annotations

import os
from pathlib import Path

from lib.tools import sh, wait_until

_NAMESPACE, _OURS, _THEIRS = "ublkd-nfs", "ublkd-nfs0", "ublkd-nfs1"
_SERVER, _CLIENT = "10.255.251.1", "10.255.251.2"
_CONTROL = Path("/run/ublkd-test/nfsd")
_FOREVER = 0x7FFFFFFF
# any port, no subtree check, has an fsid; root stays root and writes are synchronous as long as nothing is said
_FLAGS = 0x2 | 0x400 | 0x2000

_START = """
set -e
ip link set lo up
ip addr add {server}/30 dev {theirs}
ip link set {theirs} up
mount -t nfsd nfsd {control}
rpc=/proc/net/rpc
echo 'nfsd {client} {forever} ublkd' >$rpc/auth.unix.ip/channel
echo '0 {forever} 0' >$rpc/auth.unix.gid/channel
echo 'ublkd {place} {forever} {flags} 65534 65534 0' >$rpc/nfsd.export/channel
echo 'ublkd 1 \\x00000000 {forever} {place}' >$rpc/nfsd.fh/channel
cd {control}
# without those that want a port mapper
echo '-3 +4' >versions
# seconds, the least there may be: nobody was here before who could want something back
echo 10 >nfsv4leasetime
echo 10 >nfsv4gracetime
echo 'tcp 2049' >portlist
echo 4 >threads
"""


class Server:
    """Exports a directory, and mounts it with the given options."""

    def __init__(self, place: Path, mount_point: Path, options: str) -> None:
        sh("modprobe", "-a", "nfsd", "nfsv4", "veth")
        self._mount_point = mount_point
        self._mounted = False
        _CONTROL.mkdir(parents=True, exist_ok=True)
        sh("ip", "netns", "add", _NAMESPACE)
        try:
            sh("ip", "link", "add", _OURS, "type", "veth", "peer", "name", _THEIRS, "netns", _NAMESPACE)
            sh("ip", "addr", "add", f"{_CLIENT}/30", "dev", _OURS)
            sh("ip", "link", "set", _OURS, "up")
            values = {"server": _SERVER, "client": _CLIENT, "theirs": _THEIRS, "forever": _FOREVER, "flags": _FLAGS}
            _inside("sh", input=_START.format(**values, control=_CONTROL, place=place))
            # -i: the kernel can do it without a helper, which not every machine has
            more = f"addr={_SERVER},clientaddr={_CLIENT},vers=4.2,{options}"
            sh("mount", "-i", "-t", "nfs4", "-o", more, f"{_SERVER}:/", mount_point)
            self._mounted = True
        except BaseException:
            self.close()
            raise

    def pull(self) -> None:
        """The server is out of reach from here on."""
        sh("ip", "link", "set", _OURS, "down")

    def plug(self) -> None:
        """It is there again."""
        sh("ip", "link", "set", _OURS, "up")

    def close(self) -> None:
        """Nothing of it is left."""
        if self._mounted:
            self.plug()
            wait_until(self._unmounted, "what was under way has ended, and the mount is not in use", 60)
        if os.path.ismount(_CONTROL):
            sh("umount", _CONTROL)  # which stops it
        sh("ip", "link", "del", _OURS, status=None)
        sh("ip", "netns", "del", _NAMESPACE)

    def _unmounted(self) -> bool:
        sh("umount", self._mount_point, status=None)
        return not os.path.ismount(self._mount_point)


def _inside(*argv: object, **options: str) -> None:
    """Run a program on the server's side of the cable."""
    sh("nsenter", f"--net=/run/netns/{_NAMESPACE}", *argv, **options)
