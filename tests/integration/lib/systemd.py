# SPDX-License-Identifier: Apache-2.0
"""A machine's own systemd as process 1 of namespaces: it starts and stops units for real, and harms nobody outside.

It has an /etc and a /run of its own, and of systemd's units those that a unit of ublkd's needs. Its /dev is the
machine's, so are the disks and the udevd that tells it of them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from lib.tools import read, sh, wait_until

PROGRAM = "/lib/systemd/systemd"
UNIT = Path(__file__).resolve().parents[3] / "configs" / "systemd" / "ublkd@.service"
_UBLKD = Path(sys.executable).with_name("ublkd")
# of the machine's /run: udev's data base, and where the scratch disk is mounted
_KEPT = "udev ublkd-test"
_CGROUP = Path("/sys/fs/cgroup/ublkd-systemd")

_TARGET = "[Unit]\nWants=remote-fs.target ublkd@disk.service\nRequires=basic.target\nAllowIsolate=yes\n"
_BOOT = """
set -e
cd {place}/run
echo 0 >{cgroup}/cgroup.procs
mount -t proc proc /proc
mount -t overlay -o lowerdir=/etc,upperdir=../etc,workdir=../work overlay /etc
for each in /etc/systemd/system /usr/local/bin; do mount -t tmpfs tmpfs $each; done
for each in {kept}; do mkdir -p $each; mount --rbind /run/$each $each; done
mount -t tmpfs -o mode=755 tmpfs /run
for each in {kept}; do mkdir /run/$each; mount --rbind $each /run/$each; done
ln -s {ublkd} /usr/local/bin/ublkd
cd /lib/systemd/system
cp *.target systemd-poweroff.service systemd-fsck@.service {unit} /etc/systemd/system
cp -r {place}/units/. /etc/systemd/system
exec env -i PATH=/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin container=other LANG=C.UTF-8 \\
    SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/systemd/transient:/run/systemd/generator \\
    {program} --unit=test.target --log-target=null --show-status=no
"""


class Systemd:
    """One boot. place is kept from one to the next: it has what is in /etc."""

    def __init__(self, place: Path, disk: str, fstab: str = "") -> None:
        """disk: the settings file /etc/ublkd/disk.toml; fstab: a line."""
        for name in ("etc/ublkd", "work", "run", "units/ublkd@.service.d"):
            (place / name).mkdir(parents=True, exist_ok=True)
        self.log = place / "log"
        (place / "etc" / "ublkd" / "disk.toml").write_text(disk)
        (place / "etc" / "fstab").write_text(fstab + "\n")
        (place / "units" / "test.target").write_text(_TARGET)
        # there is no journal
        (place / "units" / "ublkd@.service.d" / "log.conf").write_text(
            f"[Service]\nStandardOutput=append:{self.log}\nStandardError=append:{self.log}\n"
        )
        _CGROUP.mkdir(exist_ok=True)
        script = _BOOT.format(place=place, cgroup=_CGROUP, kept=_KEPT, ublkd=_UBLKD, unit=UNIT, program=PROGRAM)
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "--pid", "--fork", "sh", "-c", script],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            wait_until(self._booted, "systemd has booted", 120)
        except BaseException:
            self.close()
            raise

    def _booted(self) -> bool:
        assert self._process.poll() is None, f"systemd ended: {self.said()}"
        state = self.ctl("is-system-running", status=None).strip() if self._init() else ""
        return state in ("running", "degraded")

    def _init(self) -> int:
        """Its pid out here, 0 while it is not there."""
        try:
            children = read(f"/proc/{self._process.pid}/task/{self._process.pid}/children").split()
            return int(children[0]) if children and read(f"/proc/{children[0]}/comm") == "systemd" else 0
        except OSError:
            return 0

    def run(self, *argv: object, status: int | None = 0) -> str:
        """Run a program in there, to its end: what it printed."""
        return sh("nsenter", f"--target={self._init()}", "--mount", "--pid", *argv, status=status)

    def ctl(self, *words: object, status: int | None = 0) -> str:
        """systemctl."""
        return self.run("systemctl", *words, status=status)

    def properties(self, unit: str) -> dict[str, str]:
        """What systemctl shows of a unit."""
        lines = self.ctl("show", unit).splitlines()
        return {name: value for name, _, value in (line.partition("=") for line in lines)}

    def said(self) -> str:
        """What ublkd printed, its end."""
        return self.log.read_text(errors="replace")[-3000:]

    def power_off(self) -> None:
        """Shut down in the order of units; returns when everything in there has ended."""
        self.ctl("poweroff", status=None)
        self._process.wait(timeout=120)

    def close(self) -> None:
        """Nothing of it is left."""
        if self._process.poll() is None:
            init = self._init()
            os.kill(init or self._process.pid, signal.SIGKILL)  # takes all of its namespace along
            self._process.wait()
        if _CGROUP.exists():
            _remove(_CGROUP)


def _remove(cgroup: Path) -> None:
    for child in sorted(cgroup.iterdir(), reverse=True):
        if child.is_dir():
            _remove(child)
    wait_until(lambda: read(cgroup / "cgroup.events").startswith("populated 0"), "its processes have ended")
    cgroup.rmdir()
