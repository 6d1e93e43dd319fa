# SPDX-License-Identifier: Apache-2.0
"""cffi build of the engine: the module `ublkd._engine`, in API mode on the system's liburing.

The declarations come from engine.h itself, between its two cdef marks, so there is one list of them.
"""

import pathlib
import subprocess

import cffi

# cffi runs this file without a __file__, from the directory of setup.py.
HERE = pathlib.Path(globals().get("__file__", "daemon/ublkd/engine/build.py")).resolve().parent
ROOT = HERE.parents[2]

# Not the Python target: that one is an extension of its own (setup.py).
SOURCES = sorted(p.name for p in HERE.glob("*.c") if p.name != "target_python.c")

# Hidden: what is called per request in another file of the engine needs no detour by the linker's table.
FLAGS = ["-std=gnu11", "-D_GNU_SOURCE", "-O2", "-fvisibility=hidden", "-Wall", "-Wextra"]


def cdef_text() -> str:
    """The part of engine.h that cffi is to read."""
    text = (HERE / "engine.h").read_text()
    return text.split("/* cdef begin */", 1)[1].split("/* cdef end */", 1)[0]


def liburing_flags(option: str) -> list[str]:
    """What pkg-config says about liburing; nothing where it is not installed (the linker then says what lacks)."""
    try:
        return subprocess.run(
            ["pkg-config", option, "liburing"], check=True, capture_output=True, text=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


ffibuilder = cffi.FFI()
ffibuilder.cdef(cdef_text())
ffibuilder.set_source(
    "ublkd._engine",
    '#include "engine.h"\n',
    sources=[f"daemon/ublkd/engine/{name}" for name in SOURCES],
    include_dirs=["daemon/ublkd/engine", "kernel_module/uapi"],
    extra_compile_args=[*FLAGS, *liburing_flags("--cflags")],
    extra_link_args=liburing_flags("--libs") or ["-luring"],
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True, tmpdir=str(ROOT))
