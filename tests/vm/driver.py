# SPDX-License-Identifier: Apache-2.0
"""Build the driver in kernel_module/ for one of the kernels that scripts/vm boots."""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import apt, debug, dmesg, kernels
from .outcome import CANNOT_START, DIRTY, VMError

NAME = "ublkd_drv"
KERNELS = ("6.1", "6.12")
_TOP = Path(__file__).resolve().parents[2]
_SOURCES = _TOP / "kernel_module"
_PARTS = ("linux-headers-", "linux-kbuild-")
_VM = str(_TOP / "scripts" / "vm")

BUGS = {
    "sleep": "BUG: sleeping function called",
    "list": "list_del corruption",
    "object": "ODEBUG: free active",
    "lock": "possible circular locking",
    "hang": "blocked for more than",
    "free": "KASAN:",
}
"""Bugs that tests/driver/bugs makes, and what a debug kernel says of each. Lockdep goes off at KASAN's first report."""
LEAK = ("leak", 'comm "insmod"')
"""Another, of which not the log tells, and what is told of it: the module and its names are gone by then."""


@dataclass(frozen=True)
class Headers:
    """What a kernel's modules are built with: unpacked packages, or a whole system if they don't run here."""

    release: str
    root: Path
    chroot: bool

    @property
    def kdir(self) -> Path:
        """The build directory, as make sees it."""
        directory = Path("/usr/src") / f"linux-headers-{self.release}"
        return directory if self.chroot else self.root / directory.relative_to("/")


def headers_root() -> Path:
    """Where headers are kept, beside the kernels."""
    return kernels.cache_root().parent / "headers"


def get_headers(kernel: kernels.Kernel) -> Headers:
    """The headers of a kernel, fetched if need be."""
    own = Headers(kernel.release, kernel.directory, False)
    if own.kdir.exists():
        return own
    root = headers_root() / kernel.release
    root.parent.mkdir(parents=True, exist_ok=True)
    with open(root.parent / f"{kernel.release}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for chroot in (False, True):
            found = Headers(kernel.release, root / ("system" if chroot else "packages"), chroot)
            if (found.root / "complete").exists():
                return found
        return _fetch(kernel, root)


def build(name: str, store: kernels.Store | None = None) -> Path:
    """Build the module for a kernel: the path of the .ko file."""
    store = store or kernels.Store(say=_say)
    kernel = store.get(name)
    return _build(kernel, _SOURCES, _TOP / "build" / "driver" / kernel.release) / f"{NAME}.ko"


def _build(kernel: kernels.Kernel, sources: Path, directory: Path) -> Path:
    """Build a module of these sources in a directory of its own, which is returned."""
    headers = get_headers(kernel)
    directory.mkdir(parents=True, exist_ok=True)
    # only what changed: make goes by the time of a file
    for path in sorted(sources.rglob("*")):
        copy = directory / path.relative_to(sources)
        if path.is_dir():
            copy.mkdir(exist_ok=True)
        elif not copy.exists() or copy.read_bytes() != path.read_bytes():
            shutil.copyfile(path, copy)
            shutil.copymode(path, copy)
    done = subprocess.run(_make(headers, directory), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    output = done.stdout + done.stderr
    complaints = [line for line in output.splitlines() if re.search(r"\bwarning:|\berror:", line)]
    if done.returncode:
        raise VMError(f"the driver does not build for {kernel.release}:\n{output[-3000:]}")
    if complaints:
        raise VMError(f"the driver builds with warnings for {kernel.release}:\n" + "\n".join(complaints))
    return directory


def _make(headers: Headers, directory: Path) -> list[str]:
    if not headers.chroot:
        return ["make", "-C", str(headers.kdir), f"M={directory}", "modules"]
    # mounts of its own, which go with it
    mounts = 'mount -t proc proc "$1/proc" && mount --bind "$2" "$1/build"'
    script = mounts + ' && exec chroot "$1" make -C "$3" M=/build modules'
    return ["unshare", "-m", "sh", "-c", script, "sh", str(headers.root), str(directory), str(headers.kdir)]


def _fetch(kernel: kernels.Kernel, root: Path) -> Headers:
    source = _source_of(kernel)
    _say(f"fetching the headers of kernel {kernel.release}")
    shutil.rmtree(root, ignore_errors=True)
    packages = root / "packages"
    packages.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=root) as name:
        for package in source.download(_packages(source, kernel.release), Path(name)):
            kernels._run(["dpkg", "-x", str(package), str(packages)])
    found = Headers(kernel.release, packages, False)
    makefile = found.kdir / "Makefile"
    makefile.write_text(makefile.read_text().replace("/usr/src/", f"{packages}/usr/src/"))
    if not _runs_here(found):
        shutil.rmtree(packages)
        found = _bootstrap(source, kernel, root / "system")
    (found.root / "complete").touch()
    return found


def _source_of(kernel: kernels.Kernel) -> apt.Source:
    """The package source that the kernel came from."""
    package = f"linux-headers-{kernel.release}"
    for suite in kernels.series(kernel.name).suites:
        source = apt.Source(suite, kernels.cache_root() / "apt" / kernel.name)
        try:
            found = source.packages(re.escape(package))
            if not found:
                source.update()
                found = source.packages(re.escape(package))
        except apt.AptError:
            continue
        if found:
            return source
    raise VMError(f"there is no package {package} any more: let scripts/vm fetch a newer kernel {kernel.name}")


def _packages(source: apt.Source, release: str) -> list[str]:
    """The headers, and what of their dependencies belongs to the kernel."""
    wanted = [f"linux-headers-{release}"]
    for package in wanted:
        wanted += [name for name in source.depends(package) if name.startswith(_PARTS) and name not in wanted]
    return wanted


def _runs_here(headers: Headers) -> bool:
    """Whether this machine has the compiler that the kernel asks for, and runs the programs of its headers."""
    variables = (headers.kdir / ".kernelvariables").read_text()
    compiler = re.search(r"\bgcc-\d+\b", variables)
    modpost = next(iter(headers.root.glob("usr/lib/linux-kbuild-*/scripts/mod/modpost*")), None)
    if compiler and not shutil.which(compiler[0]):
        return False
    if modpost is None:
        return False
    for program in headers.root.glob("usr/lib/linux-kbuild-*/scripts/mod/modpost*"):
        done = subprocess.run([str(program), "-h"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if "GLIBC" in done.stderr:
            return False
    return True


def _bootstrap(source: apt.Source, kernel: kernels.Kernel, system: Path) -> Headers:
    """A small Debian of the kernel's own suite to build in."""
    if os.geteuid() != 0 or shutil.which("debootstrap", path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
        raise VMError(
            f"the headers of {kernel.release} need a newer system than this: as root, with the package debootstrap "
            "installed, one is made"
        )
    _say(f"making a system of suite {source.suite} to build in (a minute or two)")
    scripts = Path("/usr/share/debootstrap/scripts")
    script = scripts / source.suite
    include = f"--include=make,kmod,linux-headers-{kernel.release}"
    kernels._run(
        [
            "debootstrap",
            "--variant=minbase",
            include,
            source.suite,
            str(system),
            source.site(),
            str(script if script.exists() else scripts / "sid"),
        ]
    )
    (system / "build").mkdir()
    return Headers(kernel.release, system, True)


def _say(text: str) -> None:
    print(f"driver: {text}", file=sys.stderr, flush=True)


def prove(name: str, store: kernels.Store) -> None:
    """Raise VMError unless a run on the debug kernel fails for bugs, and for each that we make."""
    sources = _TOP / "tests" / "driver" / "bugs"
    kernel = store.get(name)
    module = _build(kernel, sources, _TOP / "build" / "bugs" / kernel.release) / "bugs.ko"
    log = module.with_name("log")
    command = [
        _VM,
        name,
        "--debug",
        "--no-ublk",
        f"--log={log}",
        "--",
        "sh",
        sources / "provoke.sh",
        module,
        LEAK[0],
        *BUGS,
    ]
    done = subprocess.run(command, cwd=_TOP, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != DIRTY:
        output = done.stdout + done.stderr
        raise VMError(f"kernel {kernel.release} ran into bugs and ended with {done.returncode}: {output}")
    missed = missing_reports(Path(f"{log}.dmesg").read_text().splitlines())
    if not any(LEAK[1] in text for text in debug.leaks(done.stdout)):
        missed.append(LEAK[0])
    if missed:
        raise VMError(f"kernel {kernel.release} did not report all bugs: {', '.join(missed)}, see {log}.dmesg")
    _say(f"kernel {kernel.release} reports bugs: {', '.join([LEAK[0], *BUGS])}")


def missing_reports(log: list[str]) -> list[str]:
    """Of which of the bugs a kernel log doesn't tell in a way that makes it dirty."""
    splats = dmesg.find_splats(log)
    return [bug for bug, words in BUGS.items() if not any(words in line for line in splats)]


def test(name: str, module: Path, arguments: list[str], with_debug: bool = False) -> int:
    """Run tests/driver on a kernel with this module loaded: the exit status."""
    done = subprocess.run(["make", "-s", "-C", str(_TOP / "tests" / "driver")])
    if done.returncode:
        raise VMError("the clients in tests/driver do not build")
    pytest = [".venv/bin/python", "-B", "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-v"]
    machine = [f"--module={module}", "--require-ublk", "--cpus=4", "--memory=3G", "--timeout=7200"]
    environment = ["--env=UBLKD_REQUIRE_KERNEL=1"]
    if with_debug:
        machine += ["--debug", "--memory=4G"]
        environment.append("--env=UBLKD_DEBUG_KERNEL=1")
    tests = arguments if any(argument.startswith("tests/") for argument in arguments) else [*arguments, "tests/driver"]
    vm = [_VM, name, *machine, *environment, "--", *pytest, *tests]
    return subprocess.run(vm, cwd=_TOP, stdin=subprocess.DEVNULL).returncode


def main(arguments: list[str] | None = None) -> int:
    """Entry point; prints the path of each module, or the output of its tests."""
    arguments = sys.argv[1:] if arguments is None else arguments
    split = arguments.index("--") if "--" in arguments else len(arguments)
    usage = "driver [KERNEL...] [--debug] [--test [-- PYTEST-ARGUMENT...]]"
    parse = argparse.ArgumentParser(prog="driver", usage=usage, description=__doc__)
    parse.add_argument("kernels", nargs="*", default=[], help="default: " + ", ".join(KERNELS))
    parse.add_argument("--test", action="store_true", help="and run tests/driver on each")
    parse.add_argument("--debug", action="store_true", help="for their source, built to find bugs (KASAN, lockdep...)")
    options = parse.parse_args(arguments[:split])
    store = (debug.Store if options.debug else kernels.Store)(say=_say)
    status = 0
    try:
        for name in options.kernels or KERNELS:
            module = build(name, store)
            print(module, flush=True)
            if options.test and options.debug:
                prove(name, store)
            if options.test:
                status = test(name, module, arguments[split + 1 :], options.debug) or status
    except (VMError, apt.AptError) as error:
        _say(str(error))
        return CANNOT_START
    return status
