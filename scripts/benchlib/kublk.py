# SPDX-License-Identifier: Apache-2.0
"""kublk, the server of the kernel's own ublk tests: from the source package of the kernel, built into a cache."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .system import BenchError, run, say

HERE = Path(__file__).resolve().parent
_UNPACK_S = 1800.0
_TESTS = "tools/testing/selftests/ublk"
_HEADERS = "include/uapi"


def cache() -> Path:
    """Where it is kept, in a directory per kernel release."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "ublkd" / "kublk"


def find(release: str) -> tuple[str, str]:
    """Its path for that kernel, or "" and the reason why there is none."""
    there = shutil.which("kublk") or shutil.which("kublk", path=str(cache() / release))
    if there:
        return there, ""
    with contextlib.suppress(OSError):
        return "", (cache() / release / "absent").read_text().strip()
    return "", "it is not built: run scripts/bench --fetch"


def package(release: str) -> str:
    """The package with the source of a kernel of Debian's. BenchError for other kernels."""
    version = re.match(r"(\d+\.\d+)[.\d]*[+-]", release)
    if not version:
        raise BenchError(f"{release} is no kernel of Debian's: put its kublk on PATH")
    return f"linux-source-{version[1]}"


def prepare(kernel: str | None) -> str:
    """Build it if that was not done before: for a kernel of scripts/vm, or the running one. Its release."""
    sys.path.insert(0, str(HERE.parents[1] / "tests"))
    from vm import apt, kernels
    from vm.outcome import VMError

    release = platform.release()
    try:
        store = kernels.Store(say=say)
        if kernel:
            release = store.get(kernel).release
        if find(release)[0] or (cache() / release / "absent").exists():
            return release
        name = package(release)
        if kernel:
            source, _ = store.resolve(kernels.series(kernel))
        else:
            source = apt.Source(apt.OWN, store.root / "apt" / "running")
            source.update()
        if not source.packages(re.escape(name)):
            raise BenchError(f"there is no package {name}")
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache()) as scratch:
            say(f"fetching {name} for the kernel selftest's server")
            [file] = source.download([name], Path(scratch))
            _install(file, name, cache() / release, Path(scratch))
    except (apt.AptError, VMError, BenchError, OSError) as error:
        say(f"kublk is not to be had: {error}")
    return release


def _install(file: Path, name: str, directory: Path, scratch: Path) -> None:
    """Build what the package holds into directory; what can't change is noted there."""
    done = scratch / "done"
    done.mkdir()
    try:
        build(_unpack(file, scratch), done / "kublk")
    except BenchError as error:
        (done / "absent").write_text(f"{name}: {error}\n")
        say(f"kublk is not to be had: {name}: {error}")
    # ignore a loser's error: another process built the same
    with contextlib.suppress(OSError):
        done.rename(directory)


def _unpack(file: Path, scratch: Path) -> Path:
    """The top of what is needed of the source tree."""
    run("dpkg", "-x", file, scratch / "package", timeout=_UNPACK_S)
    [archive] = (scratch / "package" / "usr" / "src").glob("linux-source-*.tar.*")
    tree = scratch / "tree"
    tree.mkdir()
    wanted = [f"*/{_TESTS}/*", f"*/{_HEADERS}/*"]
    with contextlib.suppress(BenchError):
        run("tar", "-xf", archive, "-C", tree, "--strip-components=1", "--wildcards", *wanted, timeout=_UNPACK_S)
    if not (tree / _TESTS / "kublk.c").exists():
        raise BenchError("it has no ublk selftest")
    return tree


def build(tree: Path, out: Path) -> None:
    """Compile a tree's kublk, with the optimisation that its own Makefile asks for."""
    sources = sorted(path for path in (tree / _TESTS).glob("*.c") if path.name != "metadata_size.c")
    flags = ["-O3", "-w", "-Werror=implicit-function-declaration", "-D_GNU_SOURCE", "-I", tree / _HEADERS]
    flags += [f"-ffile-prefix-map={tree}/="]
    recent = subprocess.run(["pkg-config", "--atleast-version=2.4", "liburing"], capture_output=True)
    if recent.returncode:
        flags += ["-include", HERE / "liburing_2_4.h"]
    run("gcc", *flags, "-o", out, *sources, "-lpthread", "-lm", "-luring")
