# SPDX-License-Identifier: Apache-2.0
"""From samples to tables: ratios of medians, absolute figures, queues, devices, memory."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

# The keys of a result that belong to a part of the measurement, and which of its memory entries.
_PARTS = {
    "speed": (("cpus", "cells", "subjects", "skipped", "samples", "rounds"), "after the run"),
    "queues": (("queues",), "fresh"),
    "devices": (("devices",), ""),
}


def join(result: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """The result, with the parts that only an earlier one of the same kernel has."""
    if any(earlier.get(key) != result[key] for key in ("format", "kernel", "clock")):
        return result
    joined = result | {"runs": dict(result["runs"]), "memory": list(result["memory"])}
    for part, (keys, when) in _PARTS.items():
        if part in earlier["runs"] and part not in result["runs"]:
            joined["runs"][part] = earlier["runs"][part]
            joined |= {key: earlier[key] for key in keys if key in earlier}
            joined["memory"] += [entry for entry in earlier["memory"] if entry["when"] == when]
    return joined


class Spread(NamedTuple):
    """Repeats of one figure."""

    median: float
    low: float
    high: float


def spread(result: dict[str, Any], subject: str, cell: str, field: str) -> Spread | None:
    """Of a field of the samples; None if they don't have it, as a kernel disk has no server time."""
    values = [sample[field] for sample in result["samples"][subject][cell] if field in sample]
    return Spread(median(values), min(values), max(values)) if values else None


def ratio(result: dict[str, Any], subject: str, other: str, cell: str) -> float:
    """IOPS of subject by IOPS of other; where that is NAME*, of the best of them."""
    mine, *theirs = (
        spread(result, name, cell, "iops") for name in (subject, *fnmatch.filter(result["samples"], other))
    )
    return (mine.median if mine else math.nan) / max(their.median for their in theirs if their)


def pairs(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Who is compared with whom, of those that were measured."""
    subjects = result["subjects"]
    return [
        (name, other) for name in subjects for other in subjects[name]["against"] if fnmatch.filter(subjects, other)
    ]


def versus(name: str, other: str) -> str:
    """How a comparison is called."""
    return f"{name} / {'best ' if '*' in other else ''}{other.removesuffix('*')}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Markdown that reads well as plain text too: first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]

    def line(cells: list[str]) -> str:
        others = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join([cells[0].ljust(widths[0]), *others]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(heads), "|" + "|".join(f" {r} " for r in rule) + "|", *map(line, rows)])


def ratio_table(result: dict[str, Any]) -> str:
    """IOPS of each ublkd target by those of what it is compared with."""
    cells = result["cells"]
    rows = [
        [versus(name, other), *(f"{ratio(result, name, other, cell['key']):.2f}" for cell in cells)]
        for name, other in pairs(result)
    ]
    return table(["IOPS ratio", *(cell["title"] for cell in cells)], rows)


def figures_table(result: dict[str, Any], head: str, show: Callable[[str, str], str]) -> str:
    """One row per subject with what show() says of it and a cell; without those that have nothing to show."""
    rows = [[name, *(show(name, cell["key"]) for cell in result["cells"])] for name in result["subjects"]]
    rows = [row for row in rows if any(word != "-" for word in row[1:])]
    return table([head, *(cell["title"] for cell in result["cells"])], rows)


def iops_table(result: dict[str, Any]) -> str:
    """Medians, and how far the repeats are apart."""

    def show(name: str, cell: str) -> str:
        iops = spread(result, name, cell, "iops")
        if not iops:
            return "-"
        # one round has no spread
        around = f" ±{50 * (iops.high - iops.low) / iops.median:.1f} %" if iops.high > iops.low else ""
        return f"{iops.median:.0f}{around}"

    return figures_table(result, "IOPS", show)


def server_table(result: dict[str, Any]) -> str:
    """CPU time of the servers' processes, us per I/O."""

    def show(name: str, cell: str) -> str:
        server = spread(result, name, cell, "server_us")
        return f"{server.median:.1f}" if server else "-"

    return figures_table(result, "us", show)


def latency_table(result: dict[str, Any]) -> str:
    """Medians of three percentiles, us."""

    def show(name: str, cell: str) -> str:
        found = [spread(result, name, cell, field) for field in ("p50_us", "p99_us", "p999_us")]
        return " / ".join(f"{one.median:.0f}" for one in found if one) or "-"

    return figures_table(result, "us", show)


def queues_table(result: dict[str, Any]) -> str:
    """I/O per second as queues grow, and what one I/O then takes of all CPUs, by that of one queue."""
    queues = result["queues"]
    counts = queues["counts"]
    heads = [f"{cell['title']}, {count} queue{'s' * (count > 1)}" for cell in queues["cells"] for count in counts]
    rows = []
    for name, samples in queues["samples"].items():
        row = [name]
        for cell in queues["cells"]:
            rates = [median(samples[str(count)][cell["key"]]) for count in counts]
            row += [_scaled(rate, rates[0], result["clock"]) for rate in rates]
        rows.append(row)
    first = "instructions per I/O" if result["clock"] == "instructions" else "IOPS"
    return table([first, *heads], rows)


INSTRUCTIONS_PER_S = 250e6


def _scaled(rate: float, one: float, clock: str) -> str:
    if clock == "instructions":
        return f"{INSTRUCTIONS_PER_S / rate:.0f} ({one / rate:.2f})"
    return f"{rate:.0f} ({rate / one:.2f})"


def devices_table(result: dict[str, Any]) -> str:
    """Start and memory as devices become more."""
    heads = ["devices", "start, ms", "slowest, ms", "CPU of it, ms"]
    heads += ["supervisor, KiB", "worker, KiB", "machine, KiB", "counters, KiB"]
    fields = (
        "start_ms",
        "slowest_start_ms",
        "start_cpu_ms",
        "supervisor_pss_kib",
        "workers_pss_kib",
        "machine_kib",
        "counters_kib",
    )
    return table(
        heads, [[str(row["devices"]), *(f"{row[field]:.0f}" for field in fields)] for row in result["devices"]]
    )


def memory_table(result: dict[str, Any]) -> str:
    """KiB of the supervisor and of the workers' mean."""
    rows = []
    for entry in result["memory"]:
        workers = entry["workers"]
        mean = {field: round(sum(w[field] for w in workers) / len(workers)) for field in workers[0]}
        number = len(workers)
        for who, fields in (("supervisor", entry["supervisor"]), ("per worker", mean)):
            kinds = [str(fields[field]) for field in _MEMORY_FIELDS]
            what = f"{entry['subject']}, {entry['when']}, {number} worker{'s' * (number > 1)}"
            rows.append([what, who, *kinds])
    return table(["KiB", "", "PSS", "of it anonymous", "files", "shared", "private dirty"], rows)


_MEMORY_FIELDS = ("pss", "pss_anon", "pss_file", "pss_shmem", "private_dirty")


def clock(result: dict[str, Any]) -> str:
    """What the figures count, in a sentence."""
    if result["clock"] == "instructions":
        return (
            "The clock counts an emulated CPU's instructions, 4 ns each: figures are only to be compared. "
            "No autogroups."
        )
    return "The clock is the machine's own."


def tables(result: dict[str, Any]) -> dict[str, str]:
    """All that the parts that were measured give."""
    makers = {
        "samples": {"ratios": ratio_table, "iops": iops_table, "server": server_table, "latency": latency_table},
        "queues": {"queues": queues_table},
        "devices": {"devices": devices_table},
        "memory": {"memory": memory_table},
    }
    return {name: make(result) for part, some in makers.items() if result.get(part) for name, make in some.items()}


def _runs(result: dict[str, Any]) -> list[str]:
    """One line per command that measured something."""
    runs: list[dict[str, Any]] = []
    for run in result["runs"].values():
        if run not in runs:
            runs.append(run)
    return [
        f"* `{run['command']}`, {run['date']}, commit {run['commit']}"
        f" ({', '.join(part for part in _PARTS if result['runs'].get(part) == run)}):"
        f" {run['milliseconds']} ms per cell on {run['span'] >> 20} MiB, medians of {run['repeats']}"
        for run in runs
    ]


_TEXTS = {
    "ratios": (
        "Ratios",
        "More than 1: ublkd does more I/O per second. Where there are several of a kind, it is compared with the best "
        "of them in each cell.",
    ),
    "iops": ("I/O per second", "Medians, and half of the distance between the least and the most of the repeats."),
    "server": (
        "Server CPU per I/O",
        "What the server's processes take, supervisor included. Kernel disks have no server, which is not to say that "
        "they take no CPU.",
    ),
    "latency": ("Latency", "p50 / p99 / p99.9 of completion, us."),
    "queues": ("More queues", ""),
    "devices": (
        "More devices",
        "null devices of one queue, started one after the other: the median time of those that were added to come to "
        "that number, from the call of `ublkd add` to its end, and the CPU time of all processes of that; on average, "
        "PSS per supervisor and per worker, what the machine's available memory fell by per device, and the counters "
        "in shared memory.",
    ),
    "memory": (
        "Memory",
        "From smaps_rollup: fresh devices while nothing else of ublkd ran, and those of the run at its end, when they "
        "shared with each other. A RAM disk's data counts as shared, and as private dirty where only one worker has "
        "touched it.",
    ),
}
_QUEUES = {
    "instructions": "As many CPUs as queues take part, each with a job of fio of its own and a queue's worker. These "
    "CPUs take turns, and the clock counts the instructions of all of them; so the same number of instructions per I/O "
    "is a throughput in proportion to CPUs, but for what they cost each other in caches and waiting, which "
    "isn't counted. In brackets: by that of one queue.",
    "wall": "As many jobs of fio as queues, each on a CPU of its own. In brackets: by the figure of one queue.",
}


def markdown(result: dict[str, Any], name: str, pictures: list[str]) -> str:
    """The report; name is that of the files beside it, without suffix."""
    versions = ", ".join(f"{what} {version}" for what, version in result["versions"].items())
    lines = [
        f"# ublkd beside others, Linux {result['kernel']}",
        "",
        *_runs(result),
        "",
        f"{clock(result)} fio: io_uring, direct. Scheduler `none` for all. {versions}.",
    ]
    if "samples" in result:
        cpus = result["cpus"]
        lines += [
            f"Disks are compared on {cpus} CPU{'s' * (cpus != 1)}, with one queue of depth 128 and one job, in one "
            "boot, taking turns. Backing files are on ext4 on brd, written before. Caches are dropped between turns, "
            "and filled again with the file for those that go through the page cache.",
        ]
    for what, text in tables(result).items():
        title, about = _TEXTS[what]
        about = _QUEUES[result["clock"]] if what == "queues" else about
        lines += ["", f"## {title}", "", about, "", text]
        lines += [line for picture in pictures if f"-{what}." in picture for line in ("", f"![{title}]({picture})")]
    if "samples" in result:
        lines += ["", "## What was measured", ""]
        for subject, about in result["subjects"].items():
            how = f", transport {about['transport']}" if "transport" in about else ""
            lines.append(f"* {subject}: {about['title']}{how}")
        lines += [f"* {subject} was not measured: {reason}" for subject, reason in result["skipped"].items()]
    return "\n".join([*lines, "", f"Raw numbers: [{name}.json]({name}.json).", ""])
