# SPDX-License-Identifier: Apache-2.0
"""Control commands on a real driver, used as meant and otherwise."""

import ctypes
import errno
import mmap
import os
import pathlib
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import pytest

from ublkd import inventory, native
from ublkd.control import uapi
from ublkd.control.commands import SERVER_FLAGS, AddRequest, Control, DeviceInfo
from ublkd.control.device import char_path_of, open_char, path_of, wait_for_node
from ublkd.control.params import Basic, Discard, Params
from ublkd.errors import DriverError

pytestmark = pytest.mark.kernel

NO_SUCH_DEVICE = 999_999
NOBODY = 65534
SIZE = 64 << 20
PARAMS = Params(
    Basic(SIZE, 4096, 4096, 4096, 65536, 512 << 10, attrs=uapi.ATTR_VOLATILE_CACHE | uapi.ATTR_FUA),
    Discard(4096, 1 << 30, 1 << 30),
)


@pytest.fixture
def ctl() -> Iterator[Control]:
    with Control() as ctl:
        yield ctl


@pytest.fixture
def add(ctl: Control) -> Iterator[Callable[..., DeviceInfo]]:
    """Adds devices; those that the test leaves are deleted."""
    made: list[int] = []

    def add(**request: int) -> DeviceInfo:
        info = ctl.add_dev(AddRequest(**request))
        made.append(info.dev_id)
        return info

    yield add
    for dev_id in made:
        try:
            ctl.del_dev(dev_id)
        except DriverError as exc:
            assert exc.errno == errno.ENODEV


class Server:
    """A null device of one queue, served by a child; the least that makes a disk."""

    def __init__(self, ctl: Control, info: DeviceInfo, recover: bool = False) -> None:
        self.info = info
        cdev = open_char(info.dev_id)
        cmdbuf = native.CommandBuffer(cdev, 0, info.depth)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                ctl.close()
                target = native.null_target(zero_reads=True)
                queue = native.Queue(
                    cdev_fd=cdev,
                    qid=0,
                    depth=info.depth,
                    max_io_bytes=info.max_io_bytes,
                    transport=native.TRANSPORT_COPY,
                    dev_bytes=SIZE,
                    cmdbuf=cmdbuf,
                    shm=None,
                    target=target,
                )
                queue.run()
            finally:
                os._exit(0)
        cmdbuf.close()
        os.close(cdev)
        if recover:
            ctl.end_recovery(info.dev_id, os.getpid())
        else:
            ctl.start_dev(info.dev_id, os.getpid())

    def kill(self) -> None:
        """The server is gone when this returns; the driver may not have noticed yet."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


@pytest.fixture
def serve(ctl: Control, add: Callable[..., DeviceInfo]) -> Iterator[Callable[..., Server]]:
    """Makes a live disk."""
    servers: list[Server] = []

    def serve(flags: int = 0) -> Server:
        info = add(depth=16, flags=flags)
        ctl.set_params(info.dev_id, PARAMS)
        servers.append(Server(ctl, info))
        return servers[-1]

    yield serve
    for server in servers:
        server.kill()


def refusal(call: Callable[[], object]) -> int:
    """The errno that a call fails with."""
    with pytest.raises(DriverError) as caught:
        call()
    return caught.value.errno


def wait_for_state(ctl: Control, dev_id: int, state: int) -> None:
    deadline = time.monotonic() + 40
    while ctl.get_info(dev_id).state != state:
        assert time.monotonic() < deadline, ctl.get_info(dev_id)
        time.sleep(0.05)


def test_features(ctl: Control) -> None:
    features = ctl.get_features()
    assert not features.assumed
    assert features.has("CMD_IOCTL_ENCODE") and features.has("USER_RECOVERY") and features.has("USER_COPY")


def test_add_and_delete(ctl: Control, add: Callable[..., DeviceInfo]) -> None:
    info = add(queues=2, depth=32, max_io_bytes=256 << 10)
    assert info.queues == min(2, os.cpu_count() or 1)
    assert (info.depth, info.max_io_bytes, info.state_name) == (32, 256 << 10, "dead")
    assert (info.server_flags, info.owner_uid) == (SERVER_FLAGS, 0)
    wait_for_node(char_path_of(info.dev_id), 5)
    assert ctl.get_info(info.dev_id) == info._replace(pid=ctl.get_info(info.dev_id).pid)
    ctl.del_dev(info.dev_id)
    assert refusal(lambda: ctl.get_info(info.dev_id)) == errno.ENODEV
    assert not os.path.exists(char_path_of(info.dev_id))
    assert add(dev_id=info.dev_id).dev_id == info.dev_id  # the number is free at once


def test_delete_without_waiting(ctl: Control, add: Callable[..., DeviceInfo]) -> None:
    info = add()
    ctl.del_dev(info.dev_id, wait=False)
    assert refusal(lambda: ctl.get_info(info.dev_id)) == errno.ENODEV


def test_numbers(ctl: Control, add: Callable[..., DeviceInfo]) -> None:
    first, second = add(), add()
    assert first.dev_id != second.dev_id
    chosen = add(dev_id=77)
    assert chosen.dev_id == 77
    assert refusal(lambda: add(dev_id=77)) == errno.EEXIST


def test_queues_are_clamped_and_flags_dropped(ctl: Control, add: Callable[..., DeviceInfo]) -> None:
    unknown = 1 << 60
    info = add(queues=4096, depth=1, flags=unknown | uapi.F_USER_COPY)
    assert info.queues <= (os.cpu_count() or 1)
    assert info.dropped == unknown and info.flags & uapi.F_USER_COPY


def test_root_s_devices_are_not_unprivileged(ctl: Control, add: Callable[..., DeviceInfo]) -> None:
    assert add(flags=uapi.F_UNPRIVILEGED_DEV).dropped == uapi.F_UNPRIVILEGED_DEV


def test_affinity_covers_every_cpu_once(ctl: Control, add: Callable[..., DeviceInfo]) -> None:
    info = add(queues=os.cpu_count() or 1)
    masks = [ctl.queue_affinity(info.dev_id, q) for q in range(info.queues)]
    assert all(masks)
    assert sorted(cpu for mask in masks for cpu in mask) == sorted(set().union(*masks))
    assert os.sched_getaffinity(0) <= set().union(*masks)
    assert refusal(lambda: ctl.queue_affinity(info.dev_id, info.queues)) == errno.EINVAL


def test_params_round_trip(ctl: Control, add: Callable[..., DeviceInfo]) -> None:
    dev_id = add().dev_id
    PARAMS.check(512 << 10, 0)
    ctl.set_params(dev_id, PARAMS)
    got = ctl.get_params(dev_id)
    assert got._replace(devt=None) == PARAMS
    assert got.devt is not None and got.devt.disk_major == 0
    char = os.stat(char_path_of(dev_id)).st_rdev
    assert (got.devt.char_major, got.devt.char_minor) == (os.major(char), os.minor(char))
    ctl.set_params(dev_id, got)  # what was read can be written again


def test_bad_params_are_refused(ctl: Control, add: Callable[..., DeviceInfo]) -> None:
    dev_id = add().dev_id
    for bad in (
        PARAMS._replace(basic=PARAMS.basic._replace(block_size=256)),
        PARAMS._replace(basic=PARAMS.basic._replace(physical_block_size=512)),
        PARAMS._replace(basic=PARAMS.basic._replace(max_io_bytes=1 << 20)),
        PARAMS._replace(basic=PARAMS.basic._replace(max_io_bytes=512)),
        PARAMS._replace(discard=Discard(0, 1 << 20)),
        PARAMS._replace(discard=Discard(4096, 1 << 20, max_segments=2)),
    ):
        assert refusal(lambda bad=bad: ctl.set_params(dev_id, bad)) == errno.EINVAL  # type: ignore[misc]
    ctl.set_params(dev_id, PARAMS)


def test_start_that_nobody_answers(ctl: Control, add: Callable[..., DeviceInfo]) -> None:
    dev_id = add().dev_id
    ctl.set_params(dev_id, PARAMS)
    assert refusal(lambda: ctl.start_dev(dev_id, os.getpid(), timeout=0.3)) == errno.ETIMEDOUT
    assert ctl.get_info(dev_id).state_name == "dead"
    ctl.del_dev(dev_id)


def test_start_in_two_steps(ctl: Control, add: Callable[..., DeviceInfo]) -> None:
    dev_id = add().dev_id
    ctl.set_params(dev_id, PARAMS)
    op = ctl.begin_start_dev(dev_id, os.getpid())
    assert op.poll() is None
    assert ctl.get_info(dev_id).state_name == "dead"  # other commands run meanwhile
    assert op.cancel()
    # the latter if no thread of the kernel had begun with it yet
    assert refusal(op.poll) in (errno.EINTR, errno.ECANCELED)


def test_start_misused(ctl: Control, add: Callable[..., DeviceInfo]) -> None:
    dev_id = add().dev_id
    assert refusal(lambda: ctl.start_dev(dev_id, os.getpid(), timeout=2)) == errno.EINVAL  # no parameters
    ctl.set_params(dev_id, PARAMS)
    assert refusal(lambda: ctl.start_dev(dev_id, 0, timeout=2)) == errno.EINVAL


def test_a_device_that_never_started(ctl: Control, add: Callable[..., DeviceInfo]) -> None:
    plain, recoverable = add().dev_id, add(flags=uapi.F_USER_RECOVERY).dev_id
    ctl.stop_dev(plain)
    assert refusal(lambda: ctl.start_recovery(plain, timeout=0)) == errno.EINVAL
    # Kernels differ: some look first whether there ever was a server.
    assert refusal(lambda: ctl.start_recovery(recoverable, timeout=0)) in (errno.EBUSY, errno.EINVAL)
    assert refusal(lambda: ctl.end_recovery(plain, os.getpid(), timeout=0.3)) == errno.ETIMEDOUT
    features = ctl.get_features()
    if features.has("UPDATE_SIZE"):
        assert refusal(lambda: ctl.update_size(plain, SIZE)) == errno.ENODEV
    if features.has("SAFE_STOP_DEV"):
        assert refusal(lambda: ctl.try_stop(plain)) == errno.ENODEV


def test_commands_that_the_driver_lacks(ctl: Control, add: Callable[..., DeviceInfo]) -> None:
    dev_id = add().dev_id
    features = ctl.get_features()
    for flag, call in (
        ("UPDATE_SIZE", lambda: ctl.update_size(dev_id, SIZE)),
        ("QUIESCE", lambda: ctl.quiesce(dev_id, 1)),
        ("SAFE_STOP_DEV", lambda: ctl.try_stop(dev_id)),
        ("SHMEM_ZC", lambda: ctl.unreg_buf(dev_id, 0)),
    ):
        if not features.has(flag):
            assert refusal(call) == errno.EOPNOTSUPP, flag


@pytest.mark.parametrize(
    "name", ["get_info", "get_params", "stop_dev", "del_dev", "start_recovery", "begin_start_dev"]
)
def test_no_such_device(ctl: Control, name: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "start_recovery": lambda: ctl.start_recovery(NO_SUCH_DEVICE, timeout=0),
        "begin_start_dev": lambda: ctl.begin_start_dev(NO_SUCH_DEVICE, 1).wait(5),
    }
    call = calls.get(name, lambda: getattr(ctl, name)(NO_SUCH_DEVICE))
    with pytest.raises(DriverError) as caught:
        call()
    assert caught.value.errno == errno.ENODEV and "ublkd list" in caught.value.hint
    assert f"device {NO_SUCH_DEVICE}" in caught.value.message


def test_second_open_of_the_char_device(ctl: Control, add: Callable[..., DeviceInfo]) -> None:
    dev_id = add().dev_id
    fd = open_char(dev_id)
    assert refusal(lambda: open_char(dev_id, timeout=0.1)) == errno.EBUSY
    os.close(fd)
    os.close(open_char(dev_id))


def test_delete_while_held(ctl: Control, add: Callable[..., DeviceInfo]) -> None:
    dev_id = add().dev_id
    fd = open_char(dev_id)
    with pytest.raises(DriverError) as caught:
        ctl.del_dev(dev_id, timeout=0.3)
    assert caught.value.errno == errno.ETIMEDOUT and f"/dev/ublkc{dev_id}" in caught.value.hint
    assert os.getpid() in inventory.holders_of(dev_id)
    os.close(fd)
    deadline = time.monotonic() + 60
    with pytest.raises(DriverError) as caught:
        while time.monotonic() < deadline:  # the driver may take a moment to forget it
            ctl.get_info(dev_id)
    assert caught.value.errno == errno.ENODEV


def test_control_closed_with_a_command_under_way(add: Callable[..., DeviceInfo], ctl: Control) -> None:
    dev_id = add().dev_id
    ctl.set_params(dev_id, PARAMS)
    with Control() as other:
        other.begin_start_dev(dev_id, os.getpid())
    ctl.del_dev(dev_id)


def test_live_device(ctl: Control, serve: Callable[..., Server]) -> None:
    dev_id = serve().info.dev_id
    wait_for_node(path_of(dev_id), 5)
    info = ctl.get_info(dev_id)
    assert info.state_name == "live" and info.pid == os.getpid()
    devt, disk = ctl.get_params(dev_id).devt, os.stat(path_of(dev_id)).st_rdev
    assert devt is not None and (devt.disk_major, devt.disk_minor) == (os.major(disk), os.minor(disk))
    assert refusal(lambda: ctl.set_params(dev_id, PARAMS)) == errno.EACCES
    assert refusal(lambda: ctl.start_dev(dev_id, os.getpid(), timeout=2)) in (errno.EEXIST, errno.ETIMEDOUT)
    size = pathlib.Path(f"/sys/block/ublkb{dev_id}/size")
    assert int(size.read_text()) * 512 == SIZE
    features = ctl.get_features()
    if features.has("UPDATE_SIZE"):
        ctl.update_size(dev_id, SIZE // 2)
        assert int(size.read_text()) * 512 == SIZE // 2
    if features.has("SAFE_STOP_DEV"):
        with open(path_of(dev_id), "rb"):
            assert refusal(lambda: ctl.try_stop(dev_id)) == errno.EBUSY
        deadline = time.monotonic() + 60
        while True:  # udev may have it open for a moment
            try:
                ctl.try_stop(dev_id)
                break
            except DriverError as exc:
                assert exc.errno == errno.EBUSY and time.monotonic() < deadline
    else:
        ctl.stop_dev(dev_id)
    assert ctl.get_info(dev_id).state_name == "dead"
    assert not os.path.exists(path_of(dev_id))


def test_stop_that_hangs_is_abandoned(ctl: Control, serve: Callable[..., Server]) -> None:
    server = serve()
    dev_id = server.info.dev_id
    os.kill(server.pid, signal.SIGSTOP)
    reader = os.fork()
    if reader == 0:
        try:
            with open(path_of(dev_id), "rb", buffering=0) as disk:
                disk.read(4096)
        finally:
            os._exit(0)
    inflight = pathlib.Path(f"/sys/block/ublkb{dev_id}/inflight")
    deadline = time.monotonic() + 60
    while inflight.read_text().split()[0] == "0":
        assert time.monotonic() < deadline, "the read is not under way"
        time.sleep(0.01)
    assert refusal(lambda: ctl.stop_dev(dev_id, timeout=0.3)) == errno.ETIMEDOUT
    server.kill()
    os.waitpid(reader, 0)
    wait_for_state(ctl, dev_id, uapi.STATE_DEAD)


def test_recovery(ctl: Control, serve: Callable[..., Server]) -> None:
    server = serve(uapi.F_USER_RECOVERY | uapi.F_USER_RECOVERY_REISSUE)
    dev_id = server.info.dev_id
    server.kill()
    ctl.start_recovery(dev_id, timeout=40)
    assert refusal(lambda: ctl.end_recovery(dev_id, os.getpid(), timeout=0.3)) == errno.ETIMEDOUT
    second = Server(ctl, server.info, recover=True)
    try:
        assert ctl.get_info(dev_id).state_name == "live"
        with open(path_of(dev_id), "rb") as disk:
            assert disk.read(4096) == bytes(4096)
        ctl.stop_dev(dev_id)
    finally:
        second.kill()


def test_quiesce(ctl: Control, serve: Callable[..., Server]) -> None:
    if not ctl.get_features().has("QUIESCE"):
        pytest.skip("this driver has no QUIESCE")
    server = serve(uapi.F_USER_RECOVERY | uapi.F_QUIESCE)
    dev_id = server.info.dev_id
    ctl.quiesce(dev_id, 5)
    server.kill()
    wait_for_state(ctl, dev_id, uapi.STATE_QUIESCED)


def test_shared_buffers(ctl: Control, add: Callable[..., DeviceInfo]) -> None:
    if not ctl.get_features().has("SHMEM_ZC"):
        pytest.skip("this driver has no SHMEM_ZC")
    dev_id, without = add(flags=uapi.F_SHMEM_ZC).dev_id, add().dev_id
    length = 4 * mmap.PAGESIZE
    memory = mmap.mmap(-1, length)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    index = ctl.reg_buf(dev_id, address, length)
    ctl.unreg_buf(dev_id, index)
    assert refusal(lambda: ctl.unreg_buf(dev_id, index)) == errno.ENOENT
    assert refusal(lambda: ctl.reg_buf(dev_id, address + 1, length)) == errno.EINVAL
    assert refusal(lambda: ctl.reg_buf(without, address, length)) == errno.EOPNOTSUPP


def as_nobody(task: Callable[[], None]) -> None:
    """Run task in a child without privileges; it passes if task does."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            task()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.fixture
def open_to_all() -> Iterator[None]:
    """As a udev rule for unprivileged devices would have it."""
    mode = os.stat(uapi.CONTROL_PATH).st_mode & 0o777
    os.chmod(uapi.CONTROL_PATH, 0o666)
    yield
    os.chmod(uapi.CONTROL_PATH, mode)


def test_control_is_root_s(ctl: Control) -> None:
    def task() -> None:
        with pytest.raises(DriverError) as caught:
            Control()
        assert caught.value.errno == errno.EACCES and "run as root" in caught.value.hint

    as_nobody(task)


def test_privileged_devices_are_not_for_others(add: Callable[..., DeviceInfo], open_to_all: None) -> None:
    dev_id = add().dev_id

    def task() -> None:
        with Control() as ctl:
            for call in (
                lambda: ctl.add_dev(AddRequest()),
                lambda: ctl.get_info(dev_id),
                lambda: ctl.stop_dev(dev_id),
                lambda: ctl.del_dev(dev_id),
            ):
                with pytest.raises(DriverError) as caught:
                    call()
                assert caught.value.errno == errno.EPERM and "run as root" in caught.value.hint

    as_nobody(task)


def test_unprivileged_device(open_to_all: None) -> None:
    number_r, number_w = os.pipe()
    owned_r, owned_w = os.pipe()

    def chown() -> None:
        dev_id = int(os.read(number_r, 16))
        wait_for_node(char_path_of(dev_id), 5)
        os.chown(char_path_of(dev_id), NOBODY, NOBODY)
        os.write(owned_w, b"!")

    def task() -> None:
        with Control() as ctl:
            info = ctl.add_dev(AddRequest(flags=uapi.F_UNPRIVILEGED_DEV))
            assert (info.owner_uid, info.owner_gid, info.dropped) == (NOBODY, NOBODY, 0)
            os.write(number_w, str(info.dev_id).encode())
            os.read(owned_r, 1)
        with Control() as ctl:  # one that has not seen how the device was made
            ctl.set_params(info.dev_id, PARAMS)
            assert ctl.get_params(info.dev_id)._replace(devt=None) == PARAMS
            assert ctl.queue_affinity(info.dev_id, 0)
            with pytest.raises(DriverError) as caught:
                ctl.start_dev(info.dev_id, os.getpid(), timeout=0.3)
            assert caught.value.errno == errno.ETIMEDOUT
            ctl.stop_dev(info.dev_id)
            ctl.del_dev(info.dev_id)

    helper = threading.Thread(target=chown)
    helper.start()
    try:
        as_nobody(task)
    finally:
        os.write(number_w, b"0")  # ends the helper if the child did not get that far
        helper.join()
        for fd in (number_r, number_w, owned_r, owned_w):
            os.close(fd)


@pytest.fixture
def runtime(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setenv("UBLKD_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def entry_of(dev_id: int) -> dict[str, object]:
    entry = inventory.device(dev_id)
    assert entry is not None
    return entry


def test_list_without_a_server(add: Callable[..., DeviceInfo], runtime: pathlib.Path) -> None:
    ours, other = add(queues=1, depth=8).dev_id, add(server_flags=0).dev_id
    entry = entry_of(ours)
    assert {k: entry[k] for k in ("state", "owner", "served", "queues", "depth", "size")} == {
        "state": "dead",
        "owner": "ublkd",
        "served": False,
        "queues": 1,
        "depth": 8,
        "size": None,
    }
    assert entry_of(other)["owner"] == "other"
    assert {e["id"] for e in inventory.devices()} >= {ours, other}


def test_list_without_rights(serve: Callable[..., Server], runtime: pathlib.Path) -> None:
    dev_id = serve().info.dev_id

    def task() -> None:
        entry = entry_of(dev_id)
        assert (entry["state"], entry["size"], entry["block_size"]) == ("unknown", SIZE, 4096)

    as_nobody(task)


def test_remove_a_failed_start(ctl: Control, add: Callable[..., DeviceInfo], runtime: pathlib.Path) -> None:
    dev_id = add().dev_id
    inventory.remove_device(dev_id, 5)
    assert refusal(lambda: ctl.get_info(dev_id)) == errno.ENODEV


def test_remove_a_device_of_another_program(
    ctl: Control, add: Callable[..., DeviceInfo], runtime: pathlib.Path
) -> None:
    dev_id = add(server_flags=0).dev_id
    with pytest.raises(inventory.UblkdError, match="another program"):
        inventory.remove_device(dev_id, 5)
    ctl.get_info(dev_id)
    inventory.remove_device(dev_id, 5, force=True)
    assert refusal(lambda: ctl.get_info(dev_id)) == errno.ENODEV


def test_remove_a_device_whose_server_died(
    ctl: Control, serve: Callable[..., Server], runtime: pathlib.Path
) -> None:
    server = serve(uapi.F_USER_RECOVERY)
    dev_id = server.info.dev_id
    server.kill()
    wait_for_state(ctl, dev_id, uapi.STATE_QUIESCED)
    entry = entry_of(dev_id)
    assert (entry["state"], entry["served"], entry["owner"]) == ("quiesced", False, "ublkd")
    inventory.remove_device(dev_id, 10)
    assert refusal(lambda: ctl.get_info(dev_id)) == errno.ENODEV


def test_remove_ends_orphaned_workers(
    ctl: Control, serve: Callable[..., Server], runtime: pathlib.Path
) -> None:
    server = serve()
    dev_id = server.info.dev_id
    inventory.write_record(
        {
            "id": dev_id,
            "path": path_of(dev_id),
            "target": "null",
            "supervisor": {"pid": 2**22 - 1, "start_time": 1},
            "workers": [{"queue": 0, "pid": server.pid, "cpu": 0}],
        }
    )
    assert inventory.holders_of(dev_id) == [server.pid]
    inventory._end_orphans(dev_id, [server.pid, os.getpid()])
    assert os.waitpid(server.pid, 0)[1] == signal.SIGKILL
    server.pid = 0
    wait_for_state(ctl, dev_id, uapi.STATE_DEAD)
    inventory.remove_device(dev_id, 10)
    assert inventory.device(dev_id) is None


def test_removal_names_who_is_in_the_way(add: Callable[..., DeviceInfo], runtime: pathlib.Path) -> None:
    dev_id = add().dev_id
    fd = open_char(dev_id)
    try:
        with pytest.raises(DriverError) as caught:
            inventory.remove_device(dev_id, 0.3)
        assert f"held by process {os.getpid()}" in caught.value.hint
    finally:
        os.close(fd)
