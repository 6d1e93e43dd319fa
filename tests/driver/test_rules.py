# SPDX-License-Identifier: Apache-2.0
"""Ordinary users, time-outs, and unloading: what needs more than commands in a row."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ublkd import native
from ublkd.control import uapi
from ublkd.control.commands import AddRequest, Control
from ublkd.control.device import char_path_of, open_char, path_of, wait_for_node
from ublkd.control.params import Basic, Params
from ublkd.errors import DriverError

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("ours")]

NOBODY = 65534
SIZE = 16 << 20
PARAMS = Params(Basic(SIZE, max_io_bytes=512 << 10))


def as_user(uid: int, task: Callable[[Control], int]) -> int:
    """What task returns, or the errno of the driver's refusal, from a child with this uid and gid."""
    pid = os.fork()
    if pid == 0:
        result = 200
        try:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
            with Control() as ctl:
                result = task(ctl)
        except DriverError as exc:
            result = exc.errno
        finally:
            os._exit(result)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def open_to_all() -> Iterator[None]:
    os.chmod("/dev/ublk-control", 0o666)
    yield
    os.chmod("/dev/ublk-control", 0o600)


def test_ordinary_users(open_to_all: None) -> None:
    number = 40
    request = AddRequest(dev_id=number, flags=uapi.F_UNPRIVILEGED_DEV | uapi.F_USER_RECOVERY)
    assert as_user(NOBODY, lambda ctl: ctl.add_dev(AddRequest(dev_id=number)).dev_id) == errno.EPERM
    copying = request._replace(flags=uapi.F_UNPRIVILEGED_DEV | uapi.F_USER_COPY)
    assert as_user(NOBODY, lambda ctl: ctl.add_dev(copying).dev_id) == errno.EINVAL
    assert as_user(NOBODY, lambda ctl: ctl.add_dev(request).dev_id) == number
    wait_for_node(char_path_of(number), 5)

    def set_params(ctl: Control) -> int:
        ctl._unprivileged[number] = True
        ctl.set_params(number, PARAMS)
        return 0

    assert as_user(NOBODY, set_params) == errno.EACCES
    os.chown(char_path_of(number), NOBODY, NOBODY)
    assert as_user(NOBODY, set_params) == 0
    assert as_user(NOBODY - 1, set_params) == errno.EACCES
    with Control() as ctl:
        info = ctl.get_info(number)
        assert (info.owner_uid, info.owner_gid) == (NOBODY, NOBODY)
        assert info.flags & uapi.F_UNPRIVILEGED_DEV and not info.flags & uapi.F_USER_RECOVERY

    def remove(ctl: Control) -> int:
        ctl._unprivileged[number] = True
        ctl.del_dev(number)
        return 0

    assert as_user(NOBODY, remove) == 0


def test_the_path_must_be_that_of_the_device(open_to_all: None) -> None:
    with Control() as ctl:
        ctl.add_dev(AddRequest(dev_id=41))
        os.chmod(char_path_of(41), 0o666)
        assert as_user(NOBODY, lambda c: c.get_info(41).state) == errno.EPERM
        ctl.del_dev(41)


def test_how_many_they_may_have(open_to_all: None) -> None:
    limit = "/sys/module/ublkd_drv/parameters/ublks_max"
    with open(limit, "w") as file:
        file.write("0")
    request = AddRequest(dev_id=42, flags=uapi.F_UNPRIVILEGED_DEV)
    try:
        assert as_user(NOBODY, lambda ctl: ctl.add_dev(request).dev_id) == errno.EACCES
    finally:
        with open(limit, "w") as file:
            file.write("64")


def serve(ctl: Control, number: int, depth: int) -> int:
    """A null device's server: its pid, once the device lives."""
    cdev = open_char(number)
    cmdbuf = native.CommandBuffer(cdev, 0, depth)
    pid = os.fork()
    if pid == 0:
        try:
            ctl.close()
            target = native.null_target(zero_reads=True)
            native.Queue(
                cdev_fd=cdev, qid=0, depth=depth, max_io_bytes=512 << 10, transport=native.TRANSPORT_COPY,
                dev_bytes=SIZE, cmdbuf=cmdbuf, shm=None, target=target,
            ).run()  # fmt: skip
        finally:
            os._exit(0)
    cmdbuf.close()
    os.close(cdev)
    ctl.start_dev(number, os.getpid())
    return pid


def test_a_server_that_does_not_answer_in_time_is_killed() -> None:
    with Control() as ctl:
        info = ctl.add_dev(AddRequest(depth=8))
        ctl.set_params(info.dev_id, PARAMS)
        with open(f"/sys/class/ublk-char/ublkc{info.dev_id}/io_timeout", "w") as file:
            file.write("1")
        pid = serve(ctl, info.dev_id, 8)
        with open(path_of(info.dev_id), "rb", buffering=0) as disk:
            assert disk.read(4096) == bytes(4096)
            os.kill(pid, signal.SIGSTOP)
            with pytest.raises(OSError) as caught:
                os.posix_fadvise(disk.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                os.pread(disk.fileno(), 4096, 8 << 20)
            assert caught.value.errno == errno.EIO
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        ctl.del_dev(info.dev_id)


def test_who_waits_for_the_end_of_a_disk_can_be_killed() -> None:
    """And it comes to that end all the same, when the server answers or dies."""
    with Control() as ctl:
        info = ctl.add_dev(AddRequest(depth=8))
        ctl.set_params(info.dev_id, PARAMS)
        server = serve(ctl, info.dev_id, 8)
        path = path_of(info.dev_id)
        wait_for_node(path, 5)
        os.kill(server, signal.SIGSTOP)
        dd = ["dd", f"if={path}", "of=/dev/null", "bs=4096", "skip=2048", "count=1", "iflag=direct"]
        with subprocess.Popen(dd, stderr=subprocess.DEVNULL) as reader:
            inflight = Path(f"/sys/block/{os.path.basename(path)}/inflight")
            while inflight.read_text().split()[0] == "0":
                time.sleep(0.01)
            waiting = os.fork()
            if waiting == 0:
                with Control() as own:
                    own.del_dev(info.dev_id, timeout=10000)
                os._exit(0)
            time.sleep(1)
            assert os.waitpid(waiting, os.WNOHANG) == (0, 0), "it waits for the request"
            os.kill(waiting, signal.SIGKILL)
            assert os.waitstatus_to_exitcode(os.waitpid(waiting, 0)[1]) == -signal.SIGKILL
            assert reader.poll() is None
            os.kill(server, signal.SIGKILL)
            os.waitpid(server, 0)
            assert reader.wait() != 0
        ctl.del_dev(info.dev_id)
        assert not os.path.exists(path)


def test_a_device_keeps_the_module() -> None:
    with Control() as ctl:
        info = ctl.add_dev(AddRequest())
    refused = subprocess.run(["rmmod", "ublkd_drv"], capture_output=True, text=True)
    assert refused.returncode and "in use" in refused.stderr
    with Control() as ctl:
        ctl.del_dev(info.dev_id)
