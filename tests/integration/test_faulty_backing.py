# SPDX-License-Identifier: Apache-2.0
"""A backing that fails, lies, waits, or goes away: the application is told, the queues move on, nothing hangs."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lib import nfs
from lib.device import Device, cli, reap
from lib.mapped import Mapped
from lib.tools import MIB, fio_command, fio_result, forget, pwrite, read, sh, wait_until

SIZE = 64 * MIB
BAD, BAD_BYTES = 32 * MIB, MIB
BLOCK = os.urandom(4096)


@pytest.fixture
def mapped(raw_disk: str) -> Iterator[Callable[..., Mapped]]:
    """mapped(line, ...) -> a mapped device over the blank scratch disk, {disk} in the lines; removed in the end."""
    made: list[Mapped] = []
    sh("modprobe", "-a", "dm-mod", "dm-flakey", "dm-delay")

    def mapped(*lines: str) -> Mapped:
        made.append(Mapped(f"faulty{len(made)}", *lines))
        return made[-1]

    yield mapped
    for each in made:
        each.remove()


@pytest.fixture
def far(files: Path, tmp_path: Path) -> Iterator[Callable[[str], tuple[nfs.Server, Path]]]:
    """far(mount options) -> an NFS server behind a cable, and a sparse file on it. For one of them."""
    made: list[nfs.Server] = []
    near = tmp_path / "near"

    def far(options: str) -> tuple[nfs.Server, Path]:
        near.mkdir()
        with open(files / "disk.img", "wb") as file:
            file.truncate(SIZE)
        made.append(nfs.Server(files, near, options))
        return made[0], near / "disk.img"

    yield far
    for each in made:
        each.close()


def linear(disk: str, start: int = 0, length: int = SIZE) -> str:
    """A table's line: bytes of the disk, as they are."""
    return f"{start // 512} {length // 512} linear {disk} {start // 512}"


def with_bad_region(disk: str, line: str) -> list[str]:
    """A table with another kind of target in the middle."""
    after = BAD + BAD_BYTES
    return [linear(disk, 0, BAD), f"{BAD // 512} {BAD_BYTES // 512} {line}", linear(disk, after, SIZE - after)]


def failing_writes(disk: str) -> str:
    """A table's line: reads work, writes and flushes fail."""
    return f"0 {SIZE // 512} flakey {disk} 0 0 3600 1 error_writes"


def dropping_writes(disk: str) -> str:
    """A table's line: reads work, writes and flushes are acknowledged, and that is all."""
    return f"0 {SIZE // 512} flakey {disk} 0 0 3600 1 drop_writes"


def direct(path: str, offset: int, data: bytes | None = None) -> bytes:
    """Read 4096 bytes past the page cache, or write them."""
    page = mmap.mmap(-1, 4096)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        if data is None:
            assert os.preadv(fd, [page], offset) == 4096
        else:
            page[:] = data
            assert os.pwritev(fd, [page], offset) == 4096
        return bytes(page)
    finally:
        os.close(fd)
        page.close()


def flush(path: str) -> int:
    """fsync by somebody who has just opened it: 0 or the errno."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        return 0
    except OSError as e:
        return e.errno or -1
    finally:
        os.close(fd)


def on_each_queue(device: Device) -> Iterator[int]:
    """This process on a CPU of one queue after the other: the queue's number."""
    before = os.sched_getaffinity(0)
    try:
        for queue in range(device.record["queues"]):
            cpus = read(f"/sys/block/{device.name}/mq/{queue}/cpu_list").split(",")
            if cpus[0]:
                os.sched_setaffinity(0, {int(cpus[0])})
                yield queue
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def fio_elsewhere(device: Device, **more: object) -> Iterator[None]:
    """fio writes and verifies on sound parts meanwhile, and must not notice anything."""
    job = {"rw": "randwrite", "bs": "8k", "iodepth": 8, "size": 2 * MIB, **more}
    jobs = [{**job, "offset": at * MIB} for at in (0, 40)]
    process = subprocess.Popen(
        fio_command(device.path, *jobs), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield
        out = process.communicate(timeout=100)[0]
        assert process.returncode == 0, out[:2000]
        fio_result(out)
    finally:
        process.kill()
        process.wait()


def test_a_bad_region_fails_alone(
    mapped: Callable[..., Mapped], serve: Callable[..., Device], raw_disk: str
) -> None:
    """Errors on all queues, while other requests on the same queues are served; and it is over when it is over."""
    below = mapped(*with_bad_region(raw_disk, "error"))
    device = serve("loop", below.path)
    workers = device.workers()
    with fio_elsewhere(device):
        for _queue in on_each_queue(device):
            for data in (None, BLOCK):
                with pytest.raises(OSError) as error:
                    direct(device.path, BAD + 8192, data)
                assert error.value.errno == errno.EIO
    assert device.workers() == workers and device.state == "live"
    wait_until(lambda: {e["op"] for e in device.said("requests failed")} == {"read", "write"}, "the log tells of it")
    assert len(device.said("requests failed")) == 2, "once of each"
    below.load(linear(raw_disk))
    direct(device.path, BAD + 8192, BLOCK)
    assert direct(device.path, BAD + 8192) == BLOCK


@pytest.mark.parametrize("mode", ["on", "off"])
def test_a_failed_flush_is_told_on_every_queue(
    mode: str, mapped: Callable[..., Mapped], serve: Callable[..., Device], raw_disk: str
) -> None:
    """What was written through each queue is not on the disk: each queue's next flush has to say so.

    Through the page cache the error is found once, when pages are written back. It must not be used up by
    the first queue that asks.
    """
    below = mapped(linear(raw_disk))
    device = serve("loop", below.path, direct=mode)
    for queue in on_each_queue(device):
        direct(device.path, queue * MIB, BLOCK)
        assert flush(device.path) == 0
    for queue in on_each_queue(device):
        direct(device.path, queue * MIB + 4096, BLOCK)
    before = [queue["ops"]["flush"]["errors"] for queue in device.snapshot()["queues"]]
    below.load(failing_writes(raw_disk))
    told = {queue: flush(device.path) for queue in on_each_queue(device)}
    assert told == {queue: errno.EIO for queue in told}, "a flush succeeded, and the data is not there"
    after = [queue["ops"]["flush"]["errors"] for queue in device.snapshot()["queues"]]
    assert all(after[queue] > before[queue] for queue in told), "not each flush was one of its own queue"
    wait_until(lambda: any(e["op"] == "flush" for e in device.said("requests failed")), "the log tells of it")
    below.load(linear(raw_disk))
    for queue in on_each_queue(device):
        direct(device.path, queue * MIB + 4096, BLOCK)
        assert flush(device.path) == 0, "the disk is well again"
    forget(device.path)
    device.stop()
    assert all(direct(below.path, queue * MIB + 4096) == BLOCK for queue in told)


def test_a_durable_write_that_fails_says_so(
    mapped: Callable[..., Mapped], serve: Callable[..., Device], raw_disk: str
) -> None:
    below = mapped(linear(raw_disk))
    device = serve("loop", below.path, direct="off")
    page = mmap.mmap(-1, 4096)
    fd = os.open(device.path, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
    try:
        assert os.pwritev(fd, [page], 0) == 4096
        below.load(failing_writes(raw_disk))
        with pytest.raises(OSError) as error:
            os.pwritev(fd, [page], 4096)
        assert error.value.errno == errno.EIO
    finally:
        os.close(fd)
        below.load(linear(raw_disk))
    page.close()


def test_a_file_system_on_a_failing_disk_is_told(
    mapped: Callable[..., Mapped], serve: Callable[..., Device], raw_disk: str, tmp_path: Path
) -> None:
    below = mapped(linear(raw_disk))
    device = serve("loop", below.path)
    sh("mkfs.ext4", "-qF", "-E", "lazy_itable_init=0,lazy_journal_init=0", device.path)
    sh("mount", "-o", "errors=remount-ro", device.path, tmp_path)
    try:
        pwrite_new(tmp_path / "before", BLOCK)
        below.load(failing_writes(raw_disk))
        with pytest.raises(OSError):
            pwrite_new(tmp_path / "after", BLOCK)
    finally:
        below.load(linear(raw_disk))
        sh("umount", tmp_path)
    sh("mount", device.path, tmp_path)
    try:
        assert (tmp_path / "before").read_bytes() == BLOCK
    finally:
        sh("umount", tmp_path)
    sh("e2fsck", "-fy", device.path, status=None)
    sh("e2fsck", "-fn", device.path)


def pwrite_new(path: Path, data: bytes) -> None:
    path.touch()
    pwrite(path, data, 0)


def test_a_slow_region_holds_nobody_else_up(
    mapped: Callable[..., Mapped], serve: Callable[..., Device], raw_disk: str
) -> None:
    below = mapped(*with_bad_region(raw_disk, f"delay {raw_disk} {BAD // 512} 8000"))
    device = serve("loop", below.path, queues=1)
    late: list[bytes] = []
    slow = threading.Thread(target=lambda: late.append(direct(device.path, BAD)))
    slow.start()
    wait_until(lambda: device.snapshot()["queues"][0]["in_flight"] == 1, "the slow request is under way")
    for at in range(20):
        direct(device.path, at * 4096, BLOCK)
    assert not late, "the others came after it"
    slow.join()
    assert late == [bytes(4096)]


def test_a_backing_that_stops_answering_is_waited_for(
    mapped: Callable[..., Mapped], serve: Callable[..., Device], raw_disk: str
) -> None:
    """It is not taken for a hang of ours: nobody is killed, and all ends well when it goes on."""
    below = mapped(linear(raw_disk))
    device = serve("loop", below.path, hang_timeout=1, on_hang="recover")
    workers = device.workers()
    below.suspend()
    try:
        done: list[bytes] = []
        readers = [
            threading.Thread(target=lambda at=at: done.append(direct(device.path, at * MIB)))  # type: ignore[misc]
            for at in range(8)
        ]
        for reader in readers:
            reader.start()
        wait_until(lambda: device.said("the backing does not answer"), "the log tells of it", 60)
        assert not done
    finally:
        below.resume()
    for reader in readers:
        reader.join()
    assert done == [bytes(4096)] * 8
    assert device.workers() == workers


@pytest.mark.parametrize("mode", ["on", "off"])
def test_dropped_writes_are_what_a_reader_finds(
    mode: str, mapped: Callable[..., Mapped], serve: Callable[..., Device], raw_disk: str
) -> None:
    """A disk that lies can't be found out from above: no error is made up, and what it does have is what is read."""
    below = mapped(linear(raw_disk))
    device = serve("loop", below.path, direct=mode)
    workers, other = device.workers(), os.urandom(4096)
    for queue in on_each_queue(device):
        direct(device.path, queue * MIB, BLOCK)
    assert flush(device.path) == 0
    below.load(dropping_writes(raw_disk))
    for queue in on_each_queue(device):
        direct(device.path, queue * MIB, other)
        assert flush(device.path) == 0
    forget(below.path)
    for queue in on_each_queue(device):
        assert direct(device.path, queue * MIB) == direct(below.path, queue * MIB) == BLOCK
    below.load(linear(raw_disk))
    for queue in on_each_queue(device):
        direct(device.path, queue * MIB, other)
        assert flush(device.path) == 0
    forget(below.path)
    for queue in on_each_queue(device):
        assert direct(device.path, queue * MIB) == direct(below.path, queue * MIB) == other
    assert device.workers() == workers and not device.said("requests failed")


HARD = "hard,timeo=20,retrans=1"


@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.time_limit(400)
def test_a_network_file_system_that_goes_away_is_waited_for(
    mode: str,
    far: Callable[[str], tuple[nfs.Server, Path]],
    serve: Callable[..., Device],
    raw_memory: Device,
) -> None:
    """Nothing else waits with it, nobody is killed for it, and all ends well when it is back."""
    server, backing = far(HARD)
    device = serve("loop", backing, direct=mode, hang_timeout=1, on_hang="recover")
    workers = device.workers()
    with fio_elsewhere(device, rate_iops=40, fsync=8):
        wait_until(lambda: device.ios("write") > 20, "fio writes")
        server.pull()
        try:
            wait_until(lambda: device.said("the backing does not answer"), "the log tells of it", 120)
            direct(raw_memory.path, 0, BLOCK)
            assert direct(raw_memory.path, 0) == BLOCK
            for verb in ("list", "stat", "show"):
                told = cli(verb, *([] if verb == "list" else [device.id]))
                assert told.status == 0 and device.path in told.out, told
        finally:
            server.plug()
    wait_until(lambda: device.said("the backing answers again"), "the log tells of it")
    assert device.workers() == workers and device.record["recoveries"] == 0
    assert not device.said("requests failed")


@pytest.fixture
def raw_memory(serve: Callable[..., Device]) -> Device:
    """A device that has nothing to do with the other."""
    return serve("memory", size=4 * MIB, queues=1)


@pytest.mark.time_limit(400)
def test_a_worker_that_dies_while_the_network_is_away(
    far: Callable[[str], tuple[nfs.Server, Path]], serve: Callable[..., Device]
) -> None:
    """Its successors come when what it had begun has ended, and do it again."""
    server, backing = far(HARD)
    device = serve("loop", backing)
    workers = device.workers()
    with fio_elsewhere(device, rate_iops=40):
        wait_until(lambda: device.ios("write") > 20, "fio writes")
        server.pull()
        try:
            wait_until(lambda: device.under_way() >= 2, "requests wait", 120)
            os.kill(workers[0], signal.SIGKILL)
        finally:
            server.plug()
        device.await_replacement(workers, workers[0], 120)
    assert device.record["recoveries"] > 0 and not device.said("requests failed")


@pytest.mark.parametrize(
    ("options", "number"), [("soft,timeo=10,retrans=1", errno.EIO), ("softerr,timeo=10,retrans=1", errno.ETIMEDOUT)]
)
@pytest.mark.time_limit(400)
def test_a_network_file_system_that_gives_up_says_so(
    options: str, number: int, far: Callable[[str], tuple[nfs.Server, Path]], serve: Callable[..., Device]
) -> None:
    """The application hears of it, the log once of each kind; the queues go on, and removal needs no server."""
    server, backing = far(options)
    device = serve("loop", backing, direct="on", hang_timeout=30)
    workers = device.workers()
    direct(device.path, 0, BLOCK)
    server.pull()
    for _queue in on_each_queue(device):
        for data in (None, BLOCK):
            with pytest.raises(OSError) as error:
                direct(device.path, MIB, data)
            assert error.value.errno == number
    wait_until(lambda: {"read", "write"} <= {e["op"] for e in device.said("requests failed")}, "the log tells of it")
    ops = [e["op"] for e in device.said("requests failed")]
    assert len(ops) == len(set(ops)), "once of each"
    assert device.workers() == workers and device.state == "live"
    server.plug()
    for queue in on_each_queue(device):
        wait_until(lambda at=queue: works(device, at * MIB), "the server answers again", 120)  # type: ignore[misc]
    server.pull()
    device.stop(force=True)
    assert device.state == "gone"


def works(device: Device, offset: int) -> bool:
    """A write succeeds and is read back; an error is no failure yet."""
    try:
        direct(device.path, offset, BLOCK)
        return direct(device.path, offset) == BLOCK
    except OSError:
        return False


@pytest.mark.parametrize("how", ["SIGTERM", "del --force"])
@pytest.mark.time_limit(400)
def test_removal_while_the_network_is_away(
    how: str, far: Callable[[str], tuple[nfs.Server, Path]], serve: Callable[..., Device]
) -> None:
    """It may wait for the server as long as it takes; once that is back nothing stays."""
    server, backing = far(HARD)
    device = serve("loop", backing, direct="on")
    direct(device.path, 0, BLOCK)
    server.pull()
    ended: list[object] = []

    def write() -> None:
        try:
            ended.append(direct(device.path, MIB, BLOCK))
        except OSError as e:
            ended.append(e.errno)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        wait_until(lambda: device.under_way(), "the write is under way")
        device.gone = True
        if how == "SIGTERM":
            os.kill(device.supervisor, signal.SIGTERM)
            wait_until(lambda: device.said("still draining; a second signal ends it"), "it says what it does", 120)
            assert not ended
        else:
            done = cli("del", device.id, "--force")
            assert done.status == 0 or len(done.err.splitlines()) == 1, done.err
    finally:
        server.plug()
    writer.join()
    status = reap(device.supervisor)
    wait_until(lambda: device.state == "gone", "the device is gone", 120)
    if how == "SIGTERM":
        assert status == 0 and ended == [BLOCK]
        assert direct(str(backing), MIB) == BLOCK
    assert direct(str(backing), 0) == BLOCK


def test_a_full_file_system(serve: Callable[..., Device], tmp_path: Path) -> None:
    """No space left is what the application hears, and what it gets back once there is some."""
    place = tmp_path / "small"
    place.mkdir()
    sh("mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", place)
    try:
        backing = place / "disk.img"
        with open(backing, "wb") as file:
            file.truncate(SIZE)
        device = serve("loop", backing)
        direct(device.path, 0, BLOCK)
        with open(place / "ballast", "wb") as file:
            file.write(bytes(4 * MIB))
        told = set()
        for at in range(0, 8 * MIB, 64 << 10):
            try:
                for part in range(0, 64 << 10, 4096):
                    direct(device.path, MIB + at + part, BLOCK)
            except OSError as e:
                told.add(e.errno)
                break
        assert told == {errno.ENOSPC}
        assert direct(device.path, 0) == BLOCK and device.state == "live"
        (place / "ballast").unlink()
        direct(device.path, 16 * MIB, BLOCK)
        assert flush(device.path) == 0
        device.stop()
    finally:
        sh("umount", place)


@pytest.mark.parametrize("mode", ["on", "off"])
def test_a_file_cut_short(mode: str, serve: Callable[..., Device], image: Callable[..., Path]) -> None:
    backing = image(SIZE)
    device = serve("loop", backing, direct=mode)
    direct(device.path, MIB, BLOCK)
    direct(device.path, 48 * MIB, BLOCK)
    os.truncate(backing, SIZE // 2)
    with pytest.raises(OSError) as error:
        direct(device.path, 48 * MIB)
    assert error.value.errno == errno.EIO
    assert direct(device.path, MIB) == BLOCK
    os.truncate(backing, SIZE)
    assert direct(device.path, 48 * MIB) == bytes(4096)


def test_a_deleted_file_is_served_to_the_end(
    serve: Callable[..., Device], image: Callable[..., Path]
) -> None:
    """A worker may even die; a new supervisor can't find it, says so, and the device stays as it is."""
    backing = image(SIZE)
    device = serve("loop", backing)
    direct(device.path, MIB, BLOCK)
    backing.unlink()
    old = device.workers()
    os.kill(old[1], 9)
    device.await_replacement(old, old[1])
    assert direct(device.path, MIB) == BLOCK
    direct(device.path, 2 * MIB, BLOCK)
    assert flush(device.path) == 0
    device.kill_supervisor()
    refused = cli("recover", device.id)
    assert refused.status != 0 and f"the backing file {backing} does not exist" in refused.err
    assert device.state == "quiesced"
    removed = cli("del", device.id)
    assert removed.status == 0, removed.err
    device.gone = True
