# SPDX-License-Identifier: Apache-2.0
"""Sizes and CPU lists as people write them. Bad text raises ValueError with the accepted forms."""

from collections.abc import Iterable

_PREFIXES = "KMGTPE"
_SIZE_FORMS = "bytes, or a number with a suffix: 512M, 4GiB, 1.5T (of 1024), 8KB (of 1000)"
_CPU_FORMS = "CPU numbers and ranges: 0-3,8"
MAX_CPU = 65535
_MOST_DIGITS = 100


def parse_size(text: str) -> int:
    """Bytes that the text stands for; K and KiB, M and MiB, ... are powers of 1024, KB, MB, ... of 1000."""
    number = text.strip().rstrip("BIKMGTPEbikmgtpe ")
    suffix = text.strip()[len(number) :].strip().upper()
    base = 1024
    if suffix.endswith("IB"):
        suffix = suffix[:-2]
        if not suffix:
            raise ValueError(f"{text!r} is not a size; give {_SIZE_FORMS}")
    elif suffix.endswith("B"):
        suffix = suffix[:-1]
        base = 1000
    whole, point, fraction = number.partition(".")
    if (
        not _digits(whole)
        or (point and not _digits(fraction))
        or len(suffix) > 1
        or (suffix and suffix not in _PREFIXES)
    ):
        raise ValueError(f"{text!r} is not a size; give {_SIZE_FORMS}")
    unit = base ** (_PREFIXES.index(suffix) + 1) if suffix else 1
    # Integers all the way: a float would round sizes beyond 2^53.
    scaled: int
    scaled, rest = divmod(int(whole + fraction) * unit, 10 ** len(fraction))
    if rest:
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return scaled


def _digits(text: str) -> bool:
    # Python itself has a limit, far beyond any size, and other words for it.
    return text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS


def format_size(size: int) -> str:
    """Text for people: "4 GiB", "1.5 GiB", "1000 B". Rounded to one digit unless exact; see parse_size."""
    unit, prefix = 1, ""
    for candidate in _PREFIXES:
        if size < unit * 1024:
            break
        unit, prefix = unit * 1024, candidate
    tenths = (size * 10 + unit // 2) // unit
    whole, tenth = divmod(tenths, 10)
    number = f"{whole}.{tenth}" if tenth else str(whole)
    return f"{number} {prefix}iB" if prefix else f"{size} B"


def exact_size(size: int) -> str:
    """The shortest text that parse_size() turns into exactly this size: "4GiB", "1000"."""
    for power in range(len(_PREFIXES), 0, -1):
        if size and size % 1024**power == 0:
            return f"{size // 1024**power}{_PREFIXES[power - 1]}iB"
    return str(size)


def parse_cpus(text: str) -> list[int]:
    """CPU numbers in the order written; a number may come twice."""
    cpus: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not _digits(first) or (dash and not _digits(last)):
            raise ValueError(f"{text!r} is not a list of CPUs; give {_CPU_FORMS}")
        low, high = int(first), int(last or first)
        if high < low or high > MAX_CPU:
            raise ValueError(f"{text!r} is not a list of CPUs; give {_CPU_FORMS}")
        cpus.extend(range(low, high + 1))
    return cpus


def format_cpus(cpus: Iterable[int]) -> str:
    """The inverse of parse_cpus(), order kept."""
    runs: list[list[int]] = []
    for cpu in cpus:
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
