# SPDX-License-Identifier: Apache-2.0
"""Run one VM from start to end: feed it, stream its output, and find out how it ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import dmesg, initramfs, qemu
from .job import Job
from .kernels import Kernel
from .monitor import Monitor
from .outcome import CANNOT_START, DIRTY, HANG, LOST, PANIC, Outcome, VMError
from .streams import MarkedStream

BOOT_TIMEOUT = 600.0
"""Seconds until a guest must have started the command; 7 are normal, a crowded host takes much longer."""

_DRAIN_TIMEOUT = 20.0
_BACKTRACE_TIME = 3.0
_PR_SET_PDEATHSIG = 1


@dataclass
class Sink:
    """Descriptors for the command's output and errors, and one to read what is typed if it has a terminal."""

    out: int = 1
    err: int = 2
    terminal: int | None = None


class Run:
    """One boot. Call :meth:`execute` once; the logs are there afterwards."""

    def __init__(self, kernel: Kernel, machine: qemu.Machine, job: Job, sink: Sink, timeout: float) -> None:
        self._kernel, self._machine, self._job = kernel, machine, job
        self._sink, self._timeout = sink, timeout
        self._selector = selectors.DefaultSelector()
        self._sockets: dict[str, socket.socket] = {}
        self._marked = {name: MarkedStream(job.mark) for name in ("out", "err", "kmsg")}
        self._report = b""
        self._raw = {"console": bytearray(), "kmsg": bytearray(), "qemu": bytearray()}
        self._lines: list[str] = []
        self.boot_seconds: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._was_cut = False

    def cut(self) -> None:
        """The power goes, from another thread: the guest stops where it is, and execute() returns LOST."""
        self._was_cut = True
        if self._process is not None:
            self._process.kill()

    @property
    def console(self) -> str:
        """What the guest's kernel wrote to its serial console."""
        return self._raw["console"].decode(errors="replace").replace("\r", "")

    @property
    def kernel_log(self) -> list[str]:
        """The guest's dmesg."""
        return dmesg.format_records(self._raw["kmsg"].decode(errors="replace"))

    def execute(self, boot_timeout: float = BOOT_TIMEOUT) -> Outcome:
        """Boot, run the command, end the VM. Raises VMError when QEMU itself can't be started."""
        started = time.monotonic()
        with self._qemu() as process:
            if not self._pump(process, lambda: self._said("run", "fail"), started + boot_timeout):
                return self._not_booted(process, boot_timeout)
            if failure := self._said("fail"):
                return Outcome(CANNOT_START, failure)
            self.boot_seconds = time.monotonic() - started
            if self._sink.terminal is not None:
                # not before: a terminal that nobody has opened loses what is typed
                self._selector.register(self._sink.terminal, selectors.EVENT_READ, "keyboard")
            if not self._pump(process, lambda: self._said("status"), time.monotonic() + self._timeout):
                return self._lost(process) if self._ended(process) else self._hang(process)
            self._pump(process, self._all_streams_ended, time.monotonic() + _DRAIN_TIMEOUT)
            return self._finished(int(self._said("status") or 0))

    @property
    def emulator_slipped(self) -> bool:
        """Did the guest die of a breakpoint that it had set in its own code?

        Linux patches code that other CPUs run by way of a breakpoint, and waits until all have seen the new code.
        QEMU's emulation with a thread per CPU now and then lets one execute the breakpoint afterwards.
        """
        return not self._machine.kvm and "Oops: int3: " in self.console

    def _finished(self, status: int) -> Outcome:
        if splats := dmesg.excerpt(self.kernel_log):
            message = f"the guest's kernel log is not clean (command's status: {status})"
            return Outcome(status or DIRTY, message, splats)
        return Outcome(status)

    def _lost(self, process: subprocess.Popen[bytes]) -> Outcome:
        if self._was_cut:
            return Outcome(LOST, "the power was cut")
        tail = self.console.splitlines()
        panics = [number for number, line in enumerate(tail) if _is_panic(line)]
        if panics:
            text = dmesg.without_registers(tail[max(0, panics[0] - 3) :])
            return Outcome(PANIC, "the guest kernel panicked", text[:60])
        return Outcome(LOST, f"the VM ended without a status ({self._last_words(process)})", tail[-10:])

    def _not_booted(self, process: subprocess.Popen[bytes], limit: float) -> Outcome:
        tail = self.console.splitlines()[-30:]
        if self._was_cut:
            return Outcome(LOST, "the power was cut")
        if self._ended(process):
            why = f"QEMU ended ({self._last_words(process)})"
            return Outcome(CANNOT_START, f"the guest didn't boot: {why}", tail)
        return Outcome(CANNOT_START, f"the guest didn't boot within {limit:.0f} s", tail)

    def _hang(self, process: subprocess.Popen[bytes]) -> Outcome:
        seen = len(self.kernel_log)
        with contextlib.suppress(OSError, ValueError):
            self._ask_for_backtraces()
            self._pump(process, lambda: False, time.monotonic() + _BACKTRACE_TIME)
        message = f"the command was still running after {self._timeout:g} s; blocked tasks and busy CPUs:"
        log = dmesg.without_registers(dmesg.without_idle_cpus(self.kernel_log[seen:]))
        return Outcome(HANG, message, log[:80])

    def _ask_for_backtraces(self) -> None:
        """Have init list the programs; then SysRq over the serial line, which needs no process."""
        self._sockets["report"].send(b"time is up\n")
        monitor = Monitor(self._sockets["monitor"])
        for key in b"wl":
            monitor.command("chardev-send-break", id="console")
            self._sockets["console"].send(bytes([key]))
            time.sleep(0.3)

    def _last_words(self, process: subprocess.Popen[bytes]) -> str:
        words = self._raw["qemu"].decode(errors="replace").strip()
        return words or f"QEMU's exit status is {process.wait()}"

    @staticmethod
    def _ended(process: subprocess.Popen[bytes]) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        return process.poll() is not None

    def _said(self, *words: str) -> str | None:
        """The rest of the first report line that begins with one of the words; None while there is none."""
        for line in self._lines:
            word, _, rest = line.partition(" ")
            if word in words:
                return rest
        return None

    def _all_streams_ended(self) -> bool:
        return all(stream.ended for stream in self._marked.values())

    def _pump(self, process: subprocess.Popen[bytes], done: Callable[[], object], deadline: float) -> bool:
        """Move bytes until `done` returns neither None nor False. False at the deadline or QEMU's end."""
        while done() in (None, False):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            for key, _ in self._selector.select(min(left, 1.0)):
                self._take(key.data, key.fd)
            if process.poll() is not None and not self._selector.select(0):
                return done() not in (None, False)
            if not self._selector.get_map():
                return False
        return True

    def _take(self, name: str, descriptor: int) -> None:
        try:
            data = os.read(descriptor, 1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            self._selector.unregister(descriptor)
        if name in ("out", "err"):
            _write_all(self._sink.out if name == "out" else self._sink.err, self._marked[name].feed(data))
        elif name == "terminal":
            _write_all(self._sink.out, data)
        elif name == "keyboard":
            self._sockets["terminal"].sendall(data)
        elif name == "report":
            self._report += data
            *lines, self._report = self._report.split(b"\n")
            self._lines += [line.decode(errors="replace") for line in lines]
        else:
            self._raw[name] += self._marked[name].feed(data) if name in self._marked else data

    @contextlib.contextmanager
    def _qemu(self) -> Iterator[subprocess.Popen[bytes]]:
        with contextlib.ExitStack() as stack:
            names = ["console", "monitor", *qemu.PORTS, *(["terminal"] if self._job.interactive else [])]
            theirs = stack.enter_context(contextlib.ExitStack())
            ends: dict[str, int] = {}
            for name in names:
                ours, end = socket.socketpair()
                stack.enter_context(ours)
                theirs.enter_context(end)
                self._sockets[name], ends[name] = ours, end.fileno()
            disks = [None if disk.nbd else disk.create() for disk in self._machine.disks]
            initrd = self._initramfs()
            ours_to_close = [initrd, *(disk for disk in disks if disk is not None)]
            for descriptor in ours_to_close:
                stack.callback(os.close, descriptor)
            command = qemu.command_line(self._machine, self._kernel, initrd, ends, disks)
            process = _spawn(command, [*ends.values(), *ours_to_close])
            stack.callback(_end, process)
            self._process = process
            theirs.close()
            self._watch(process)
            yield process

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr
        for name, ours in self._sockets.items():
            if name != "monitor":
                self._selector.register(ours.fileno(), selectors.EVENT_READ, name)
        self._selector.register(process.stderr.fileno(), selectors.EVENT_READ, "qemu")

    def _initramfs(self) -> int:
        """The kernel's initramfs with the job behind it, in memory."""
        descriptor = os.memfd_create("initramfs")
        data = initramfs.path_for(self._kernel).read_bytes() + self._job.archive(self._kernel)
        _write_all(descriptor, data)
        return descriptor


def _spawn(command: list[str], descriptors: list[int]) -> subprocess.Popen[bytes]:
    parent = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)

    def die_with_parent() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    # a session of its own: Ctrl-C is for us, who then end QEMU
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        pass_fds=descriptors,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    if process.stderr:
        process.stderr.close()


def _is_panic(line: str) -> bool:
    return any(sign in line for sign in ("Kernel panic", "Oops:", "kernel BUG at", "BUG: "))


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            # whoever started us made it so; it is not ours to change
            select.select([], [descriptor], [])


__all__ = ["BOOT_TIMEOUT", "Run", "Sink", "VMError"]
