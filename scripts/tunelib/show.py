# SPDX-License-Identifier: Apache-2.0
"""A plan as text that reads like a diff, and as what JSON can hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from .disk import Disk
from .rules import Plan, Remark


def diff(disk: Disk, plan: Plan, profile: str) -> str:
    """Old and new values with their reasons, what only the owner can change, and what stays."""
    return "\n".join(_lines(disk, plan, profile))


def _lines(disk: Disk, plan: Plan, profile: str) -> Iterator[str]:
    if plan.changes:
        yield f"--- {disk.path} (as it is)"
        yield f"+++ {disk.path} (profile {profile})"
        width = max(len(change.key) for change in plan.changes)
        values = max(len(value) for change in plan.changes for value in (change.old, change.new))
        for change in plan.changes:
            key = change.key.ljust(width)
            yield f"-{key}  {change.old}"
            yield f"+{key}  {change.new.ljust(values)}  # {change.why} [{change.source}]"
    else:
        yield f"{disk.path}: nothing to change (profile {profile})"
    yield from _remarks("not done here:", plan.advice)
    yield from _remarks("left alone, because:", plan.left)


def _remarks(head: str, remarks: Iterable[Remark]) -> Iterator[str]:
    remarks = list(remarks)
    if not remarks:
        return
    yield ""
    yield head
    width = max(len(remark.key) for remark in remarks)
    values = max(len(remark.value) for remark in remarks)
    for remark in remarks:
        yield f" {remark.key.ljust(width)}  {remark.value.ljust(values)}  # {remark.why} [{remark.source}]"


def document(disk: Disk, plan: Plan, profile: str, **more: Any) -> dict[str, Any]:
    """The same for programs."""
    return {
        "device": disk.path,
        "profile": profile,
        "changes": [asdict(change) for change in plan.changes],
        "advice": [asdict(remark) for remark in plan.advice],
        "left_alone": [asdict(remark) for remark in plan.left],
        **more,
    }
