# SPDX-License-Identifier: Apache-2.0
"""The pictures beside a report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from . import report
from .system import BenchError

_RATIOS = (1 / 7, 7.0)  # where colours end: not so dark that numbers can't be read


def check() -> None:
    """BenchError if plots can't be made here: better before an hour of measuring than after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BenchError("matplotlib is missing: run scripts/setup bench") from None


def plot(result: dict[str, Any], out: Path) -> list[Path]:
    """OUT-TABLE.png for the tables that are easier to see than to read. Which were made."""
    import matplotlib

    matplotlib.use("agg")
    makers = {
        "ratios": ("samples", _ratios),
        "server": ("samples", _server),
        "latency": ("samples", _latency),
        "queues": ("queues", _queues),
        "devices": ("devices", _devices),
    }
    made = []
    for name, (part, make) in makers.items():
        path = out.with_name(f"{out.name}-{name}.png")
        if result.get(part):
            figure = make(result)
            figure.suptitle(f"Linux {result['kernel']}", fontsize=10)
            figure.savefig(path, dpi=100)
            made.append(path)
    return made


def _figure(width: float, height: float, **arguments: Any) -> Any:
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(width, height), layout="constrained", **arguments)


def _map(result: dict[str, Any], rows: dict[str, list[float]], title: str, **colours: Any) -> Any:
    """A coloured table: rows by cells."""
    cells = [cell["title"].replace(", ", "\n") for cell in result["cells"]]
    figure, axes = _figure(3 + 1.0 * len(cells), 1.6 + 0.34 * len(rows))
    axes.imshow(list(rows.values()), aspect="auto", **colours)
    for y, values in enumerate(rows.values()):
        for x, value in enumerate(values):
            if not math.isnan(value):
                axes.text(x, y, f"{value:.2f}" if value < 10 else f"{value:.0f}", ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(cells)), cells, fontsize=8)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axes.xaxis.tick_top()
    axes.set_xlabel(title)
    return figure


def _ratios(result: dict[str, Any]) -> Any:
    from matplotlib import colors

    cells = [cell["key"] for cell in result["cells"]]
    rows = {
        report.versus(name, other): [report.ratio(result, name, other, cell) for cell in cells]
        for name, other in report.pairs(result)
    }
    norm = colors.LogNorm(*_RATIOS)
    title = "ratio of I/O per second: more than 1 (green) is in favour of ublkd"
    return _map(result, rows or {"-": [math.nan] * len(cells)}, title, cmap="PiYG", norm=norm)


def _server(result: dict[str, Any]) -> Any:
    from matplotlib import colors

    rows = {}
    for name in result["subjects"]:
        spreads = [report.spread(result, name, cell["key"], "server_us") for cell in result["cells"]]
        if any(spreads):
            rows[name] = [spread.median if spread else math.nan for spread in spreads]
    values = [value for row in rows.values() for value in row if value > 0] or [1.0]
    # no colour so dark that the numbers can't be read
    norm = colors.LogNorm(min(values), 4 * max(values) ** 1.3)
    rows = rows or {"-": [math.nan] * len(result["cells"])}
    return _map(result, rows, "CPU time of the server per I/O, us", cmap="YlOrRd", norm=norm)


def _latency(result: dict[str, Any]) -> Any:
    """From the median to p99 and p99.9, of the two reads that tell most."""
    cells = [cell for cell in result["cells"] if cell["key"] in ("read-4k-1", "read-4k-32")] or result["cells"][:1]
    names = list(result["subjects"])
    figure, panels = _figure(5.5 * len(cells), 1.5 + 0.28 * len(names), ncols=len(cells), sharey=True, squeeze=False)
    for axes, cell in zip(panels[0], cells, strict=True):
        for field, label, marker in (("p50_us", "p50", "o"), ("p99_us", "p99", "|"), ("p999_us", "p99.9", "x")):
            spreads = [report.spread(result, name, cell["key"], field) for name in names]
            points = [(spread.median, y) for y, spread in enumerate(spreads) if spread]
            if points:
                axes.plot(*zip(*points, strict=True), marker, label=label)
        axes.set_xscale("log")
        axes.set_title(cell["title"], fontsize=10)
        axes.set_xlabel("latency, us")
        axes.grid(alpha=0.4, which="both")
    panels[0][0].set_yticks(range(len(names)), names, fontsize=9)
    panels[0][0].invert_yaxis()
    if panels[0][0].get_legend_handles_labels()[0]:
        panels[0][0].legend(fontsize=8)
    return figure


def _queues(result: dict[str, Any]) -> Any:
    """By the figure of one queue: flat is good where it counts instructions, a straight line up where it is time."""
    from statistics import median

    queues, counted = result["queues"], result["clock"] == "instructions"
    counts = queues["counts"]
    figure, panels = _figure(5 * len(queues["cells"]), 4, ncols=len(queues["cells"]), sharey=True, squeeze=False)
    for axes, cell in zip(panels[0], queues["cells"], strict=True):
        for name, samples in queues["samples"].items():
            rates = [median(samples[str(count)][cell["key"]]) for count in counts]
            axes.plot(counts, [rates[0] / rate if counted else rate / rates[0] for rate in rates], "o-", label=name)
        axes.set_xticks(counts)
        axes.set_xlabel("queues and CPUs")
        axes.set_title(cell["title"], fontsize=10)
        axes.grid(alpha=0.4)
        if counted:
            axes.axhspan(0.95, 1.05, alpha=0.15)
            axes.set_ylim(0.8, 1.2)
    panels[0][0].set_ylabel(("instructions per I/O" if counted else "I/O per second") + ", by those of one queue")
    panels[0][0].legend(fontsize=8)
    return figure


def _devices(result: dict[str, Any]) -> Any:
    rows = result["devices"]
    counts = [row["devices"] for row in rows]
    figure, (left, right) = _figure(10, 4, ncols=2)
    left.plot(counts, [row["start_ms"] for row in rows], "o-")
    left.set_ylabel("start of one more device, ms")
    for field, label in (
        ("machine_kib", "of the machine"),
        ("supervisor_pss_kib", "supervisor"),
        ("workers_pss_kib", "worker"),
    ):
        right.plot(counts, [row[field] / 1024 for row in rows], "o-", label=label)
    right.set_ylabel("memory per device, MiB")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("devices")
        axes.grid(alpha=0.4)
    return figure
