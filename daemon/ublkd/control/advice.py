# SPDX-License-Identifier: Apache-2.0
"""What to do next when the driver refuses a command."""

import errno

from ublkd.control.uapi import Command
from ublkd.errors import DriverError

ROOT = "needs CAP_SYS_ADMIN: run as root"
LOAD_DRIVER = (
    "load the driver with `modprobe ublk_drv` (Linux 6.0 or newer, CONFIG_BLK_DEV_UBLK), "
    "or build ours with `make -C kernel_module`"
)

_NO_DISK = "the device has no disk: it has not started, or has stopped"
_NOT_SERVED = "not every queue is served: see what its workers say"
_IN_FLIGHT = "requests are in flight: try again; new I/O is held back until then"

_ANY = {
    errno.EPERM: ROOT,
    errno.EACCES: "only root and the owner of the device may do this",
    errno.ENODEV: "there is no such device: see `ublkd list`",
    errno.EOPNOTSUPP: "this kernel's driver does not know the command: see `ublkd features`",
}

_BY_COMMAND = {
    Command.ADD_DEV: {
        errno.EEXIST: "the number is in use: see `ublkd list`, or ask for none to get a free one",
        errno.EACCES: "the limit of unprivileged devices is reached: see ublks_max of ublk_drv",
        errno.ENOMEM: "not enough memory: ask for fewer queues or less depth",
        errno.ENOSPC: "no device number is left: see `ublkd list`",
        errno.EINVAL: "this driver refuses the flags or sizes: see `ublkd features`",
    },
    Command.SET_PARAMS: {
        errno.EACCES: "parameters can be set only before the device starts",
        errno.EINVAL: "this kernel refuses a block size, a limit, or a feature it lacks",
    },
    Command.START_DEV: {
        errno.EINVAL: "parameters are missing, or the pid is not that of the server",
        errno.EEXIST: "the device has started already",
        errno.ETIMEDOUT: _NOT_SERVED,
    },
    Command.STOP_DEV: {
        errno.ETIMEDOUT: "requests are not being answered: end the processes that serve the device",
    },
    Command.TRY_STOP_DEV: {
        errno.EBUSY: "the disk is open: unmount it and close its users first",
        errno.ENODEV: _NO_DISK,
    },
    Command.DEL_DEV: {
        errno.ETIMEDOUT: "it is deleted, but its number stays taken while /dev/ublkc{id} is open or mapped",
    },
    Command.UPDATE_SIZE: {errno.ENODEV: _NO_DISK},
    Command.START_USER_RECOVERY: {
        errno.EBUSY: "end every process that still has /dev/ublkc{id} open or mapped",
        errno.EINVAL: "the device was made without recovery, or never started: delete it and make it anew",
    },
    Command.END_USER_RECOVERY: {
        errno.EBUSY: "recovery has not begun, or the device is live",
        errno.ETIMEDOUT: _NOT_SERVED,
    },
    Command.QUIESCE_DEV: {errno.EBUSY: _IN_FLIGHT, errno.ETIMEDOUT: _IN_FLIGHT},
    Command.UNREG_BUF: {errno.ENOENT: "no buffer has this index"},
}


def driver_error(command: Command, dev_id: int, number: int, reason: str = "") -> DriverError:
    """The error for a command that ended with errno `number`."""
    hint = _BY_COMMAND.get(command, {}).get(number) or _ANY.get(number, "")
    return DriverError(command.name, dev_id, number, hint.replace("{id}", str(dev_id)), reason)
