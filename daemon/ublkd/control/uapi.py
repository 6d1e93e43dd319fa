# SPDX-License-Identifier: Apache-2.0
"""Numbers and layouts of the ublk interface: kernel_module/uapi/ublk.h in Python."""

from enum import IntEnum
from struct import Struct
from typing import NamedTuple

CONTROL_PATH = "/dev/ublk-control"

QUEUE_NONE = 0xFFFF
DEV_ID_AUTO = 0xFFFFFFFF
MAX_QUEUES = 4096
MAX_DEPTH = 4096
MAX_IO_BYTES = 32 << 20  # one request's room in the offset of a user copy
SECTOR = 512


class Command(IntEnum):
    """Numbers of control commands."""

    GET_QUEUE_AFFINITY = 0x01
    GET_DEV_INFO = 0x02
    ADD_DEV = 0x04
    DEL_DEV = 0x05
    START_DEV = 0x06
    STOP_DEV = 0x07
    SET_PARAMS = 0x08
    GET_PARAMS = 0x09
    START_USER_RECOVERY = 0x10
    END_USER_RECOVERY = 0x11
    GET_DEV_INFO2 = 0x12
    GET_FEATURES = 0x13
    DEL_DEV_ASYNC = 0x14
    UPDATE_SIZE = 0x15
    QUIESCE_DEV = 0x16
    TRY_STOP_DEV = 0x17
    REG_BUF = 0x18
    UNREG_BUF = 0x19
    GET_QUEUE_STATES = 0x60  # ublkd's own driver


_IOC_WRITE, _IOC_READ = 1, 2
# Declared with _IOR; all others with _IOWR.
_READ_ONLY = {
    Command.GET_QUEUE_AFFINITY,
    Command.GET_DEV_INFO,
    Command.GET_PARAMS,
    Command.GET_DEV_INFO2,
    Command.GET_FEATURES,
    Command.DEL_DEV_ASYNC,
    Command.GET_QUEUE_STATES,
}

CTRL_CMD = Struct("=IHHQQHHI")
DEV_INFO = Struct("=HHHHIIiIQQIIQQ")
SHMEM_BUF_REG = Struct("=QQII")
QUEUE_STATE = Struct("=IiIHH")

QUEUE_ORPHANED = 0  # the first of ublk_queue_state's states

# struct ublk_params: a header, then these at fixed offsets.
PARAMS_BYTES = 152
PARAMS_HEADER = Struct("=II")
BASIC = Struct("=IBBBBIIQQ")
DISCARD = Struct("=IIIIHH")
DEVT = Struct("=IIII")
ZONED = Struct("=III20x")
DMA_ALIGN = Struct("=I4x")
SEGMENT = Struct("=QIH2x")
INTEGRITY = Struct("=IHBBBBB5x")
BASIC_OFFSET = 8
DISCARD_OFFSET = 40
DEVT_OFFSET = 60
ZONED_OFFSET = 76
DMA_ALIGN_OFFSET = 108
SEGMENT_OFFSET = 120  # 4 bytes of padding before it
INTEGRITY_OFFSET = 136

TYPE_BASIC = 1
TYPE_DISCARD = 2
TYPE_DEVT = 4
TYPE_ZONED = 8
TYPE_DMA_ALIGN = 16
TYPE_SEGMENT = 32
TYPE_INTEGRITY = 64

ATTR_READ_ONLY = 1
ATTR_ROTATIONAL = 2
ATTR_VOLATILE_CACHE = 4
ATTR_FUA = 8

SHMEM_BUF_READ_ONLY = 1

STATE_DEAD, STATE_LIVE, STATE_QUIESCED, STATE_FAIL_IO = range(4)
STATE_NAMES = {STATE_DEAD: "dead", STATE_LIVE: "live", STATE_QUIESCED: "quiesced", STATE_FAIL_IO: "fail-io"}

F_SUPPORT_ZERO_COPY = 1 << 0
F_URING_CMD_COMP_IN_TASK = 1 << 1
F_NEED_GET_DATA = 1 << 2
F_USER_RECOVERY = 1 << 3
F_USER_RECOVERY_REISSUE = 1 << 4
F_UNPRIVILEGED_DEV = 1 << 5
F_CMD_IOCTL_ENCODE = 1 << 6
F_USER_COPY = 1 << 7
F_ZONED = 1 << 8
F_USER_RECOVERY_FAIL_IO = 1 << 9
F_UPDATE_SIZE = 1 << 10
F_AUTO_BUF_REG = 1 << 11
F_QUIESCE = 1 << 12
F_PER_IO_DAEMON = 1 << 13
F_BUF_REG_OFF_DAEMON = 1 << 14
F_BATCH_IO = 1 << 15
F_INTEGRITY = 1 << 16
F_SAFE_STOP_DEV = 1 << 17
F_NO_AUTO_PART_SCAN = 1 << 18
F_SHMEM_ZC = 1 << 19
F_SHARDS = 1 << 48  # ublkd's own driver


class Flag(NamedTuple):
    """A device flag. `since` is the first Linux release known to have it."""

    value: int
    doc: str
    since: str


FLAGS = {
    "SUPPORT_ZERO_COPY": Flag(
        F_SUPPORT_ZERO_COPY, "request pages as registered buffers of the server", "6.15"
    ),
    "URING_CMD_COMP_IN_TASK": Flag(F_URING_CMD_COMP_IN_TASK, "completions go through task work", "6.0"),
    "NEED_GET_DATA": Flag(F_NEED_GET_DATA, "a write's buffer is named after its request was seen", "6.0"),
    "USER_RECOVERY": Flag(F_USER_RECOVERY, "the device outlives its server, I/O waits", "6.1"),
    "USER_RECOVERY_REISSUE": Flag(F_USER_RECOVERY_REISSUE, "what a dead server held goes to the next", "6.1"),
    "UNPRIVILEGED_DEV": Flag(F_UNPRIVILEGED_DEV, "devices of users without CAP_SYS_ADMIN", "6.3"),
    "CMD_IOCTL_ENCODE": Flag(F_CMD_IOCTL_ENCODE, "ioctl-encoded commands", "6.4"),
    "USER_COPY": Flag(F_USER_COPY, "the server copies data by pread and pwrite", "6.5"),
    "ZONED": Flag(F_ZONED, "zoned devices", "6.6"),
    "USER_RECOVERY_FAIL_IO": Flag(F_USER_RECOVERY_FAIL_IO, "I/O fails while there is no server", "6.13"),
    "UPDATE_SIZE": Flag(F_UPDATE_SIZE, "the size of a live device can change", "6.16"),
    "AUTO_BUF_REG": Flag(F_AUTO_BUF_REG, "buffers are registered by fetch and commit themselves", "6.16"),
    "QUIESCE": Flag(F_QUIESCE, "a live device can be taken from its server", "6.16"),
    "PER_IO_DAEMON": Flag(F_PER_IO_DAEMON, "each tag belongs to the task that fetched it", "6.16"),
    "BUF_REG_OFF_DAEMON": Flag(F_BUF_REG_OFF_DAEMON, "any task may register a request's buffer", "6.17"),
    "BATCH_IO": Flag(F_BATCH_IO, "one command fetches or commits many tags", "7.0"),
    "INTEGRITY": Flag(F_INTEGRITY, "integrity data beside the data", "7.0"),
    "SAFE_STOP_DEV": Flag(F_SAFE_STOP_DEV, "a stop that refuses while the disk is open", "7.0"),
    "NO_AUTO_PART_SCAN": Flag(F_NO_AUTO_PART_SCAN, "a start without a partition scan", "7.0"),
    "SHMEM_ZC": Flag(F_SHMEM_ZC, "no copy from memory that client and server share", "7.1"),
    "SHARDS": Flag(F_SHARDS, "queues of a device have servers of their own", "ublkd's driver"),
}


def encoded(command: Command) -> int:
    """The ioctl-style opcode of a command number."""
    direction = _IOC_READ if command in _READ_ONLY else _IOC_READ | _IOC_WRITE
    return direction << 30 | CTRL_CMD.size << 16 | ord("u") << 8 | command


def flag_names(flags: int) -> list[str]:
    """Names of the set bits, lowest first; an unknown one as BIT_n."""
    known = {flag.value: name for name, flag in FLAGS.items()}
    return [known.get(1 << bit, f"BIT_{bit}") for bit in range(flags.bit_length()) if flags >> bit & 1]
