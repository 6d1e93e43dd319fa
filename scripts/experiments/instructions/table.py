# SPDX-License-Identifier: Apache-2.0
"""From the counts: instructions per I/O of each disk, by where they were executed. A table, and JSON."""

from __future__ import annotations

import bisect
import collections
import json
import re
import sys
from pathlib import Path
from typing import Any

# An I/O begins once.
ENTRY = {"brd": "brd_submit_bio"}
REQUEST = "blk_mq_start_request"

SCHEDULER = re.compile(
    r"update_(load|cfs|curr|rq|se)|(en|de)queue_|__(en|de)queue_e|pick_|psi_|sched|set_(next|curr)|put_prev|ttwu|"
    r"try_to_wake|switch|finish_task|vruntime|entity|avg_|cpuacct|resched|wakeup_|native_sched|fpreg|xfd|rb_|"
    r"prepare_task|wake_|autoremove|record_times|propagate|hrtimer|timerqueue|dl_|task_|reweight|calc_delta|update_deadline"
)
KERNEL = (
    ("scheduler", SCHEDULER),
    ("io_uring", re.compile(r"_*io_")),
    ("block layer", re.compile(r"_*(blk|bio|block|sbitmap|wbt|rq_qos|submit_bio|bvec|elv)")),
    ("pages of the I/O", re.compile(r"gup|.*folio|iov_iter|unpin|mod_node|__pte|.*page")),
    ("copying", re.compile(r"rep_(movs|stos)|memcpy|_?copy_|memset|memmove")),
    (
        "system calls and files",
        re.compile(r".*(syscall|SYSCALL)|f(get|put|drop)|vfs|rw_verify|aa_|apparmor|security|ksys|x64_sys|__x64"),
    ),
)


def load(path: Path) -> dict[tuple[int, int], int]:
    rows = (line.split() for line in path.read_text().splitlines())
    return {(int(address, 16), int(size)): int(times) for address, size, times in rows}


class Symbols:
    """Functions of the kernel, by address."""

    def __init__(self, text: str) -> None:
        rows = (line.split() for line in text.splitlines())
        code = (row for row in rows if row[1] in "tTwW")
        found = sorted((int(row[0], 16), row[2], row[3].strip("[]") if row[3:] else "") for row in code)
        self._at = [address for address, _, _ in found]
        self._names = [(name, module) for _, name, module in found]

    def find(self, address: int) -> tuple[str, str, bool]:
        """Name, module, and whether it begins there."""
        i = bisect.bisect(self._at, address) - 1
        return *self._names[i], self._at[i] == address


def user(address: int, processes: list[list[str]]) -> tuple[str, str]:
    """The program, and it with the file."""
    for name, *lines in processes:
        for line in lines:
            span, *_, path = (line + " no file").split(None, 5)
            low, high = (int(end, 16) for end in span.split("-"))
            if low <= address < high:
                return name, f"{name}: {path.removesuffix(' no file').split('/')[-1]}"
    return "", "unknown"


def layer(name: str, module: str) -> str:
    if module in ("ublk_drv", "null_blk", "brd", "loop"):
        return f"driver ({module})"
    return next((title for title, pattern in KERNEL if pattern.match(name)), "rest of the kernel")


def table(share: Path) -> dict[str, Any]:
    told = json.loads((share / "runs.json").read_text())
    for number, run in enumerate(told["runs"]):
        before, after = (load(share / f"count.{2 * number + i}") for i in (0, 1))
        symbols = Symbols((share / f"symbols.{run['disk']}").read_text())
        instructions: collections.Counter[str] = collections.Counter()
        calls: collections.Counter[str] = collections.Counter()
        layers: collections.Counter[str] = collections.Counter()
        for (address, size), times in after.items():
            times -= before.get((address, size), 0)
            if not times:
                continue
            if address >> 63:
                name, module, begins = symbols.find(address)
                calls[name] += times if begins else 0
                where = layer(name, module)
            else:
                program, name = user(address, run["processes"])
                known = {"fio": "fio", **dict.fromkeys(run["servers"], "server, outside of the kernel")}
                where = known.get(program, "other programs")
            instructions[name] += size * times
            layers[where] += size * times
        ios = calls[ENTRY.get(run["disk"], REQUEST)]
        run["ios"] = ios
        run["instructions"] = round(sum(instructions.values()) / ios)
        run["layers"] = {name: round(n / ios, 1) for name, n in layers.most_common()}
        run["functions"] = {
            name: [round(n / ios, 1), round(calls[name] / ios, 3)] for name, n in instructions.most_common() if n > ios
        }
        del run["processes"], run["servers"]
    return dict(told)


def main() -> None:
    told = table(Path(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(told, indent=1) + "\n")
    runs = told["runs"]
    names = {name: max(run["layers"].get(name, 0) for run in runs) for run in runs for name in run["layers"]}
    print(f"Instructions per 4k {told['rw']} at depth {told['depth']}\n")
    print("| |", " | ".join(run["disk"] for run in runs), "|")
    print("|---|" + "---:|" * len(runs))
    for name in sorted(names, key=names.__getitem__, reverse=True):
        print(f"| {name} |", " | ".join(f"{run['layers'].get(name, 0):.0f}" for run in runs), "|")
    print("| **all** |", " | ".join(f"**{run['instructions']}**" for run in runs), "|")


main()
