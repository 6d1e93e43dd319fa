# SPDX-License-Identifier: Apache-2.0
"""Find, fetch and cache Debian kernels by a short name, without installing them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import lzma
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import apt
from .outcome import VMError

DEFAULT = "6.12"
RESOLVE_AGAIN_AFTER = 24 * 3600
"""Seconds for which the answer to "which is the newest 6.12?" holds: most boots don't ask apt at all."""

KEEP_UNUSED = 7 * 24 * 3600
"""Seconds for which a release stays in the cache after a newer one has replaced it."""


@dataclass(frozen=True)
class Series:
    """A kernel name, and which packages it means in which suites (the first suite that has one counts)."""

    name: str
    release: str
    suites: tuple[str, ...]
    minimum: tuple[int, ...] = ()


# Plain images only: the cloud ones have no 9p, the real-time ones are another kernel.
SERIES = {
    "6.1": Series("6.1", r"6\.1\.0-\d+-amd64", (apt.OWN, "bookworm")),
    "6.12": Series("6.12", r"6\.12\.\d+\+deb\d+-amd64", (apt.OWN, "trixie")),
    "newest": Series("newest", r"\d+\.\d+(\.\d+)?(\+deb\d+)?(-\d+)?-amd64", ("forky", "sid"), minimum=(7, 2)),
}
_SELDOM_USED = re.compile(r"/kernel/(?:sound|drivers/(?:accel|gpu|hwmon|iio|infiniband|input|media|net|staging|usb))/")
ALIASES = {"bookworm": "6.1"}


@dataclass(frozen=True)
class Kernel:
    """A kernel in the cache, ready to boot."""

    name: str
    release: str
    directory: Path
    note: str = ""

    @property
    def image(self) -> Path:
        """The bootable kernel."""
        return self.directory / "vmlinuz"

    @property
    def modules(self) -> Path:
        """What the guest sees as /lib/modules/RELEASE."""
        return self.directory / "lib" / "modules" / self.release

    def has_module(self, name: str) -> bool:
        """Whether a module of this name (underscores, as in lsmod) comes with the kernel."""
        wanted = re.compile(rf"/{name}\.ko:", re.MULTILINE)
        return bool(wanted.search((self.modules / "modules.dep").read_text().replace("-", "_")))


def series(name: str) -> Series:
    """The series that a name or alias stands for."""
    found = SERIES.get(ALIASES.get(name, name))
    if found is None:
        known = ", ".join([*ALIASES, *SERIES])
        raise VMError(f"no kernel is called {name!r}: use one of {known}")
    return found


def version_key(release: str) -> tuple[int, ...]:
    """Sort key: the numbers of a release in order ("6.1.0-9" < "6.1.0-40")."""
    return tuple(int(number) for number in re.findall(r"\d+", release.replace("amd64", "")))


def pick(wanted: Series, packages: list[str]) -> str | None:
    """The newest release of a series among package names, or None."""
    releases = [name.removeprefix("linux-image-") for name in packages]
    fitting = [
        release
        for release in releases
        if re.fullmatch(wanted.release, release) and version_key(release) >= wanted.minimum
    ]
    return max(fitting, key=version_key, default=None)


def cache_root() -> Path:
    """Where kernels are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "ublkd" / "kernels"


class Store:
    """The kernel cache. Any number of processes may use it at a time."""

    def __init__(self, root: Path | None = None, say: Callable[[str], None] = lambda text: None) -> None:
        self.root = root or cache_root()
        self._say = say

    def cached(self, name: str) -> Kernel | None:
        """The kernel that a name meant when it was last resolved, if it is still in the cache."""
        wanted = series(name)
        release, _ = self._record(wanted)
        directory = self.root / release
        if not release or not (directory / "vmlinuz").exists():
            return None
        return Kernel(wanted.name, release, directory)

    def get(self, name: str, refresh: bool = False) -> Kernel:
        """The kernel to use for a name, fetched if need be. With `refresh` apt is asked in any case."""
        wanted = series(name)
        with self._lock(wanted.name):
            kernel = self.cached(name)
            age = time.time() - self._record(wanted)[1]
            if kernel and not refresh and 0 <= age < RESOLVE_AGAIN_AFTER:
                os.utime(kernel.directory)
                return kernel
            try:
                return self._fetch(wanted)
            except apt.AptError as error:
                if kernel is None:
                    raise VMError(f"can't fetch kernel {wanted.name}: {error}") from None
                return Kernel(kernel.name, kernel.release, kernel.directory, f"apt could not be asked: {error}")

    def resolve(self, wanted: Series) -> tuple[apt.Source, str]:
        """The newest release of a series and the source that has it."""
        for suite in wanted.suites:
            source = apt.Source(suite, self.root / "apt" / wanted.name)
            try:
                source.update()
                release = pick(wanted, source.packages("linux-image-[0-9].*-amd64"))
            except apt.AptError:
                if suite == wanted.suites[-1]:
                    raise
                continue
            if release:
                return source, release
        raise apt.AptError(f"no suite of {', '.join(wanted.suites)} has a kernel {wanted.name}")

    def _fetch(self, wanted: Series) -> Kernel:
        source, release = self.resolve(wanted)
        directory = self.root / release
        if not (directory / "vmlinuz").exists():
            self._say(f"fetching kernel {release}")
            self._unpack(source, release, directory)
        self._write_record(wanted, release)
        self._drop_unused()
        return Kernel(wanted.name, release, directory)

    def _unpack(self, source: apt.Source, release: str, directory: Path) -> None:
        """Fill a directory beside the final one and rename it, so that nobody sees half a kernel."""
        with tempfile.TemporaryDirectory(dir=self.root, prefix="unpack-") as name:
            temporary = Path(name)
            for package in source.download(kernel_packages(source, release), temporary):
                _run(["dpkg", "-x", str(package), str(temporary / "root")])
                package.unlink()
            _arrange(temporary / "root", temporary / "kernel", release)
            # ignore a loser's error: another process unpacked the same release under another name
            with contextlib.suppress(OSError):
                os.rename(temporary / "kernel", directory)

    def _drop_unused(self) -> None:
        """Remove what broken-off fetches left, and releases that no name means any more."""
        meant = {self._record(known)[0] for known in SERIES.values()}
        for directory in self.root.iterdir():
            ours = (directory / "vmlinuz").exists() or directory.name.startswith("unpack-")
            unused = time.time() - directory.stat().st_mtime > KEEP_UNUSED
            if ours and unused and directory.name not in meant:
                shutil.rmtree(directory, ignore_errors=True)

    def _record(self, wanted: Series) -> tuple[str, float]:
        """The release a series meant when last resolved, and when that was; "" and 0 for never."""
        try:
            record = json.loads((self.root / f"{wanted.name}.json").read_text())
            return str(record["release"]), float(record["resolved"])
        except (OSError, ValueError, KeyError, TypeError):
            return "", 0.0

    def _write_record(self, wanted: Series, release: str) -> None:
        path = self.root / f"{wanted.name}.json"
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"release": release, "resolved": time.time()}) + "\n")
        temporary.rename(path)

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.root / f"{name}.lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._say(f"waiting for another process to fetch kernel {name}")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def kernel_packages(source: apt.Source, release: str) -> list[str]:
    """The packages that hold a kernel and its modules; newer suites split the image in several."""
    return source.packages(rf"linux-(image|base|binary|modules)-{re.escape(release)}")


def _arrange(root: Path, kernel: Path, release: str) -> None:
    """Move what is needed out of unpacked packages: vmlinuz, and modules uncompressed and indexed."""
    kernel.mkdir()
    base = next((path for path in (root / "usr/lib/modules", root / "lib/modules") if path.is_dir()), None)
    images = [*root.glob(f"boot/vmlinuz-{release}"), *root.glob(f"usr/lib/modules/{release}/vmlinuz")]
    if base is None or not images:
        raise VMError(f"the packages of kernel {release} hold no vmlinuz or no modules: please report this")
    modules = kernel / "lib" / "modules"
    modules.parent.mkdir()
    shutil.move(images[0], kernel / "vmlinuz")
    shutil.move(base, modules)
    # plain files: the initramfs has no unxz, and emulated it is slow; what tests don't use stays small
    packed = [path for path in modules.rglob("*.ko.xz") if not _SELDOM_USED.search(str(path))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_decompress, packed))
    _run(["depmod", "-b", str(kernel), release])


def _decompress(path: Path) -> None:
    path.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))
    path.unlink()


def _run(command: list[str]) -> None:
    env = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    except FileNotFoundError:
        raise VMError(f"{command[0]} is missing: run scripts/setup vm") from None
    if done.returncode:
        raise VMError(f"{command[0]} failed: {done.stderr.strip()[-300:]}")
