# SPDX-License-Identifier: Apache-2.0
"""What to run in the guest, and the archive that carries it there."""

from __future__ import annotations

import os
import secrets
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from .cpio import Archive
from .disks import Disk
from .kernels import Kernel

_FORWARDED = ("CI", "HOME", "LANG", "LC_ALL", "PATH", "TERM")
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


@dataclass
class Job:
    """One run: the command and what the guest shall be like. No command means an interactive shell."""

    command: list[str] = field(default_factory=list)
    directory: Path = field(default_factory=Path.cwd)
    environment: dict[str, str] = field(default_factory=dict)
    share: Path | None = None
    disks: list[Disk] = field(default_factory=list)
    modules: list[Path] = field(default_factory=list)
    load_ublk: bool = True
    require_ublk: bool = False
    window: tuple[int, int] = (80, 24)
    mark: str = field(default_factory=lambda: f"ublkd-vm-end-{secrets.token_hex(12)}")

    @property
    def interactive(self) -> bool:
        """Whether a terminal is wanted."""
        return not self.command

    def archive(self, kernel: Kernel) -> bytes:
        """The part of the initramfs that differs from run to run."""
        archive = Archive()
        archive.file("job/settings", self.settings(kernel).encode())
        archive.file("job/command", self._script().encode())
        for number, module in enumerate(self.modules):
            archive.file(f"job/modules/{number}-{module.name}", module.read_bytes())
        return archive.data()

    def settings(self, kernel: Kernel) -> str:
        """Shell variables for the guest's init."""
        below_tmp = Path("/tmp") in self.directory.parents or self.directory == Path("/tmp")
        settings = {
            "kernel_release": kernel.release,
            "modules_dir": kernel.modules,
            "private_tmp": int(not below_tmp),
            "share": self.share or "",
            "disk_count": len(self.disks),
            "load_ublk": int(self.load_ublk),
            "require_ublk": int(self.require_ublk),
            "interactive": int(self.interactive),
            "columns": self.window[0],
            "rows": self.window[1],
            "directory": self.directory,
            "mark": self.mark,
        }
        return "".join(f"{name}={shlex.quote(str(value))}\n" for name, value in settings.items())

    def _script(self) -> str:
        environment = dict(self.environment)
        if self.share:
            environment["UBLKD_VM_SHARE"] = str(self.share)
        assignments = [f"{name}={value}" for name, value in environment.items()]
        # --default-signal: a shell ignores SIGINT and SIGQUIT for what it runs in the background
        command = shlex.join(["/usr/bin/env", "-i", "--default-signal", *assignments])
        # UBLKD_VM_DISKS is known only in the guest
        return (
            f"cd {shlex.quote(str(self.directory))} || exit 125\n"
            f'exec {command} "UBLKD_VM_DISKS=$UBLKD_VM_DISKS" {shlex.join(self.command or ["bash"])}\n'
        )


def guest_environment(extra: list[str]) -> dict[str, str]:
    """The variables that the command sees: a few of ours, and those asked for as NAME or NAME=VALUE."""
    forwarded = [name for name in os.environ if name in _FORWARDED or name.startswith("UBLKD_")]
    environment = {name: os.environ[name] for name in forwarded}
    path = environment.get("PATH", "/usr/local/bin:/usr/bin:/bin").split(":")
    environment["PATH"] = ":".join(path + [name for name in _SBIN if name not in path])
    environment.setdefault("HOME", "/root")
    for item in extra:
        name, given, value = item.partition("=")
        if given:
            environment[name] = value
        elif name in os.environ:
            environment[name] = os.environ[name]
    return environment
