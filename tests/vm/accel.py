# SPDX-License-Identifier: Apache-2.0
"""Find out whether /dev/kvm runs stock kernels here: on some machines it exists and can't."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from . import kernels, qemu
from .boot import Run, Sink
from .job import Job
from .kernels import Kernel
from .outcome import VMError

_PROBE_SECONDS = 20.0
_DEVICE = "/dev/kvm"


def use_kvm(mode: str, kernel: Kernel) -> bool:
    """Whether to use KVM in mode "on", "off" or "auto"; auto tries it once per boot of this machine."""
    if mode != "auto":
        return mode == "on"
    return os.access(_DEVICE, os.R_OK | os.W_OK) and remembered(_identity(), lambda: probe(kernel))


def probe(kernel: Kernel) -> bool:
    """Boot under KVM and run nothing: seconds where it works, and mostly at once where it doesn't."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        job = Job(["true"], directory=Path("/"), load_ublk=False)
        run = Run(kernel, qemu.Machine(kvm=True, memory=1 << 30), job, Sink(null, null), _PROBE_SECONDS)
        return run.execute(boot_timeout=_PROBE_SECONDS).status == 0
    except VMError:
        return False
    finally:
        os.close(null)


def remembered(identity: str, find_out: Callable[[], bool], path: Path | None = None) -> bool:
    """The answer for this identity, asked for only if the file doesn't hold it."""
    path = path or kernels.cache_root() / "kvm.json"
    try:
        known = json.loads(path.read_text())
        if known["identity"] == identity:
            return bool(known["works"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    works = find_out()
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"identity": identity, "works": works}) + "\n")
    temporary.rename(path)
    return works


def _identity() -> str:
    """What the answer depends on: this boot of this machine, and the QEMU it has."""
    program = os.stat(qemu.binary())
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {program.st_mtime_ns} {program.st_size}"
