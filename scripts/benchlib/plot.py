# SPDX-License-Identifier: Apache-2.0
"""The picture beside a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import report
from .system import BenchError


def check() -> None:
    """BenchError if plots can't be made here: better before an hour of measuring than after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BenchError("matplotlib is missing: run scripts/setup bench") from None


def plot(result: dict[str, Any], path: Path) -> None:
    """Ratios above, server time per I/O below."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(11, 9), layout="constrained")
    cells = result["cells"]
    ratios = {
        f"{name} / {other}": [report.ratio(result, name, other, cell["key"]) for cell in cells]
        for name, other in report.pairs(result)
    }
    _bars(above, cells, ratios)
    above.axhline(1.0, color="black", linewidth=1)
    above.set_ylabel("ratio of IOPS")
    above.set_title(f"Linux {result['kernel']}, medians of {result['repeats']}")
    times = {}
    for name in result["subjects"]:
        spreads = [report.spread(result, name, cell["key"], "server_us") for cell in cells]
        if all(spreads):
            times[name] = [spread.median for spread in spreads if spread]
    _bars(below, cells, times)
    below.set_yscale("log")
    below.set_ylabel("server CPU per I/O, us")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axes: Any, cells: list[dict[str, Any]], groups: dict[str, list[float]]) -> None:
    """One group of bars per cell, one colour per key of groups."""
    width = 0.8 / max(len(groups), 1)
    for number, (label, values) in enumerate(groups.items()):
        left = [position - 0.4 + (number + 0.5) * width for position in range(len(cells))]
        bars = axes.bar(left, values, width, label=label)
        axes.bar_label(bars, fmt="%.3g", fontsize=7, rotation=90, padding=2)
    axes.set_xticks(range(len(cells)), [cell["title"] for cell in cells])
    axes.margins(y=0.15)
    axes.legend(fontsize=8)
