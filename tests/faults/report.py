# SPDX-License-Identifier: Apache-2.0
"""What every proof in a VM says about itself, and where it goes."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib import leaks


class Failure(Exception):
    """What a proof is there to find."""


def arguments(what: str | None) -> argparse.ArgumentParser:
    """The options that all have."""
    parse = argparse.ArgumentParser(description=what)
    parse.add_argument("--seed", type=int, default=1)
    parse.add_argument("--out", type=Path)
    return parse


class Report(dict[str, Any]):
    """A proof's account: made at its beginning, filled in by it, printed and written by finish()."""

    def __init__(self, what: str, options: argparse.Namespace, **facts: Any) -> None:
        super().__init__(
            what=what, kernel=os.uname().release, seed=options.seed, cpus=os.cpu_count(), failure="", **facts
        )
        self._out: Path | None = options.out
        self._began = time.monotonic()
        print(f"{what} on kernel {self['kernel']}, seed {options.seed}", flush=True)

    @contextmanager
    def failing_on(self, *kinds: type[Exception]) -> Iterator[None]:
        """What goes wrong inside is the report's failure, not the program's; nothing of it is left then."""
        try:
            yield
        except kinds as e:
            self["failure"] = f"FAILED: {e}" if isinstance(e, Failure) else f"FAILED: {type(e).__name__}: {e}"
            leaks.clean()
        self["seconds"] = round(time.monotonic() - self._began, 1)

    def finish(self, table: Callable[[dict[str, Any]], str]) -> int:
        """Print it as a table, write both forms: the exit status."""
        text = table(self)
        print(text, flush=True)
        if self._out:
            self._out.write_text(json.dumps(self) + "\n")
            self._out.with_suffix(".txt").write_text(text + "\n")
        return 1 if self["failure"] else 0


class KernelErrors:
    """I/O errors that the kernel saw since the last look; Failure if there are any."""

    def __init__(self) -> None:
        self._log = leaks.KernelLog()

    def forget(self) -> None:
        """Those so far were meant to be."""
        self._log.news()

    def check(self) -> None:
        """Failure if there are any."""
        errors = [line for line in self._log.news() if "I/O error" in line or "lost async page write" in line]
        if errors:
            raise Failure("the kernel saw " + "; ".join(errors[:5]))
