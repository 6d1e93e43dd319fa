# SPDX-License-Identifier: Apache-2.0
"""Events for people and for machines, through structlog, on standard error. Never called per I/O.

log.get(device=0, queue=1).info("worker started", cpu=3)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

_ready = False


class _LineLogger:
    """One write(2) per event: lines of several processes never mix, and a closed terminal kills nobody."""

    def msg(self, message: str) -> None:
        try:
            os.write(2, (message + "\n").encode(errors="backslashreplace"))
        except OSError:
            pass

    debug = info = warning = error = critical = exception = log = msg


# The numbers of the standard library's logging module.
LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def setup(level: str = "info", form: str = "auto") -> None:
    """Set level (of LEVELS) and form (auto, console, json) for this process and its forks."""
    global _ready
    import structlog

    tty = os.isatty(2)
    if form == "auto":
        form = "console" if tty else "json"
    processors: list[Any] = [structlog.processors.add_log_level]
    if form == "json":
        processors += [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(default=str),
        ]
    else:
        processors += [
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            structlog.dev.ConsoleRenderer(
                colors=tty and "NO_COLOR" not in os.environ,
                pad_event=0,
                # The default one imports rich where that is installed: memory in every worker.
                exception_formatter=structlog.dev.plain_traceback,
            ),
        ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: _LineLogger(),
        cache_logger_on_first_use=False,
    )
    _ready = True


def get(**bound: object) -> FilteringBoundLogger:
    """A logger that adds the given fields (device=, queue=, ...) to every event."""
    if not _ready:
        setup()
    import structlog

    logger: FilteringBoundLogger = structlog.get_logger(**bound)
    return logger
