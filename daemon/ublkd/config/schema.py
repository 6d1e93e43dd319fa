# SPDX-License-Identifier: Apache-2.0
"""Every setting, declared once; the command line, the TOML loader and the documents are made from here.

A setting's parse() takes text from the command line, its load() a value from TOML or JSON; both return the
value that DeviceSpec holds, and raise ValueError with a text that ends in the accepted values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec

from ublkd import units
from ublkd.errors import ConfigError, UsageError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
MIN_BLOCK = 512
MAX_DEVICES = 1 << 20

# What a target without a backing serves when no size is given.
DEFAULT_SIZES = {"memory": 1 * GIB, "null": 250 * GIB}


def target_names() -> list[str]:
    """Names of all targets, in the order they are listed to users."""
    from ublkd.targets import TARGETS

    return list(TARGETS)


def one_of(words: Iterable[str]) -> str:
    """ "a, b or c"."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


class Setting:
    """One setting. Subclasses know how its values look."""

    accepts = ""

    def __init__(
        self,
        default: Any,
        help: str,
        *,
        flags: Sequence[str] = (),
        metavar: str = "",
        section: str = "device",
        key: str = "",
        targets: Sequence[str] = (),
        absent: str = "",
        example: Any = None,
        scope: str = "restart",
    ) -> None:
        self.default = default
        self.help = help
        self.flags = tuple(flags)
        self.metavar = metavar
        self.section = section
        self.key = key
        self.targets = tuple(targets)  # empty: all
        self.absent = absent  # what happens when the default is None
        self.example = default if example is None else example  # for the sample file
        self.scope = scope  # "hot": `ublkd upgrade` can change it on a live device; "restart": it can't
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name
        self.key = self.key or name

    def parse(self, text: str) -> Any:
        """Value from command-line text."""
        return self.load(text)

    def load(self, value: object) -> Any:
        """Value from TOML or JSON."""
        raise NotImplementedError

    def toml(self, value: Any) -> str:
        """TOML text of a value."""
        return f'"{value}"'

    def shown(self, value: Any) -> str:
        """A value for people."""
        return f"({self.absent})" if value is None else self.toml(value).strip('"')

    def spellings(self) -> list[tuple[tuple[str, ...], Any]]:
        """(flags, value) of each command-line option; the value is None where the option takes one."""
        return [(self.flags, None)] if self.flags else []

    def wrong(self, value: object) -> ValueError:
        return ValueError(f"{value!r} is not accepted; give {self.accepts}")

    def default_text(self) -> str:
        """The default in words, for documents."""
        return self.absent or self.shown(self.default)


class Text(Setting):
    accepts = "text"

    def load(self, value: object) -> str:
        if not isinstance(value, str) or not value or "\0" in value:
            raise self.wrong(value)
        return value


class Switch(Setting):
    """True or false; off_flags are the options that turn it off, and off_help says what that is."""

    accepts = "true or false"

    def __init__(self, *args: Any, off_flags: Sequence[str] = (), off_help: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.off_flags = tuple(off_flags)
        self.off_help = off_help

    def load(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise self.wrong(value)
        return value

    def toml(self, value: bool) -> str:
        return "true" if value else "false"

    def spellings(self) -> list[tuple[tuple[str, ...], Any]]:
        return [(flags, value) for flags, value in ((self.flags, True), (self.off_flags, False)) if flags]


class Choice(Setting):
    """One of a few words; value_flags are options that stand for a word each."""

    def __init__(
        self,
        default: str,
        help: str,
        choices: Mapping[str, str],
        *,
        value_flags: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(default, help, **kwargs)
        self.choices = choices  # word -> what it means
        self.value_flags = value_flags or {}
        self.accepts = one_of(choices)

    def load(self, value: object) -> str:
        if not isinstance(value, str) or value not in self.choices:
            raise self.wrong(value)
        return value

    def spellings(self) -> list[tuple[tuple[str, ...], Any]]:
        return super().spellings() + [((flag,), value) for flag, value in self.value_flags.items()]


class Target(Text):
    """The target's name; which names there are is for the targets package to say."""

    @property
    def accepts(self) -> str:  # type: ignore[override]
        return one_of(target_names())

    def load(self, value: object) -> str:
        if not isinstance(value, str) or value not in target_names():
            raise self.wrong(value)
        return value


class Number(Setting):
    """A whole number within bounds; low itself means `automatic` where auto is set."""

    def __init__(
        self,
        default: int,
        help: str,
        low: int,
        high: int,
        *,
        auto: bool = False,
        unit: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__(default, help, **kwargs)
        self.low, self.high, self.auto, self.unit = low, high, auto, unit
        span = f"{low} to {high}" + (f" {unit}" if unit else "")
        self.accepts = f"auto or {low + 1} to {high}" if auto else span

    def parse(self, text: str) -> int:
        if self.auto and text == "auto":
            return self.low
        try:
            return self.load(int(text))
        except ValueError:
            raise self.wrong(text) from None

    def load(self, value: object) -> int:
        if self.auto and value == "auto":
            return self.low
        # bool is an int to Python, not to the user.
        if not isinstance(value, int) or isinstance(value, bool) or not self.low <= value <= self.high:
            raise self.wrong(value)
        return value

    def toml(self, value: int) -> str:
        return '"auto"' if self.auto and value == self.low else str(value)

    def wrong(self, value: object) -> ValueError:
        return ValueError(f"{value} is not accepted; give {self.accepts}")


class Size(Setting):
    """Bytes within bounds: a number, or text with a suffix."""

    def __init__(
        self,
        default: int | None,
        help: str,
        low: int = 1,
        high: int = (1 << 63) - 1,
        *,
        multiple: int = 1,
        power_of_two: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(default, help, **kwargs)
        self.low, self.high, self.multiple, self.power_of_two = low, high, multiple, power_of_two
        if high < 1 << 62:
            what = "a power of two" if power_of_two else f"a multiple of {multiple}"
            self.accepts = f"{what} from {units.exact_size(low)} to {units.exact_size(high)}"
        else:
            self.accepts = f"bytes, {low} or more; suffixes as in 512M or 4GiB"

    def load(self, value: object) -> int | None:
        if value is None and self.default is None:
            return None
        if isinstance(value, str):
            value = units.parse_size(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(value)
        odd = value % self.multiple or (self.power_of_two and value & (value - 1))
        if odd or not self.low <= value <= self.high:
            raise self.wrong(value)
        return value

    def toml(self, value: int) -> str:
        return str(value) if value < KIB else f'"{units.exact_size(value)}"'


class Cpus(Setting):
    """CPU numbers in order: queue i gets the i-th."""

    accepts = "CPU numbers and ranges, as in 0-3,8"

    def load(self, value: object) -> list[int] | None:
        if value is None:
            return None
        if isinstance(value, str):
            return units.parse_cpus(value)
        if not isinstance(value, list) or not value:
            raise self.wrong(value)
        if not all(type(cpu) is int and 0 <= cpu <= units.MAX_CPU for cpu in value):
            raise self.wrong(value)
        return list(value)

    def toml(self, value: list[int]) -> str:
        return f'"{units.format_cpus(value)}"'


class Table(Setting):
    """Free key = value pairs, all values text. Repeatable on the command line."""

    accepts = "a table of key = value"

    def parse(self, text: str) -> tuple[str, str]:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise ValueError(f"{text!r} is not accepted; give KEY=VALUE")
        return key, value

    def load(self, value: object) -> dict[str, str]:
        if not isinstance(value, dict):
            raise self.wrong(value)
        for key, item in value.items():
            if not isinstance(item, (str, int, float)):
                raise ValueError(f"{key} = {item!r} is not accepted; give text, a number, true or false")
        # The target sees the same text wherever a parameter came from.
        return {str(k): ("false", "true")[v] if isinstance(v, bool) else str(v) for k, v in value.items()}

    def toml(self, value: dict[str, str]) -> str:
        return "{ " + ", ".join(f'{key} = "{item}"' for key, item in value.items()) + " }" if value else "{}"


P = ParamSpec("P")


def setting(kind: Callable[P, Setting], *args: P.args, **kwargs: P.kwargs) -> Any:
    """A setting, to a type checker of the type of its values: instances of DeviceSpec hold those."""
    return kind(*args, **kwargs)


class DeviceSpec:
    """One device as asked for: an attribute per setting. Checked on creation; reads nothing of the machine.

    Raises UsageError (a value that is wrong by itself or next to another) and ConfigError (an unknown name).
    """

    target: str = setting(
        Target, "", "What serves the device.", metavar="TARGET", absent="none", example="memory"
    )
    file: str | None = setting(
        Text,
        None,
        "What the target serves: the backing file or block device (loop), or FILE:CLASS (python).",
        targets=("loop", "python"),
        metavar="FILE",
        absent="none",
        example="/var/lib/ublkd/disk.img",
    )
    size: int | None = setting(
        Size,
        None,
        "Size of the device.",
        MIN_BLOCK,
        flags=("--size",),
        metavar="SIZE",
        targets=("null", "memory", "python"),
        absent=", ".join(f"{units.exact_size(size)} for {name}" for name, size in DEFAULT_SIZES.items())
        + ", the class's own for python",
        example=GIB,
    )
    queues: int = setting(
        Number,
        1,
        "Hardware queues; each has a worker process of its own. When CPUs are listed and no number is given, "
        "a loop, null or memory device gets as many queues as it takes to use them.",
        1,
        4096,
        flags=("-q", "--queues"),
        metavar="N",
    )
    depth: int = setting(
        Number, 128, "Requests that one queue can hold.", 1, 4096, flags=("-d", "--depth"), metavar="N"
    )
    workers_per_queue: int = setting(
        Number,
        1,
        "Worker processes that share a queue, each with its part of the tags (Linux 6.16, or ublkd's own driver): "
        "for more I/O of one submitting CPU than one worker can serve. Not with --batch on.",
        1,
        64,
        flags=("--workers-per-queue",),
        metavar="N",
    )
    cpus: list[int] | None = setting(
        Cpus,
        None,
        "CPUs for the workers: that of queue 0 gets the first, and so on, again from the start when workers are left.",
        flags=("--cpus",),
        metavar="LIST",
        absent="chosen by the kernel's queue map and the topology",
        example=[0, 1, 2, 3],
        scope="hot",
    )
    number: int = setting(
        Number,
        -1,
        "Device number N of /dev/ublkbN.",
        -1,
        MAX_DEVICES - 1,
        auto=True,
        flags=("-n", "--number"),
        metavar="N",
    )
    block_size: int | None = setting(
        Size,
        None,
        "Logical block size.",
        MIN_BLOCK,
        4096,
        power_of_two=True,
        flags=("-b", "--block-size"),
        metavar="SIZE",
        absent="the backing's own, else 512",
        example=4096,
    )
    physical_block_size: int | None = setting(
        Size,
        None,
        "Physical block size that is reported.",
        MIN_BLOCK,
        1 * MIB,
        power_of_two=True,
        flags=("--physical-block-size",),
        metavar="SIZE",
        absent="the backing's own, else 4096",
        example=4096,
    )
    max_io_size: int | None = setting(
        Size,
        None,
        "Largest single request; every tag of a copying transport owns a buffer of this size.",
        4 * KIB,
        32 * MIB,
        multiple=4 * KIB,
        flags=("--max-io-size",),
        metavar="SIZE",
        absent="1MiB, with transport copy 512KiB",
        example=1 * MIB,
    )
    offset: int = setting(
        Size,
        0,
        "Where the device begins in the backing file.",
        0,
        flags=("-o", "--offset"),
        metavar="SIZE",
        targets=("loop",),
    )
    size_limit: int | None = setting(
        Size,
        None,
        "Serve at most this much of the backing file.",
        MIN_BLOCK,
        flags=("--size-limit",),
        metavar="SIZE",
        targets=("loop",),
        absent="all of it",
        example=GIB,
    )
    read_only: bool = setting(Switch, False, "Refuse writes.", flags=("-r", "--read-only"))
    direct: str = setting(
        Choice,
        "auto",
        "Direct I/O on the backing file.",
        {
            "auto": "where the backing takes it",
            "on": "always, or fail (--direct)",
            "off": "through the page cache (--buffered)",
        },
        value_flags={"--direct": "on", "--buffered": "off"},
        targets=("loop",),
    )
    partscan: bool = setting(
        Switch,
        True,
        "Look for partitions on the device.",
        flags=("-P", "--partscan"),
        off_flags=("--no-partscan",),
        off_help="Do not look for partitions.",
    )
    transport: str = setting(
        Choice,
        "auto",
        "How data crosses between kernel and worker.",
        {
            "auto": "the best one for the target",
            "copy": "the kernel copies to a buffer per tag",
            "user-copy": "the worker reads and writes the request's pages",
            "zero-copy": "the backing file's I/O goes to the request's pages (loop, Linux 6.16)",
        },
        flags=("--transport",),
        metavar="HOW",
    )
    batch: str = setting(
        Choice,
        "off",
        "Commands for many requests at once between kernel and worker (Linux 7.0): faster with several requests "
        "in flight, slower with one.",
        {"off": "a command for each request", "on": "for many; needs user-copy or zero-copy, and --on-crash requeue"},
        flags=("--batch",),
        metavar="HOW",
    )
    poll: int = setting(
        Number,
        0,
        "A worker with nothing to do looks for requests this long before it sleeps, as long as they come that close "
        "together: latency for CPU time. Only for CPUs that nothing else needs; 0 is off.",
        0,
        10000,
        unit="microseconds",
        flags=("--poll",),
        metavar="US",
        scope="hot",
    )
    zero: bool = setting(
        Switch,
        True,
        "Reads give zeroes.",
        flags=("--zero",),
        off_flags=("--no-zero",),
        off_help="Reads leave the pages as they are: faster, and what the kernel held there before shows.",
        targets=("null",),
    )
    params: dict[str, str] = setting(
        Table,
        {},
        "Parameters for the Python class; the option sets one and may be given several times.",
        flags=("--param",),
        metavar="KEY=VALUE",
        targets=("python",),
        example={"a": "/dev/vdb"},
    )
    force: bool = setting(
        Switch,
        False,
        "Serve a backing that another ublkd device already writes to.",
        flags=("--force",),
        targets=("loop",),
    )
    scheduler: str = setting(
        Choice,
        "none",
        "I/O scheduler of the disk.",
        {"none": "no scheduler, the fastest", "keep": "what the system chose"},
        flags=("--scheduler",),
        metavar="HOW",
        scope="hot",
    )
    start_timeout: int = setting(
        Number,
        30,
        "Give up when the device is not live after this long.",
        1,
        3600,
        unit="seconds",
        flags=("--start-timeout",),
        metavar="SECONDS",
        scope="hot",
    )
    on_crash: str = setting(
        Choice,
        "auto",
        "What becomes of requests when a server process dies: of those it held, and of new ones until it is back.",
        {
            "auto": "requeue, or fail for a Python class that says `idempotent = False`",
            "requeue": "those it held are issued again, new ones wait: nobody notices",
            "fail": "those it held get an I/O error, new ones wait",
            "error": "all get an I/O error until the server is back (Linux 6.13)",
        },
        section="recovery",
        flags=("--on-crash",),
        metavar="HOW",
    )
    crash_limit: int = setting(
        Number,
        5,
        "Give up when workers die more often than this within a minute; 0 never gives up.",
        0,
        10000,
        section="recovery",
        flags=("--crash-limit",),
        metavar="N",
        scope="hot",
    )
    give_up: str = setting(
        Choice,
        "fail",
        "What giving up is.",
        {
            "fail": "the disk is gone, its users get I/O errors",
            "wait": "its users wait for `ublkd recover`",
        },
        section="recovery",
        flags=("--give-up",),
        metavar="HOW",
        scope="hot",
    )
    hang_timeout: int = setting(
        Number,
        30,
        "Take a worker for hung when it has not come round for this long; 0 never does.",
        0,
        86400,
        unit="seconds",
        section="recovery",
        flags=("--hang-timeout",),
        metavar="SECONDS",
        scope="hot",
    )
    on_hang: str = setting(
        Choice,
        "log",
        "What is done about a hung worker.",
        {"log": "an error in the log, and what it hangs in", "recover": "it is killed and replaced as if it had died"},
        section="recovery",
        flags=("--on-hang",),
        metavar="HOW",
        scope="hot",
    )
    log_level: str = setting(
        Choice,
        "info",
        "Least severe event that is logged.",
        {"debug": "", "info": "", "warning": "", "error": ""},
        section="log",
        key="level",
        flags=("--log-level",),
        metavar="LEVEL",
        scope="hot",
    )
    log_format: str = setting(
        Choice,
        "auto",
        "Form of the log on standard error.",
        {"auto": "console on a terminal, else JSON", "console": "for people", "json": "an object per line"},
        section="log",
        key="format",
        flags=("--log-format",),
        metavar="FORM",
        scope="hot",
    )

    def __init__(self, **values: Any) -> None:
        unknown = sorted(set(values) - set(SETTINGS))
        if unknown:
            raise ConfigError(f"unknown setting {unknown[0]!r}", nearest(unknown[0], SETTINGS))
        for name, setting in SETTINGS.items():
            value = values.get(name, setting.default)
            if value is not setting.default:
                try:
                    value = setting.load(value)
                except ValueError as error:
                    raise UsageError(f"{name}: {error}") from None
            # The default of params must not be shared between devices.
            setattr(self, name, dict(value) if isinstance(value, dict) else value)
        if self.size is None:
            self.size = DEFAULT_SIZES.get(self.target)
        self._check_together()

    def _check_together(self) -> None:
        if not self.target:
            raise UsageError(f"no target is given; give {SETTINGS['target'].accepts}")
        if self.target == "loop" and not self.file:
            raise UsageError("the loop target needs a backing file", "ublkd run loop FILE")
        if self.target == "python" and not all((self.file or "").rpartition(":")[::2]):
            raise UsageError("the python target needs FILE:CLASS", "such as my_disk.py:RamDisk")
        if self.workers_per_queue > self.depth:
            raise UsageError(
                f"{self.workers_per_queue} workers can't share a queue that holds {self.depth} requests",
                "lower --workers-per-queue, or raise --depth",
            )
        block = self.block_size or MIN_BLOCK
        if self.physical_block_size is not None and self.physical_block_size < block:
            raise UsageError(
                f"the physical block size {self.physical_block_size} is below the logical block size {block}"
            )
        for what, size in (("size", self.size), ("size limit", self.size_limit)):
            if size is not None and size % block:
                down = size - size % block
                raise UsageError(
                    f"the {what} {size} is no multiple of the block size {block}",
                    f"the nearest are {f'{down} and ' if down else ''}{down + block}",
                )

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON can hold them; from_dict() takes it back."""
        return {name: getattr(self, name) for name in SETTINGS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeviceSpec:
        """A spec from to_dict()'s form; missing settings get their defaults, unknown ones are refused."""
        return cls(**values)

    def __repr__(self) -> str:
        given = {k: v for k, v in self.to_dict().items() if v != SETTINGS[k].default}
        return f"DeviceSpec({', '.join(f'{k}={v!r}' for k, v in given.items())})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeviceSpec) and self.to_dict() == other.to_dict()


SETTINGS: dict[str, Setting] = {
    name: setting for name, setting in vars(DeviceSpec).items() if isinstance(setting, Setting)
}


def nearest(word: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    """The hint for a mistyped word; empty when nothing is near."""
    from difflib import get_close_matches

    found = get_close_matches(word, list(known), n=2, cutoff=0.6)
    return f"did you mean {' or '.join(repr(f) for f in found)}?" if found else ""


def check_cpus(cpus: Sequence[int]) -> None:
    """UsageError unless every CPU exists, is online and is one this process may run on."""
    allowed = os.sched_getaffinity(0)
    refused = [cpu for cpu in cpus if cpu not in allowed]
    if not refused:
        return
    usable = f"usable here: {units.format_cpus(sorted(allowed))}"
    cpu = refused[0]
    if cpu not in _kernel_cpus("present"):
        raise UsageError(f"CPU {cpu} does not exist", usable)
    if cpu not in _kernel_cpus("online"):
        raise UsageError(f"CPU {cpu} is offline", usable)
    raise UsageError(f"CPU {cpu} is not among those this process may run on", usable)


def _kernel_cpus(which: str) -> set[int]:
    with open(f"/sys/devices/system/cpu/{which}") as file:
        return set(units.parse_cpus(file.read()))
