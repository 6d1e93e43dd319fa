# SPDX-License-Identifier: Apache-2.0
"""Which devices there are: what the kernel knows, joined with the records that supervisors leave.

Any process may call this, root or not; who may not ask the driver sees what
/sys and the records tell. `ublkd list` runs it, so it imports the driver's side
only when there is a device to ask about.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import re
import signal
import time
from typing import TYPE_CHECKING, Any

from ublkd.errors import DriverError, UblkdError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublkd.control.commands import DeviceInfo

FORMAT = 1
SYS = "/sys"
PROC = "/proc"
SHM_DIR = "/dev/shm"

_RECORD_NAME = re.compile(r"(\d+)\.json")
# What a record must have, with its type; the rest is shown if it is there.
_REQUIRED: dict[str, type] = {"id": int, "path": str, "target": str, "supervisor": dict, "boot_id": str}


class RecordError(UblkdError):
    """A record that can't be used: truncated, foreign, or of another version."""


# Records


def runtime_dir() -> str:
    """Where records live: $UBLKD_RUNTIME_DIR or /run/ublkd."""
    return os.environ.get("UBLKD_RUNTIME_DIR") or "/run/ublkd"


def record_path(dev_id: int) -> str:
    """The record's file."""
    return os.path.join(runtime_dir(), f"{dev_id}.json")


def boot_id() -> str:
    """Of the running kernel, for the record."""
    with open(f"{PROC}/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def write_record(record: dict[str, Any]) -> None:
    """Write the record of device record["id"], all or nothing. `format` and `boot_id` are filled in."""
    record = {"format": FORMAT, "boot_id": boot_id(), **record}
    path = record_path(record["id"])
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    new = f"{path}.{os.getpid()}.new"
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        with os.fdopen(fd, "w") as file:
            os.fchmod(file.fileno(), 0o644)
            json.dump(record, file, indent=1)
            file.write("\n")
        os.rename(new, path)
    except BaseException:
        _unlink(new)
        raise


def read_record(dev_id: int) -> dict[str, Any] | None:
    """The device's record, None if there is none; RecordError if it can't be used."""
    path = record_path(dev_id)
    try:
        with open(path) as file:
            record = json.load(file)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise RecordError(f"record {path}: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:  # bad JSON, and bytes that are no text
        raise RecordError(f"record {path} is damaged", "`ublkd cleanup` removes it") from exc
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise RecordError(f"record {path} is not of this version of ublkd", "`ublkd cleanup` removes it")
    for key, kind in _REQUIRED.items():
        if not isinstance(record.get(key), kind):
            raise RecordError(f"record {path} has no usable {key}", "`ublkd cleanup` removes it")
    supervisor = record["supervisor"]
    # Without its start time a number could be anybody's by now, and it is who `del` sends a signal to.
    identity = all(type(supervisor.get(key)) is int for key in ("pid", "start_time"))
    if record["id"] != dev_id or not identity:
        raise RecordError(f"record {path} does not describe device {dev_id}", "`ublkd cleanup` removes it")
    return record


def remove_record(dev_id: int) -> None:
    """Remove it, if it is there, and what a process that was killed had not finished: records and sockets to be."""
    path = record_path(dev_id)
    unfinished = [*glob.glob(f"{glob.escape(path)}.*.new"), *glob.glob(f"{glob.escape(runtime_dir())}/{dev_id}.sock.*")]
    for each in (path, *unfinished):
        _unlink(each)


def records() -> list[dict[str, Any]]:
    """All usable records, by device number, those of dead supervisors and previous boots included."""
    found = []
    for dev_id in _record_ids():
        try:
            record = read_record(dev_id)
        except RecordError:
            continue
        if record is not None:
            found.append(record)
    return found


# Processes


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot: with its pid, its identity. None if it is gone."""
    try:
        with open(f"{PROC}/{pid}/stat") as file:
            # The name in parentheses may hold anything, parentheses and blanks too.
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if len(fields) < 20 or fields[0] in "ZX" else int(fields[19])


def alive(pid: int, start_time_ticks: int | None) -> bool:
    """Whether that very process lives. Without a start time, whether the number is in use."""
    now = start_time(pid) if pid > 0 else None
    return now is not None and start_time_ticks in (None, now)


# Devices


def devices() -> list[dict[str, Any]]:
    """All devices, by number. What is unknown is None; `note` says what is odd, if anything."""
    kernel = _kernel_ids()
    ids = sorted(kernel | set(_record_ids()))
    infos = _ask_driver(sorted(kernel))
    this_boot = boot_id() if ids else ""
    return [_describe(dev_id, dev_id in kernel, infos.get(dev_id), this_boot) for dev_id in ids]


def device(dev_id: int) -> dict[str, Any] | None:
    """One entry of devices()."""
    exists = dev_id in _kernel_ids()
    if not exists and dev_id not in _record_ids():
        return None
    infos = _ask_driver([dev_id] if exists else [])
    return _describe(dev_id, exists, infos.get(dev_id), boot_id())


def remove_device(dev_id: int, timeout: float = 30.0, force: bool = False) -> None:
    """Stop and delete a device that nobody serves, with its record and files.

    A device of another program only with force, and then even if it is served.
    timeout is in seconds, for each of the two commands.
    """
    entry = device(dev_id)
    if entry is None:
        raise UblkdError(f"there is no device {dev_id}", "see `ublkd list`")
    if entry["owner"] == "other" and not force:
        raise UblkdError(f"device {dev_id} was made by another program", "--force deletes it all the same")
    if entry["owner"] == "ublkd" and entry["served"]:
        raise UblkdError(f"device {dev_id} is being served by process {entry['supervisor']}", "stop it first")
    if entry["state"] != "gone":
        if entry["owner"] == "ublkd":
            _end_orphans(dev_id, [worker["pid"] for worker in entry["workers"]])
        _stop_and_delete(dev_id, entry["state"], timeout)
    for path in _leftovers(dev_id):
        _unlink(path)
    remove_record(dev_id)


def cleanup() -> list[str]:
    """Remove records and shared memory of devices that no longer exist: what was removed, a line each."""
    kernel = _kernel_ids()
    this_boot = boot_id()
    removed = []
    for dev_id in _record_ids():
        reason = ""
        try:
            record = read_record(dev_id)
        except RecordError as exc:
            reason = exc.message
        else:
            if record is None or (record["boot_id"] == this_boot and _supervisor_lives(record)):
                continue
            if record["boot_id"] != this_boot:
                reason = f"record {record_path(dev_id)} is of a previous boot"
            elif dev_id not in kernel:
                reason = f"record {record_path(dev_id)}: the device is gone"
        if reason:
            remove_record(dev_id)
            removed.append(reason)
    known = kernel | set(_record_ids())
    for path in sorted(glob.glob(f"{SHM_DIR}/ublkd-*")):
        match = re.fullmatch(r"ublkd-(\d+)([.-].*)?", os.path.basename(path))
        if match and int(match[1]) not in known:
            _unlink(path)
            removed.append(f"{path}: its device is gone")
    return removed


# Parts of an entry


def _describe(dev_id: int, exists: bool, info: DeviceInfo | None, this_boot: str) -> dict[str, Any]:
    record, note = _usable_record(dev_id, this_boot)
    owner = _owner(record, info)
    if owner == "other":
        record = None
    supervisor = record["supervisor"]["pid"] if record is not None and _supervisor_lives(record) else None
    known: dict[str, Any] = record or {}
    sys_dir = f"{SYS}/class/block/ublkb{dev_id}"
    disk = exists and os.path.isdir(sys_dir)

    if info is not None:
        state = info.state_name
        if supervisor is None and state == "live" and alive(info.pid, None):
            supervisor = info.pid
    elif not exists:
        state = "gone"
    elif not disk:
        state = "dead"
    else:
        state = "live" if supervisor is not None else "unknown"

    size, block_size, read_only = known.get("size"), known.get("block_size"), known.get("read_only")
    if disk:
        sectors = _sys_int(f"{sys_dir}/size")
        size = size if sectors is None else sectors * 512
        block_size = _sys_int(f"{sys_dir}/queue/logical_block_size") or block_size
        ro = _sys_int(f"{sys_dir}/ro")
        read_only = read_only if ro is None else bool(ro)
    return {
        "id": dev_id,
        "path": f"/dev/ublkb{dev_id}",
        "state": state,
        "served": supervisor is not None and state in ("live", "unknown"),
        "target": known.get("target"),
        "backing": known.get("backing"),
        "size": size,
        "queues": info.queues if info is not None else known.get("queues"),
        "depth": info.depth if info is not None else known.get("depth"),
        "block_size": block_size,
        "read_only": read_only,
        "transport": known.get("transport") or (_transport(info.flags) if info is not None else None),
        "flags": info.flags if info is not None else known.get("flags"),
        "version": known.get("version"),
        "on_crash": known.get("on_crash"),
        "recoveries": known.get("recoveries"),
        "supervisor": supervisor,
        "workers": _workers(known),
        "details": known.get("details") or {},
        "owner": owner,
        "note": note,
    }


def _usable_record(dev_id: int, this_boot: str) -> tuple[dict[str, Any] | None, str | None]:
    """The record, if it is of this boot, and what is wrong with it."""
    try:
        record = read_record(dev_id)
    except RecordError as exc:
        return None, exc.message
    if record is not None and record["boot_id"] != this_boot:
        return None, "its record is of a previous boot"
    return record, record.get("failed") if record is not None else None


def _owner(record: dict[str, Any] | None, info: DeviceInfo | None) -> str:
    """The driver's word counts for more than a record: the number may have found another user since."""
    if info is None:
        return "ublkd" if record is not None else "other"
    from ublkd.control.commands import SERVER_FLAGS

    return "ublkd" if info.server_flags == SERVER_FLAGS else "other"


def _workers(record: dict[str, Any]) -> list[dict[str, Any]]:
    listed = record.get("workers")
    if not isinstance(listed, list):
        return []
    return [w for w in listed if isinstance(w, dict) and isinstance(w.get("pid"), int)]


def _transport(flags: int) -> str:
    from ublkd.control import uapi

    if flags & (uapi.F_AUTO_BUF_REG | uapi.F_SUPPORT_ZERO_COPY):
        return "zero-copy"
    if flags & uapi.F_USER_COPY:
        return "user-copy"
    return "copy"


def _supervisor_lives(record: dict[str, Any]) -> bool:
    supervisor = record["supervisor"]
    ticks = supervisor.get("start_time")
    return alive(supervisor["pid"], ticks if isinstance(ticks, int) else None)


def _kernel_ids() -> set[int]:
    """Numbers of the devices that the driver has."""
    try:
        names = os.listdir(f"{SYS}/class/ublk-char")
    except OSError:
        names = [os.path.basename(path) for path in glob.glob("/dev/ublkc*")]
    return {int(name[5:]) for name in names if name.startswith("ublkc") and name[5:].isdigit()}


def _record_ids() -> list[int]:
    try:
        names = os.listdir(runtime_dir())
    except OSError:
        return []
    return sorted(int(match[1]) for name in names if (match := _RECORD_NAME.fullmatch(name)))


def _ask_driver(ids: list[int]) -> dict[int, DeviceInfo]:
    """What the driver says about these devices, as far as this process may ask and gets an answer."""
    if not ids or not os.access("/dev/ublk-control", os.R_OK | os.W_OK):
        return {}
    from ublkd.control.commands import Control

    infos = {}
    try:
        with Control(timeout=2.0) as ctl:
            for dev_id in ids:
                try:
                    infos[dev_id] = ctl.get_info(dev_id)
                except DriverError:
                    continue
    except DriverError:
        pass
    return infos


def _sys_int(path: str) -> int | None:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


# Removal


def _stop_and_delete(dev_id: int, state: str, timeout: float) -> None:
    from ublkd.control.commands import Control

    with Control(timeout=timeout) as ctl:
        try:
            if state != "dead":
                _tolerate_absence(lambda: ctl.stop_dev(dev_id))
            _tolerate_absence(lambda: ctl.del_dev(dev_id))
        except DriverError as exc:
            holders = holders_of(dev_id)
            if holders:
                exc.hint = f"held by process {', '.join(map(str, holders))}; {exc.hint}".rstrip("; ")
            raise


def _tolerate_absence(command: Callable[[], None]) -> None:
    try:
        command()
    except DriverError as exc:
        if exc.errno != errno.ENODEV:
            raise


def holders_of(dev_id: int) -> list[int]:
    """Processes that have /dev/ublkcN open or mapped, as far as this process may look."""
    node = f"/dev/ublkc{dev_id}"
    return [int(name) for name in os.listdir(PROC) if name.isdigit() and _holds(int(name), node)]


def _holds(pid: int, node: str) -> bool:
    # A deleted device's node is shown with a suffix.
    names = (node, f"{node} (deleted)")
    try:
        with os.scandir(f"{PROC}/{pid}/fd") as entries:
            for entry in entries:
                try:
                    if os.readlink(entry.path) in names:
                        return True
                except OSError:
                    continue
        with open(f"{PROC}/{pid}/maps", errors="replace") as file:
            return any(line.rstrip("\n").endswith(names) for line in file)
    except OSError:
        return False


def _end_orphans(dev_id: int, pids: list[int]) -> None:
    """Kill workers that outlived their supervisor: while one holds the device, it can't go."""
    node = f"/dev/ublkc{dev_id}"
    orphans = [pid for pid in pids if pid != os.getpid() and _holds(pid, node)]
    for pid in orphans:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            continue
    deadline = time.monotonic() + 5
    while any(_holds(pid, node) for pid in orphans) and time.monotonic() < deadline:
        time.sleep(0.01)


def _leftovers(dev_id: int) -> list[str]:
    """Files of a device that is gone: those its record names, and shared memory that is named after it."""
    named: object = None
    try:
        named = (read_record(dev_id) or {}).get("files")
    except RecordError:
        pass
    listed = named if isinstance(named, list) else []
    ours = (SHM_DIR, runtime_dir())
    return [
        *(path for path in listed if isinstance(path, str) and os.path.dirname(path) in ours),
        f"{runtime_dir()}/{dev_id}.log",
        f"{runtime_dir()}/{dev_id}.sock",
        f"{SHM_DIR}/ublkd-{dev_id}",
        *glob.glob(f"{SHM_DIR}/ublkd-{dev_id}[.-]*"),
    ]


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass
