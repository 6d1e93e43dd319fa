# SPDX-License-Identifier: Apache-2.0
"""Control against a driver made of Python: encodings, errors, time-outs, unprivileged devices."""

import errno
import os
import signal
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from ublkd import native
from ublkd.control import uapi
from ublkd.control.commands import SERVER_FLAGS, AddRequest, Control, DeviceInfo
from ublkd.control.params import Basic, Params
from ublkd.control.uapi import Command
from ublkd.errors import DriverError, UsageError, errno_of

FEATURES_6_12 = 0x1FE


class Driver:
    """A driver as old or new as told; never blocks unless a command is in `stuck`."""

    def __init__(self, features: int | None = FEATURES_6_12, encoded: bool = True, bare: bool = True) -> None:
        self.features = features
        self.encoded = encoded
        self.bare = bare
        self.devices: dict[int, DeviceInfo] = {}
        self.params: dict[int, bytes] = {}
        self.stuck: set[Command] = set()
        self.deaf = False  # does not react to a cancel
        self.fail: dict[Command, list[int]] = {}
        self.seen: list[tuple[int, int]] = []
        self.rings: list[Ring] = []

    def answer(
        self, op: int, dev_id: int, queue: int, buf: bytearray | None, data0: int, path_len: int
    ) -> int:
        self.seen.append((op, dev_id))
        if (op > 0xFF and not self.encoded) or (op <= 0xFF and not self.bare):
            return -errno.EOPNOTSUPP if self.encoded else -errno.ENODEV
        nr = op & 0xFF
        if nr == Command.GET_FEATURES and self.features is not None:
            assert buf is not None
            struct.pack_into("=Q", buf, 0, self.features)
            return 0
        if self.fail.get(Command(nr)):
            return self.fail[Command(nr)].pop(0)
        if nr == Command.ADD_DEV:
            assert buf is not None and queue == 0xFFFF
            wish = DeviceInfo.unpack(buf)
            if dev_id in self.devices:
                return -errno.EEXIST
            number = (
                dev_id if dev_id != uapi.DEV_ID_AUTO else next(n for n in range(99) if n not in self.devices)
            )
            granted = wish._replace(dev_id=number, flags=wish.flags & (self.features or 0x1E))
            self.devices[number] = granted
            buf[:] = granted.pack()
            return 0
        info = self.devices.get(dev_id)
        if info is None:
            return -errno.ENODEV
        if info.flags & uapi.F_UNPRIVILEGED_DEV or nr == Command.GET_DEV_INFO2:
            path = f"/dev/ublkc{dev_id}\0".encode()
            if buf is None or path_len != len(path) or buf[:path_len] != path:
                return -errno.EINVAL
        if nr in (Command.GET_DEV_INFO, Command.GET_DEV_INFO2):
            assert buf is not None and len(buf) >= path_len + 64
            buf[path_len:] = info.pack()
        elif nr == Command.SET_PARAMS:
            assert buf is not None
            self.params[dev_id] = bytes(buf[path_len:])
        elif nr == Command.GET_PARAMS:
            assert buf is not None and struct.unpack_from("=I", buf, path_len) == (152,)
            buf[path_len:] = self.params[dev_id]
        elif nr == Command.GET_QUEUE_AFFINITY:
            assert buf is not None and queue == data0
            struct.pack_into("=Q", buf, path_len, 0b101 << queue)
        elif nr in (Command.DEL_DEV, Command.DEL_DEV_ASYNC):
            del self.devices[dev_id]
        elif nr == Command.START_DEV and data0 <= 0:
            return -errno.EINVAL
        return 0


class Ring:
    """Stands in for native.ControlRing."""

    driver: Driver

    def __init__(self, control_fd: int) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.result: int | None = None
        self.busy = self.closed = False
        self.driver.rings.append(self)

    def fileno(self) -> int:
        return self.fd

    def submit(
        self, op: int, dev_id: int, queue: int, buf: bytearray | None, data0: int, path_len: int
    ) -> None:
        assert not self.busy and not self.closed
        self.busy = True
        if Command(op & 0xFF) in self.driver.stuck:
            self.driver.seen.append((op, dev_id))
            return
        self.finish(self.driver.answer(op, dev_id, queue, buf, data0, path_len))

    def finish(self, result: int) -> None:
        self.result = result
        os.eventfd_write(self.fd, 1)

    def wait(self, timeout: float) -> int | None:
        assert self.busy and timeout == 0
        if self.result is None:
            return None
        os.eventfd_read(self.fd)
        result, self.result, self.busy = self.result, None, False
        return result

    def cancel(self) -> None:
        if self.busy and self.result is None and not self.driver.deaf:
            self.finish(-errno.EINTR)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            os.close(self.fd)


MakeControl = Callable[..., Control]


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> Iterator[MakeControl]:
    Ring.driver = driver
    monkeypatch.setattr(native, "ControlRing", Ring)
    opened: list[Control] = []

    def make(timeout: float = 5.0) -> Control:
        opened.append(Control("/dev/null", timeout))
        return opened[-1]

    yield make
    for ctl in opened:
        ctl.close()
    assert all(ring.closed for ring in driver.rings)


def test_device_life(control: MakeControl, driver: Driver) -> None:
    ctl = control()
    info = ctl.add_dev(AddRequest(queues=2, depth=64, flags=uapi.F_USER_COPY | uapi.F_AUTO_BUF_REG))
    assert (info.dev_id, info.queues, info.depth, info.server_flags) == (0, 2, 64, SERVER_FLAGS)
    assert info.flags == uapi.F_USER_COPY and info.dropped == uapi.F_AUTO_BUF_REG
    params = Params(Basic(1 << 20))
    ctl.set_params(0, params)
    assert ctl.get_params(0) == params
    assert ctl.queue_affinity(0, 1) == {1, 3}
    ctl.start_dev(0, os.getpid())
    assert ctl.get_info(0).flags == uapi.F_USER_COPY
    ctl.stop_dev(0)
    ctl.del_dev(0)
    assert not driver.devices
    assert len(driver.rings) == 1
    assert all(op > 0xFF for op, _ in driver.seen)


@pytest.mark.parametrize(
    "old",
    [
        Driver(features=None, encoded=False),  # 6.1: bare numbers only
        Driver(features=None),  # 6.4: both, but GET_FEATURES is not known yet
        Driver(bare=False),  # a kernel without the legacy opcodes
    ],
    ids=["bare", "both", "encoded"],
)
def test_every_encoding(control: MakeControl, old: Driver) -> None:
    Ring.driver = old
    ctl = control()
    assert ctl.get_features().assumed == (old.features is None)
    dev_id = ctl.add_dev(AddRequest()).dev_id
    ctl.start_dev(dev_id, 1)
    assert ctl.get_info(dev_id).dev_id == dev_id
    ctl.del_dev(dev_id)
    with pytest.raises(DriverError) as caught:
        ctl.stop_dev(dev_id)
    assert caught.value.errno == errno.ENODEV
    # What has been learnt is kept: no command goes out twice.
    assert sum(op & 0xFF == Command.START_DEV for op, _ in old.seen) == 1


def test_a_fresh_control_finds_the_encoding_before_a_long_command(control: MakeControl) -> None:
    old = Driver(features=None, encoded=False)
    Ring.driver = old
    dev_id = control().add_dev(AddRequest()).dev_id
    old.seen.clear()
    control().start_dev(dev_id, 1)
    assert old.seen[-1] == (Command.START_DEV, dev_id)
    assert [op for op, _ in old.seen].count(Command.START_DEV) == 1


def test_number_in_use(control: MakeControl) -> None:
    ctl = control()
    ctl.add_dev(AddRequest(dev_id=3))
    with pytest.raises(DriverError) as caught:
        ctl.add_dev(AddRequest(dev_id=3))
    error = caught.value
    assert (error.command, error.dev_id, error.errno) == ("ADD_DEV", 3, errno.EEXIST)
    assert error.message == "ADD_DEV for device 3: File exists (EEXIST)"
    assert "ublkd list" in error.hint and errno_of(error) == errno.EEXIST


def test_long_command_in_two_steps(control: MakeControl, driver: Driver) -> None:
    ctl = control()
    ctl.add_dev(AddRequest())
    driver.stuck.add(Command.START_DEV)
    op = ctl.begin_start_dev(0, 1)
    assert op.poll() is None and ctl.fileno() == op.fileno() >= 0
    assert ctl.get_info(0).dev_id == 0  # others run meanwhile
    driver.rings[0].finish(0)
    assert op.poll() == 0 and op.poll() == 0
    assert op.fileno() == ctl.fileno() == -1


def test_long_command_that_fails(control: MakeControl, driver: Driver) -> None:
    ctl = control()
    ctl.add_dev(AddRequest())
    driver.stuck.add(Command.START_DEV)
    op = ctl.begin_start_dev(0, 1)
    driver.rings[0].finish(-errno.EINVAL)
    with pytest.raises(DriverError, match="START_DEV for device 0"):
        op.poll()


def test_timed_out_command_is_cancelled(control: MakeControl, driver: Driver) -> None:
    ctl = control()
    ctl.add_dev(AddRequest())
    driver.stuck.add(Command.START_DEV)
    with pytest.raises(DriverError) as caught:
        ctl.start_dev(0, 1, timeout=0.05)
    assert caught.value.errno == errno.ETIMEDOUT
    assert "no answer within 0.05 s" in caught.value.message and "workers" in caught.value.hint
    ctl.del_dev(0)
    assert len(driver.rings) == 1  # its ring could be used again


def test_ring_of_a_deaf_command_is_abandoned(control: MakeControl, driver: Driver) -> None:
    ctl = control()
    ctl.add_dev(AddRequest())
    driver.stuck.add(Command.STOP_DEV)
    driver.deaf = True
    with pytest.raises(DriverError) as caught:
        ctl.stop_dev(0, timeout=0.05)
    assert caught.value.errno == errno.ETIMEDOUT
    assert driver.rings[0].closed
    assert ctl.get_info(0).dev_id == 0 and len(driver.rings) == 2


def test_poll_after_abandonment_says_so(control: MakeControl, driver: Driver) -> None:
    ctl = control()
    ctl.add_dev(AddRequest())
    driver.stuck.add(Command.STOP_DEV)
    driver.deaf = True
    op = ctl.begin_stop_dev(0)
    assert not op.cancel(grace=0)
    with pytest.raises(DriverError) as caught:
        op.poll()
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_signal_ends_the_wait_and_the_command(control: MakeControl, driver: Driver) -> None:
    ctl = control()
    ctl.add_dev(AddRequest())
    driver.stuck.add(Command.STOP_DEV)

    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGUSR1, stop)
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGUSR1))
    try:
        timer.start()
        with pytest.raises(Stop):
            ctl.stop_dev(0, timeout=30)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, before)
    assert not any(ring.busy for ring in driver.rings)


def test_unprivileged_device_gets_its_path(control: MakeControl, driver: Driver) -> None:
    ctl = control()
    ctl.add_dev(AddRequest(dev_id=5, flags=uapi.F_UNPRIVILEGED_DEV))
    other = control()  # has not seen the device being made
    params = Params(Basic(1 << 20))
    for each in (ctl, other):
        each.set_params(5, params)
        assert each.get_params(5) == params
        assert each.queue_affinity(5, 0) == {0, 2}
    other.start_dev(5, 1)
    other.del_dev(5)
    assert not driver.devices


def test_recovery_waits_for_the_old_server(control: MakeControl, driver: Driver) -> None:
    ctl = control()
    ctl.add_dev(AddRequest())
    driver.fail[Command.START_USER_RECOVERY] = [-errno.EBUSY, -errno.EBUSY]
    ctl.start_recovery(0)
    driver.fail[Command.START_USER_RECOVERY] = [-errno.EBUSY]
    with pytest.raises(DriverError) as caught:
        ctl.start_recovery(0, timeout=0)
    assert caught.value.errno == errno.EBUSY and "/dev/ublkc0" in caught.value.hint


def test_advice_for_missing_rights(control: MakeControl, driver: Driver) -> None:
    ctl = control()
    driver.fail[Command.ADD_DEV] = [-errno.EPERM]
    with pytest.raises(DriverError) as caught:
        ctl.add_dev(AddRequest())
    assert caught.value.hint == "needs CAP_SYS_ADMIN: run as root"


def test_missing_control_node() -> None:
    with pytest.raises(DriverError) as caught:
        Control("/dev/no-such-ublk-control")
    assert caught.value.message == "open /dev/no-such-ublk-control: missing (ENOENT)"
    assert "modprobe ublk_drv" in caught.value.hint


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (AddRequest(queues=0), "0 queues"),
        (AddRequest(queues=4097), "4097 queues"),
        (AddRequest(depth=4097), "depth 4097"),
        (AddRequest(max_io_bytes=512), "largest request 512"),
        (AddRequest(max_io_bytes=64 << 20), "largest request"),
        (AddRequest(flags=uapi.F_USER_RECOVERY_REISSUE), "recovery"),
        (AddRequest(flags=7 << 3 | uapi.F_USER_RECOVERY_FAIL_IO), "recovery"),
        (AddRequest(flags=uapi.F_QUIESCE), "QUIESCE needs USER_RECOVERY"),
        (AddRequest(flags=uapi.F_SHARDS), "SHARDS needs USER_RECOVERY"),
        (AddRequest(flags=uapi.F_ZONED), "ZONED needs SUPPORT_ZERO_COPY or USER_COPY"),
        (AddRequest(flags=uapi.F_INTEGRITY), "INTEGRITY needs USER_COPY"),
    ],
)
def test_bad_requests_never_reach_the_driver(
    control: MakeControl, driver: Driver, request_: AddRequest, says: str
) -> None:
    ctl = control()
    with pytest.raises(UsageError) as caught:
        ctl.add_dev(request_)
    assert says in caught.value.message
    assert all(op & 0xFF != Command.ADD_DEV for op, _ in driver.seen)


def test_size_in_whole_sectors(control: MakeControl) -> None:
    ctl = control()
    for size in (0, -512, 1000):
        with pytest.raises(UsageError, match="multiple of 512"):
            ctl.update_size(0, size)


def test_closed_control(control: MakeControl) -> None:
    ctl = control()
    ctl.close()
    ctl.close()
    with pytest.raises(ValueError, match="closed"):
        ctl.get_info(0)


def test_device_info_on_the_wire() -> None:
    info = DeviceInfo(7, 4, 128, uapi.STATE_QUIESCED, 1 << 19, -1, 0x1FE, SERVER_FLAGS, 1000, 100)
    data = info.pack()
    assert len(data) == 64
    assert struct.unpack_from("=HHH", data) == (4, 128, 2)
    assert struct.unpack_from("=IIi", data, 8) == (1 << 19, 7, -1)
    assert struct.unpack_from("=QQII", data, 24) == (0x1FE, SERVER_FLAGS, 1000, 100)
    assert DeviceInfo.unpack(data) == info and info.state_name == "quiesced"


@pytest.mark.parametrize(
    ("exc", "number"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError(), errno.EIO),
        (OSError(0, "nothing"), errno.EIO),
        (OSError(-errno.ENOSPC, "sign"), errno.ENOSPC),
        (OSError(99999, "unknown"), errno.EIO),
        (ValueError("bad"), errno.EIO),
        (MemoryError(), errno.ENOMEM),
        (TimeoutError(), errno.ETIMEDOUT),
        (NotImplementedError(), errno.EOPNOTSUPP),
        (KeyboardInterrupt(), errno.EIO),
    ],
)
def test_errno_of_any_exception(exc: BaseException, number: int) -> None:
    assert errno_of(exc) == number
