# SPDX-License-Identifier: Apache-2.0
"""What the command line, scripts and ublkd.serve() do with devices. Each call raises UblkdError."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

from ublkd import inventory, log, targets
from ublkd.errors import DriverError, UblkdError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ublkd.config.schema import DeviceSpec
    from ublkd.targets.base import ControlTarget


# Whoever uses a disk for no longer than this does not keep it from being removed; udev opens it for as long as its
# queue and the backing take, whenever somebody has closed it.
_PASSER_BY_S = 1.0
_UDEV_S = 10.0
_UDEV = ("(systemd-udevd)", "((udev-worker))", "(udevd)")
_LOOK_AGAIN_S = 0.1
_MOST_FDS = 1 << 20


def make_target(spec: DeviceSpec) -> ControlTarget:
    """The control side of spec's target, checked by itself; nothing is opened."""
    cls = targets.get(spec.target)
    cls.check(spec)
    return cls(spec)


def _checked(spec: DeviceSpec) -> None:
    """What a user can get wrong that the spec alone doesn't show."""
    from ublkd.config.schema import check_cpus

    if spec.cpus:
        check_cpus(spec.cpus)
    if spec.number >= 0 and os.path.exists(f"/dev/ublkc{spec.number}"):
        raise UsageError(
            f"device number {spec.number} is in use", hint="see `ublkd list`, or give none to get a free one"
        )


def _orphan_of(spec: DeviceSpec) -> dict[str, Any] | None:
    """The record of a device that spec asks for and whose server died: one to take over, not to make anew.

    It is known by its number, or by its file if no number is given.
    """
    for record in inventory.records():
        settings = record.get("settings")
        if not isinstance(settings, dict) or record["boot_id"] != inventory.boot_id() or _is_served(record):
            continue
        if spec.number != record["id"] if spec.number >= 0 else not spec.file or spec.number != settings.get("number"):
            continue
        if spec.target == record["target"] and spec.file == settings.get("file"):
            return record
    return None


def _take_over(spec: DeviceSpec) -> int | None:
    """The number of the device to recover instead of making one. What a failed device left is removed."""
    record = _orphan_of(spec)
    if record is None:
        return None
    dev_id: int = record["id"]
    state = (inventory.device(dev_id) or {}).get("state", "gone")
    if state in ("dead", "gone"):
        if record.get("files"):
            raise UblkdError(
                f"device {dev_id} failed and holds data",
                hint=f"`ublkd del {dev_id}` removes it with its data",
            )
        inventory.remove_device(dev_id)
        return None
    before = _spec_of(record)
    from ublkd.config.schema import SETTINGS

    for name, setting in SETTINGS.items():
        if setting.scope != "hot" and name != "number" and getattr(spec, name) != getattr(before, name):
            raise UsageError(
                f"{record['path']} serves this already, waits for its server, and has another {name}: "
                f"{setting.shown(getattr(before, name))}",
                hint=f"`ublkd recover {dev_id}` serves it again as it was, `ublkd del {dev_id}` removes it",
            )
    return dev_id


def run_foreground(
    spec: DeviceSpec,
    *,
    target: ControlTarget | None = None,
    on_live: Callable[[dict[str, Any]], None] | None = None,
    recover_id: int | None = None,
    origin: dict[str, Any] | None = None,
    background: bool = False,
) -> int:
    """Serve a device until a signal to stop: exit status. The path goes to stdout once the device is live.

    A device of the same target and file, or number, whose server died is taken over. origin, {"config": path or
    None, "given": {...}}, is where the settings come from: SIGHUP reads the file again.
    """
    from ublkd.supervisor.supervisor import Supervisor

    if recover_id is None:
        recover_id = _take_over(spec)
    if recover_id is None:
        _checked(spec)

    def announce(record: dict[str, Any]) -> None:
        print(record["path"], flush=True)

    supervisor = Supervisor(
        spec,
        target or make_target(spec),
        recover_id=recover_id,
        on_live=on_live or announce,
        origin=origin,
        background=background,
    )
    status = supervisor.run()
    if supervisor.successor and not background and not os.environ.get("NOTIFY_SOCKET"):
        # Whoever started this process takes its end for the end of the device.
        return _outlive(supervisor.dev_id, supervisor.successor)
    return status


def _outlive(dev_id: int, successor: int) -> int:
    from ublkd import native
    from ublkd.supervisor import handover

    native.adopt_orphans()

    def current() -> int | None:
        record = inventory.read_record(dev_id)
        return record["supervisor"]["pid"] if record else None

    return handover.outlive(successor, current)


def run_background(
    spec: DeviceSpec, *, recover_id: int | None = None, origin: dict[str, Any] | None = None
) -> str:
    """As run_foreground(), from a process of its own: the path, once it is live."""
    if recover_id is None:
        recover_id = _take_over(spec)
    if recover_id is None:
        _checked(spec)
    sys.stdout.flush()
    sys.stderr.flush()
    result_r, result_w = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(result_r)
        _background(spec, recover_id, origin, result_w)
    os.close(result_w)
    try:
        with open(result_r, "rb") as pipe:
            answer = pipe.readline()  # not to its end: the workers inherit the other side
    except BaseException:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        raise
    result: dict[str, Any] = {"error": "the supervisor died before the device was live"}
    if answer:
        result = json.loads(answer)
    if "path" in result:
        path: str = result["path"]
        if result["remark"]:
            print(f"ublkd: note: {result['remark']}", file=sys.stderr)
        return path
    os.waitpid(pid, 0)
    error = UblkdError(result["error"], hint=result.get("hint", ""))
    error.exit_status = result.get("status", 1)
    raise error


def log_path(dev_id: int | str) -> str:
    """Where the supervisor of a device in the background writes its events."""
    return os.path.join(inventory.runtime_dir(), f"{dev_id}.log")


def _answer(fd: int, **result: object) -> None:
    os.write(fd, json.dumps(result).encode() + b"\n")


def _background(
    spec: DeviceSpec, recover_id: int | None, origin: dict[str, Any] | None, result_fd: int
) -> NoReturn:
    """The supervisor's own process. Only the outcome of the start goes back to whoever asked for the device."""
    from ublkd.supervisor.supervisor import explain

    status, live, handed_over, dev_id = 1, False, False, -1
    log_file = ""
    try:
        os.setsid()
        os.chdir("/")
        # Nothing of our caller's is ours; an open disk that we then serve would keep itself in use.
        os.closerange(3, result_fd)
        os.closerange(result_fd + 1, _MOST_FDS)
        log_file = log_path(f"starting-{os.getpid()}")
        null = os.open(os.devnull, os.O_RDWR)
        try:
            os.makedirs(os.path.dirname(log_file), mode=0o755, exist_ok=True)
            out = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o640)
        except PermissionError:
            # What else this user may not do says more than a log that can't be had.
            log_file, out = "", os.dup(null)
        for fd, to in ((null, 0), (out, 1), (out, 2)):
            os.dup2(fd, to)
        os.close(null)
        os.close(out)
        log.setup(spec.log_level, spec.log_format)

        def on_live(record: dict[str, Any]) -> None:
            nonlocal live, log_file, dev_id
            live, dev_id = True, record["id"]
            if log_file:
                os.rename(log_file, log_path(record["id"]))
                log_file = log_path(record["id"])
            _answer(result_fd, path=record["path"], remark=record["remark"])
            os.close(result_fd)

        status = run_foreground(spec, on_live=on_live, recover_id=recover_id, origin=origin, background=True)
        handed_over = live and _served_by_another(dev_id)
        if not live:
            _answer(result_fd, error="stopped before the device was live")
    except BaseException as e:
        if live:
            hint = getattr(e, "hint", "") or None
            known = isinstance(e, UblkdError)
            log.get(device=dev_id).error("the supervisor failed", reason=str(e), hint=hint, exc_info=not known)
        else:
            _answer(result_fd, **explain(e))
        status = getattr(e, "exit_status", 1)
    finally:
        # Without a device there is nothing to read about; one that was given up keeps its log.
        if log_file and not handed_over and (status == 0 or not live):
            try:
                os.unlink(log_file)
            except OSError:
                pass
        os._exit(status)


def _served_by_another(dev_id: int) -> bool:
    record = inventory.read_record(dev_id)
    return record is not None and bool(record["supervisor"]["pid"] != os.getpid())


def plan(spec: DeviceSpec) -> dict[str, Any]:
    """What run or add would do with spec. Opens and checks what is behind the device; makes none."""
    from ublkd.control import uapi
    from ublkd.control.commands import Control
    from ublkd.supervisor import create, placement

    _checked(spec)
    target = make_target(spec)
    limits = target.open()
    try:
        out: dict[str, Any] = {
            "target": spec.target,
            "backing": target.backing(),
            "queues": spec.queues,
            "workers_per_queue": spec.workers_per_queue,
            "depth": spec.depth,
            "max_io_size": spec.max_io_size,
            **limits._asdict(),
            **target.details(),
        }
        # The queues' own masks are known only once there is a device; any CPU stands in for them.
        topo = placement.topology()
        masks = [set(topo) for _ in range(spec.queues * spec.workers_per_queue)]
        out["cpus"] = placement.place(masks, spec.cpus, topo)
        try:
            with Control() as ctl:
                features = ctl.get_features()
            out["transport"] = create.choose_transport(spec, target, features)
            out["max_io_size"] = create.max_io_bytes(spec, out["transport"])
            out["flags"] = uapi.flag_names(create.choose_flags(spec, target, out["transport"], features))
        except UblkdError as e:
            if isinstance(e, UsageError):
                raise
            out["driver"] = f"{e.message} ({e.hint})" if e.hint else e.message
        return out
    finally:
        target.close(discard=True)


def _record_of(dev_id: int) -> dict[str, Any]:
    record = inventory.read_record(dev_id)
    if record is None:
        raise UblkdError(f"device {dev_id} is not one of ublkd's", hint="`ublkd list` shows what there is")
    return record


def _spec_of(record: dict[str, Any]) -> DeviceSpec:
    from ublkd.config.schema import DeviceSpec

    settings = record.get("settings")
    if not isinstance(settings, dict):
        raise UblkdError(
            f"the record of device {record['id']} has no usable settings",
            hint=f"`ublkd del {record['id']}` removes the device",
        )
    return DeviceSpec.from_dict(settings)


def _is_served(record: dict[str, Any]) -> bool:
    supervisor = record["supervisor"]
    return inventory.alive(supervisor["pid"], supervisor["start_time"])


def recover(dev_id: int, background: bool = True) -> str:
    """Take over a device whose supervisor died, with the settings it had: its path."""
    record = _record_of(dev_id)
    if _is_served(record):
        raise UblkdError(
            f"device {dev_id} is served by process {record['supervisor']['pid']}", hint="there is nothing to recover"
        )
    if record["boot_id"] != inventory.boot_id():
        raise UblkdError(f"device {dev_id} went with the last boot", hint="`ublkd cleanup` removes its record")
    if record.get("failed"):
        raise UblkdError(f"device {dev_id} failed: {record['failed']}", hint=f"`ublkd del {dev_id}` removes it")
    spec = _spec_of(record)
    origin = record.get("origin")
    origin = origin if isinstance(origin, dict) and isinstance(origin.get("given"), dict) else None
    if background:
        return run_background(spec, recover_id=dev_id, origin=origin)
    run_foreground(spec, recover_id=dev_id, origin=origin)
    path: str = record["path"]
    return path


def upgrade(dev_id: int, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Replace the server of a live device by the version of this process: {"pid", "version", "pause_ms"}.

    settings, of scope "hot", change with it. Whoever uses the device sees a pause. UblkdError if the old server
    serves on.
    """
    from ublkd.supervisor import endpoint

    record = _record_of(dev_id)
    if not _is_served(record):
        raise UblkdError(f"device {dev_id} is not served", hint=f"`ublkd recover {dev_id}` serves it again")
    # Everything that can take its time there is bounded by start_timeout, and happens at most three times.
    patience = 3 * _spec_of(record).start_timeout + 30
    return endpoint.ask(dev_id, patience, op="upgrade", settings=settings or {}, python=sys.executable)


def users_of(dev_id: int) -> list[str]:
    """What holds the disk: mount points, swap, devices on top of it, processes. Partitions are looked at too."""
    from ublkd.supervisor.mounts import disk_and_partitions, mount_points, openers

    parts = disk_and_partitions(dev_id)
    found = []
    for part in parts:
        try:
            found += [f"used by /dev/{holder}" for holder in os.listdir(f"/sys/class/block/{part}/holders")]
        except OSError:
            continue
    found += [f"mounted on {point}" for point in reversed(mount_points(dev_id))]
    with open("/proc/swaps") as f:
        found += [f"swap on {line.split()[0]}" for line in f if line.split()[0] in {f"/dev/{p}" for p in parts}]
    return found + [f"open in process {pid} ({name})" for pid, name in openers(dev_id)]


def _patience(users: list[str]) -> float:
    """How many seconds to wait for users that may be passers-by."""
    return _UDEV_S if users and all(user.endswith(_UDEV) for user in users) else _PASSER_BY_S


def _wait_unused(dev_id: int, lazy: bool, say: Callable[[str], None]) -> list[str]:
    """Until nobody uses the disk, if lazy, else no longer than for passers-by: who still does."""
    began = time.monotonic()
    before: list[str] = []
    while users := users_of(dev_id):
        if not lazy and time.monotonic() >= began + _patience(users):
            return users
        if lazy and users != before:
            say(f"device {dev_id} is in use: {', '.join(users)}")
            before = users
        time.sleep(_LOOK_AGAIN_S)
    return []


def stop_device(
    dev_id: int,
    force: bool = False,
    timeout: float = 30.0,
    lazy: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Stop and remove a device, whoever serves it or doesn't. In use: refused without force, waited for if lazy.

    say is called with a line whenever those that are waited for change.
    """
    users = [] if force else _wait_unused(dev_id, lazy, say)
    if users:
        raise UblkdError(
            f"device {dev_id} is in use: {', '.join(users)}",
            hint="--lazy waits until it is not, --force stops it all the same",
        )
    record = inventory.read_record(dev_id)
    if record is None or not _is_served(record):
        inventory.remove_device(dev_id, timeout, force)
        return
    pid = record["supervisor"]["pid"]
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        inventory.remove_device(dev_id, timeout, force)
        return
    try:
        if force or not _stop_unless_open(dev_id, timeout, lazy):
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        if not _wait_exit(pidfd, timeout / 2 if force else timeout):
            if not force:
                raise UblkdError(
                    f"device {dev_id} is still answering requests after {timeout:.0f} seconds",
                    hint="wait and look at `ublkd list`, or --force to stop waiting for them",
                )
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)  # the second one: requests in flight are given up
            if not _wait_exit(pidfd, timeout / 2):
                raise UblkdError(
                    f"the supervisor of device {dev_id} (process {pid}) does not stop", hint=f"see {log_path(dev_id)}"
                )
    except PermissionError:
        raise UblkdError(f"device {dev_id} may not be stopped by this user", hint="run as root") from None
    finally:
        os.close(pidfd)


def _stop_unless_open(dev_id: int, timeout: float, lazy: bool) -> bool:
    """Stop the disk in the one moment where the driver sees nobody in it; False: this driver can't tell."""
    from ublkd.control.commands import Control

    with Control() as ctl:
        if not ctl.get_features().has("SAFE_STOP_DEV"):
            return False
        began = time.monotonic()
        while True:
            try:
                ctl.try_stop(dev_id, timeout=timeout)
                return True
            except DriverError as e:
                if e.errno != errno.EBUSY:
                    return False  # the supervisor's own stop says what is wrong
                if not lazy and time.monotonic() >= began + _patience(users_of(dev_id)):
                    raise UblkdError(
                        f"device {dev_id} is in use",
                        hint="--lazy waits until it is not, --force stops it all the same",
                    ) from None
            time.sleep(_LOOK_AGAIN_S)


def _wait_exit(pidfd: int, timeout: float) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(timeout * 1000))


def resize(dev_id: int, new_size: int | None) -> int:
    """Give a live device a new size, bytes (None: that of its backing file now): the size it has then."""
    import mmap
    import struct

    from ublkd.control.commands import Control
    from ublkd.shm import layout

    record = _record_of(dev_id)
    if not _is_served(record):
        raise UblkdError(f"device {dev_id} is not served", hint=f"`ublkd recover {dev_id}` first")
    spec = _spec_of(record)
    spec.block_size = record["block_size"]  # what it came to, not only what was asked for
    size = make_target(spec).resized(new_size)
    if size == record["size"]:
        return size
    with Control() as ctl:
        if not ctl.get_features().has("UPDATE_SIZE"):
            raise UblkdError("this driver can't resize a live device", hint="it needs UPDATE_SIZE (Linux 6.16)")
        fd = os.open(f"/dev/shm/{layout.name_of(dev_id)}", os.O_RDWR | os.O_CLOEXEC)
        with mmap.mmap(fd, layout.HEADER_BYTES) as header:
            os.close(fd)

            def tell_engines() -> None:
                struct.pack_into("<Q", header, layout.DEV_BYTES_OFFSET, size)

            # The engines must never refuse what the kernel takes for part of the disk.
            if size > record["size"]:
                tell_engines()
                ctl.update_size(dev_id, size)
            else:
                ctl.update_size(dev_id, size)
                tell_engines()
    record["size"] = size
    inventory.write_record(record)
    return size
