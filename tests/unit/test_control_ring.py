# SPDX-License-Identifier: Apache-2.0
"""The control ring itself, without ublk: the null device answers any command with 0, zero refuses."""

import errno
import os
from collections.abc import Iterator

import pytest

from ublkd import native


@pytest.fixture
def ring() -> Iterator[native.ControlRing]:
    fd = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    try:
        ring = native.ControlRing(fd)
    except OSError as exc:
        pytest.skip(f"no io_uring here: {exc.strerror}")
    ring.submit(1, 0)
    if ring.wait(5) != 0:
        pytest.skip("this kernel's /dev/null takes no commands")
    yield ring
    ring.close()
    os.close(fd)


def test_commands_one_after_another(ring: native.ControlRing) -> None:
    buf = bytearray(b"ublk" * 16)
    for _ in range(20):  # more than the ring has entries
        ring.submit(0xC0207504, 3, buf=buf)
        assert ring.wait(5) == 0
    assert buf == b"ublk" * 16


def test_misuse_is_refused(ring: native.ControlRing) -> None:
    with pytest.raises(OSError, match="no control command is outstanding"):
        ring.wait(0)
    ring.submit(1, 0)
    with pytest.raises(OSError, match="still outstanding") as caught:
        ring.submit(1, 0)
    assert caught.value.errno == errno.EBUSY
    assert ring.wait(5) == 0
    ring.cancel()  # nothing to cancel


def test_a_cancel_after_the_end_does_not_hit_the_next_command(ring: native.ControlRing) -> None:
    for _ in range(10):
        ring.submit(1, 0)
        ring.cancel()
        assert ring.wait(5) == 0


def test_a_child_can_only_close_it(ring: native.ControlRing) -> None:
    ring.submit(1, 0)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            refused = 0
            for call in (lambda: ring.submit(1, 0), lambda: ring.wait(0), ring.cancel):
                try:
                    call()
                except OSError as exc:
                    refused += exc.errno == errno.EPERM
            ring.close()
            status = 0 if refused == 3 else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert ring.wait(5) == 0


def test_a_file_that_takes_no_commands() -> None:
    with open("/dev/zero", "r+b", buffering=0) as file:
        try:
            ring = native.ControlRing(file.fileno())
        except OSError as exc:
            pytest.skip(f"no io_uring here: {exc.strerror}")
        ring.submit(1, 0)
        assert ring.wait(5) == -errno.EOPNOTSUPP
        ring.close()
        ring.close()
