# SPDX-License-Identifier: Apache-2.0
"""Kernels that look for bugs: Debian's source, built with KASAN, lockdep, failing allocations (debug.config)."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from . import apt, kernels
from .outcome import VMError

CONFIG = Path(__file__).with_name("debug.config")
_COMPILER = "gcc-12"

_FORGOTTEN = ("sysfs_slab_add", "blk_revalidate_zone_cb")
"""The kernel's own functions that lose memory when something fails: 6.1 the name of a cache that sysfs does not take;
6.12 the map of conventional zones when a later zone of the report is not valid."""

# What building a module takes of a built source tree.
_KEPT = (
    ".config",
    "Makefile",
    "Module.symvers",
    "arch/x86/Makefile",
    "arch/x86/include",
    "include",
    "scripts",
    "tools/objtool/objtool",
)


class Store(kernels.Store):
    """The cache of debug kernels, by the names of those that they are made of. A release is built once."""

    def __init__(self, root: Path | None = None, say: Callable[[str], None] = lambda text: None) -> None:
        super().__init__(root or kernels.cache_root().parent / "debug-kernels", say)

    def cached(self, name: str) -> kernels.Kernel | None:
        """As for all kernels, but not one of another configuration."""
        kernel = super().cached(name)
        return kernel if kernel and kernel.release.endswith(release_of("")) else None

    def resolve(self, wanted: kernels.Series) -> tuple[apt.Source, str]:
        """The source that has the newest of a series, and the release that is made of it."""
        source, release = super().resolve(wanted)
        return source, release_of(source.version(source_package(release)))

    def _unpack(self, source: apt.Source, release: str, directory: Path) -> None:
        with tempfile.TemporaryDirectory(dir=self.root, prefix="unpack-") as name:
            temporary = Path(name)
            [package] = source.download([source_package(release)], temporary)
            kernels._run(["dpkg", "-x", str(package), str(temporary / "package")])
            [archive] = (temporary / "package" / "usr" / "src").glob("linux-source-*.tar.*")
            tree = temporary / "tree"
            tree.mkdir()
            kernels._run(["tar", "-xf", str(archive), "-C", str(tree), "--strip-components=1"])
            self._say(f"building kernel {release}: half an hour on two CPUs")
            build(tree, release)
            arrange(tree, temporary / "kernel", release)
            with contextlib.suppress(OSError):
                os.rename(temporary / "kernel", directory)


def release_of(version: str) -> str:
    """What the kernel of a source package's version and of this configuration calls itself."""
    return f"{version}-debug-{hashlib.sha256(CONFIG.read_bytes()).hexdigest()[:8]}"


def source_package(release: str) -> str:
    """The package with the source of a release."""
    major, minor, *_ = kernels.version_key(release)
    return f"linux-source-{major}.{minor}"


def build(tree: Path, release: str) -> None:
    """Build the kernel in a source tree."""
    # in the file, so that modules get the same compiler
    _edit(tree / "Makefile", r"^(CC\s*= )\$\(CROSS_COMPILE\)gcc$", rf"\g<1>{_COMPILER}")
    # 6.1 has no failures by the place of their call on x86, for want of exact traces; frame pointers give them
    _edit(tree / "lib" / "Kconfig.debug", r"^\tdepends on !X86_64\n", "")
    _make(tree, "allnoconfig", f"KCONFIG_ALLCONFIG={CONFIG}")
    if missing := not_granted(CONFIG.read_text(), (tree / ".config").read_text()):
        raise VMError(f"kernel {release} can't be configured with {', '.join(missing)}")
    version = _make(tree, "kernelversion").strip()
    if not release.startswith(version):
        raise VMError(f"the source of kernel {release} is that of {version}: please report this")
    jobs = f"-j{(os.cpu_count() or 1) + 1}"
    _make(tree, jobs, f"LOCALVERSION={release.removeprefix(version)}", "bzImage", "modules")


def not_granted(wanted: str, config: str) -> list[str]:
    """The settings that a configuration lacks."""
    there = set(config.splitlines())
    lines = [line for line in wanted.splitlines() if line and not line.startswith("#")]
    return [line for line in lines if (f"# {line[:-2]} is not set" if line.endswith("=n") else line) not in there]


def leaks(report: str) -> list[str]:
    """What kmemleak found, object by object, without what isn't a driver's doing."""
    objects = re.split(r"(?m)^(?=unreferenced object)", report)[1:]
    return [text for text in objects if not any(f" {name}+" in text for name in _FORGOTTEN)]


def arrange(tree: Path, kernel: Path, release: str) -> None:
    """Move what is needed out of a built tree: the image, and what modules are built with."""
    modules, headers = kernel / "lib" / "modules" / release, kernel / "usr" / "src" / f"linux-headers-{release}"
    modules.mkdir(parents=True)
    shutil.move(tree / "arch/x86/boot/bzImage", kernel / "vmlinuz")
    for name in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.move(tree / name, modules / name)
    for name in _KEPT:
        if (tree / name).exists():
            (headers / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(tree / name, headers / name)
    kernels._run(["depmod", "-b", str(kernel), release])


def _edit(path: Path, pattern: str, replacement: str) -> None:
    path.write_text(re.sub(pattern, replacement, path.read_text(), flags=re.MULTILINE))


def _make(tree: Path, *arguments: str) -> str:
    command = ["nice", "make", "-s", "-C", str(tree), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise VMError(f"the kernel does not build (scripts/setup debug-kernel?):\n{done.stderr[-2000:]}")
    return done.stdout
