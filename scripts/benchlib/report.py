# SPDX-License-Identifier: Apache-2.0
"""From samples to tables: ratios of medians, absolute figures, memory."""

from __future__ import annotations

from statistics import median
from typing import Any, NamedTuple


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
    """IOPS of subject by IOPS of other."""
    mine, theirs = (spread(result, name, cell, "iops") for name in (subject, other))
    assert mine and theirs
    return mine.median / theirs.median


def pairs(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Who is compared with whom, of those that were measured."""
    subjects = result["subjects"]
    return [(name, other) for name in subjects for other in subjects[name]["against"] if other in subjects]


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
        [f"{name} / {other}", *(f"{ratio(result, name, other, cell['key']):.2f}" for cell in cells)]
        for name, other in pairs(result)
    ]
    return table(["IOPS ratio", *(cell["title"] for cell in cells)], rows)


def figures_table(result: dict[str, Any]) -> str:
    """Median IOPS [min-max] and the median of the servers' CPU time per I/O, us."""
    cells = result["cells"]
    rows = []
    for name in result["subjects"]:
        row = [name]
        for cell in cells:
            iops, server = (spread(result, name, cell["key"], field) for field in ("iops", "server_us"))
            assert iops
            time = f"{server.median:.1f}" if server else "-"
            row.append(f"{iops.median:.0f} [{iops.low:.0f}-{iops.high:.0f}] {time}")
        rows.append(row)
    return table(["IOPS [min-max] us", *(cell["title"] for cell in cells)], rows)


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
        return "The clock counts an emulated CPU's instructions, 4 ns each: figures are only to be compared."
    return "The clock is the machine's own."


def markdown(result: dict[str, Any], name: str) -> str:
    """The report; name is that of the files beside it, without suffix."""
    versions = ", ".join(f"{what} {version}" for what, version in result["versions"].items())
    subjects = [
        f"* {name}: {about['title']}" + (f", transport {about['transport']}" if "transport" in about else "")
        for name, about in result["subjects"].items()
    ]
    skipped = [f"* {name} was not measured: {reason}" for name, reason in result["skipped"].items()]
    cpus, repeats = result["cpus"], result["repeats"]
    return "\n".join(
        [
            f"# ublkd beside others, Linux {result['kernel']}",
            "",
            f"`{result['command']}`, {result['date']}, commit {result['commit']}; {versions}.",
            "",
            f"{cpus} CPU{'s' * (cpus != 1)}, one queue. {clock(result)} fio: io_uring, direct, one job; "
            f"{result['milliseconds']} ms per cell on {result['span'] >> 20} MiB; one boot, taking turns; "
            f"medians of {repeats}. Scheduler `none` for all. Backing files are on ext4 on brd, written "
            "before, and caches are dropped between turns.",
            "",
            "## Ratios",
            "",
            "More than 1: ublkd does more I/O per second.",
            "",
            ratio_table(result),
            "",
            f"![ratios and server time]({name}.png)",
            "",
            "## Figures",
            "",
            "The last number is the CPU time of the server's processes per I/O, us; kernel disks have none.",
            "",
            figures_table(result),
            "",
            *subjects,
            *skipped,
            "",
            "## Memory",
            "",
            "From smaps_rollup: fresh devices while nothing else of ublkd ran, and those of the run at its "
            "end, when they shared with each other. A RAM disk's data counts as shared, and as private dirty "
            "where only one worker has touched it.",
            "",
            memory_table(result),
            "",
            f"Raw numbers, with latencies: [{name}.json]({name}.json).",
            "",
        ]
    )
