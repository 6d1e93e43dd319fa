# SPDX-License-Identifier: Apache-2.0
"""Build the initramfs of a kernel: busybox, the modules that reach the host's files, and the guest's init."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from .cpio import Archive
from .kernels import Kernel
from .outcome import VMError

_GUEST = Path(__file__).parent / "guest"
_DIRECTORIES = ("bin", "dev", "job", "job/modules", "lower", "modules", "root", "upper")
_BOOT_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_console", "virtio_blk")


def path_for(kernel: Kernel) -> Path:
    """The initramfs of a kernel, built first if there is none of this version of the harness."""
    busybox = shutil.which("busybox", path=os.environ.get("PATH", "") + ":/bin")
    if busybox is None:
        raise VMError("busybox is missing: run scripts/setup vm")
    parts = [_GUEST / "initramfs.sh", _GUEST / "init.sh", Path(busybox), Path(__file__)]
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()[:16]
    path = kernel.directory / f"initramfs-{digest}"
    if not path.exists():
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_bytes(_build(kernel, Path(busybox)))
        temporary.rename(path)
    return path


def _build(kernel: Kernel, busybox: Path) -> bytes:
    # Not compressed: unpacking it would take the emulated CPU longer than QEMU takes to load it.
    archive = Archive()
    for name in _DIRECTORIES:
        archive.directory(name)
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    archive.file("init", (_GUEST / "initramfs.sh").read_bytes(), 0o755)
    archive.file("init.sh", (_GUEST / "init.sh").read_bytes())
    boot = modules_in_order(kernel, _BOOT_MODULES)
    ublk = [path for path in modules_in_order(kernel, ("ublk_drv",), optional=True) if path not in boot]
    for path in boot + ublk:
        archive.file(f"modules/{path.name}", path.read_bytes())
    archive.file("modules/boot.list", _lines(boot))
    archive.file("modules/ublk.list", _lines(ublk))
    return archive.data()


def modules_in_order(kernel: Kernel, names: tuple[str, ...], optional: bool = False) -> list[Path]:
    """The files of modules and of all they need, each once, in an order in which they can be loaded."""
    paths: dict[Path, None] = {}
    for name in names:
        for line in _show_depends(kernel, name, optional).splitlines():
            # "insmod PATH" per file; "builtin NAME" for what is in the image
            if line.startswith("insmod "):
                paths[Path(line.split()[1])] = None
    return list(paths)


def _show_depends(kernel: Kernel, name: str, optional: bool) -> str:
    modprobe = shutil.which("modprobe", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if modprobe is None:
        raise VMError("modprobe is missing: run scripts/setup vm")
    # -C: what the host's administrator blacklisted is not our business
    where = ["-d", str(kernel.directory), "-S", kernel.release, "-C", "/dev/null"]
    command = [modprobe, *where, "--show-depends", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and not optional:
        raise VMError(f"kernel {kernel.release} has no module {name}: {done.stderr.strip()}")
    return done.stdout if done.returncode == 0 else ""


def _lines(paths: list[Path]) -> bytes:
    return "".join(f"{path.name}\n" for path in paths).encode()
