# SPDX-License-Identifier: Apache-2.0
"""The QEMU command line. See docs of each choice at its constant: most of them are about boot time."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from .disks import Disk
from .kernels import Kernel
from .outcome import VMError

PORTS = ("out", "err", "report", "kmsg")
"""Virtio serial ports from number 1 on, in the order that guest/init.sh counts on."""

# The two timeouts: on a crowded host a virtual CPU may stand still for long, which is no bug of the guest.
# nokaslr, rodata=off and mitigations=off save seconds of emulated work; panic=-1 with -no-reboot ends the VM.
_CMDLINE = (
    "console=ttyS0 quiet loglevel=3 panic=-1 oops=panic nowatchdog no_timer_check audit=0 mitigations=off "
    "tsc=reliable nokaslr rodata=off printk.devkmsg=on log_buf_len=1M "
    "rcupdate.rcu_cpu_stall_timeout=120 workqueue.watchdog_thresh=120"
)


@dataclass
class Machine:
    """The virtual hardware."""

    cpus: int = 2
    memory: int = 3 << 30
    kvm: bool = False
    icount: bool = False
    append: str = ""
    plugin: str | None = None
    disks: list[Disk] = field(default_factory=list)
    share: Path | None = None
    terminal: bool = False


def binary() -> str:
    """The path of QEMU."""
    found = shutil.which("qemu-system-x86_64")
    if os.uname().machine != "x86_64":
        raise VMError("VMs need an x86-64 machine: the guest runs this machine's own programs")
    if found is None:
        raise VMError("qemu-system-x86_64 is missing: run scripts/setup vm")
    return found


def command_line(
    machine: Machine, kernel: Kernel, initramfs: int, chardevs: dict[str, int], disks: list[int | None]
) -> list[str]:
    """QEMU's arguments. Files and sockets are handed over as descriptors of those numbers."""
    arguments = [binary(), *_processor(machine), "-m", f"{machine.memory >> 20}M"]
    arguments += ["-M", "q35", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    arguments += ["-kernel", str(kernel.image), "-initrd", f"/proc/self/fd/{initramfs}"]
    arguments += ["-append", f"{_CMDLINE} {machine.append}".strip()]
    if machine.plugin:
        arguments += ["-plugin", machine.plugin]
    arguments += _mount("root", Path("/"), ",readonly=on")
    if machine.share:
        arguments += _mount("share", machine.share, "")
    arguments += _serial(machine, chardevs)
    for number, (disk, descriptor) in enumerate(zip(machine.disks, disks, strict=True)):
        arguments += _disk(number, disk, descriptor)
    return arguments


def _processor(machine: Machine) -> list[str]:
    if machine.icount:
        # guest time is the instruction count: 4 ns each, on whichever CPU: they take turns, never run at once
        return [
            "-accel",
            "tcg,thread=single,tb-size=512",
            "-icount",
            "shift=2,sleep=off",
            "-cpu",
            "max,-erms",
            "-smp",
            str(machine.cpus),
        ]
    if machine.kvm:
        return ["-accel", "kvm", "-cpu", "host", "-smp", str(machine.cpus)]
    # -erms: the kernel would copy by `rep movsb`, which TCG runs byte by byte
    return ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,-erms", "-smp", str(machine.cpus)]


def _mount(tag: str, path: Path, options: str) -> list[str]:
    escaped = str(path).replace(",", ",,")
    return [
        "-fsdev",
        f"local,id={tag},path={escaped},security_model=none,multidevs=remap{options}",
        "-device",
        f"virtio-9p-pci,fsdev={tag},mount_tag={tag}",
    ]


def _serial(machine: Machine, chardevs: dict[str, int]) -> list[str]:
    arguments = []
    for name, descriptor in chardevs.items():
        arguments += ["-chardev", f"socket,id={name},fd={descriptor}"]
    arguments += ["-serial", "chardev:console", "-mon", "chardev=monitor,mode=control"]
    arguments += ["-device", "virtio-serial-pci"]
    if machine.terminal:
        arguments += ["-device", "virtconsole,chardev=terminal,nr=0"]
    for number, name in enumerate(PORTS, start=1):
        arguments += ["-device", f"virtserialport,chardev={name},nr={number},name=ublkd.{name}"]
    return arguments


def _disk(number: int, disk: Disk, descriptor: int | None) -> list[str]:
    unmap = "unmap" if disk.discard else "ignore"
    able = "on" if disk.discard else "off"
    if disk.nbd is None:
        # unsafe: a scratch disk need not outlive the host, and fsync is slow there
        file = f"file=/proc/self/fd/{descriptor},cache=unsafe"
    else:
        # a flush of the guest's is one of the server's
        file = f"file=nbd+unix:///?socket={disk.nbd},cache=writeback"
    return [
        "-drive",
        f"if=none,id=disk{number},format=raw,{file},discard={unmap},detect-zeroes=off",
        "-device",
        f"virtio-blk-pci,drive=disk{number},serial=ublkd-{number},discard={able},write-zeroes={able},"
        f"logical_block_size={disk.sector},physical_block_size={disk.sector}",
    ]
