# SPDX-License-Identifier: Apache-2.0
"""Make the changes of a plan, all or none, and unmake them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ublkd.errors import UblkdError

from . import record, workers
from .disk import ATTRIBUTES, Disk
from .record import Originals
from .rules import Plan


def switch(disk: Disk, attributes: Mapping[str, str], move: bool = False, cpus: list[int] | None = None) -> None:
    """Give the disk these attributes, and if move its workers this `cpus` setting. If one is refused, the disk
    is put back as it was, and UblkdError says which and why.
    """
    before = disk.snapshot()
    old_cpus = workers.setting(disk)
    moved = False
    try:
        # The workers first: a new server sets the scheduler as its settings say.
        if move and old_cpus != cpus:
            moved = True
            workers.move(disk, cpus)
        # The kernel forgets read-ahead when other attributes change: see ATTRIBUTES.
        kept = {name: value for name, value in before.items() if name == "read_ahead_kb"}
        _write(disk, {**kept, **attributes})
    except BaseException as error:
        left = _put_back(disk, before, moved, old_cpus)
        if not isinstance(error, UblkdError):
            raise
        outcome = f"and not put back: {left}" if left else "all is as it was"
        raise UblkdError(f"{error.message}; {outcome}", error.hint) from None


def _write(disk: Disk, attributes: Mapping[str, str]) -> None:
    for attribute in ATTRIBUTES:
        if attribute in attributes and disk.read(attribute) != attributes[attribute]:
            disk.write(attribute, attributes[attribute])
    # one may have changed another
    for attribute, value in attributes.items():
        if (now := disk.read(attribute)) != value:
            raise UblkdError(f"{disk.path}: {attribute} does not keep {value}: it is {now or 'unreadable'}")


def _put_back(disk: Disk, before: Mapping[str, str], moved: bool, cpus: list[int] | None) -> str:
    """What can't be, and why."""
    left = []
    if moved:
        try:
            # it may be the move that failed
            disk.ask_ublkd()
            if workers.setting(disk) != cpus:
                workers.move(disk, cpus)
        except UblkdError as error:
            left.append(error.message)
    for attribute in ATTRIBUTES:
        try:
            _write(disk, {attribute: before[attribute]} if attribute in before else {})
        except UblkdError as error:
            left.append(error.message)
    return "; ".join(left)


def apply(disk: Disk, plan: Plan) -> Originals:
    """Make the changes and store what was there before: it. What an earlier record says stays in it."""
    try:
        earlier = record.load(disk)
    except record.Stale:
        earlier = None  # its disk is gone, and nothing can be put back there any more
    move = plan.cpus is not None
    before = Originals(disk.snapshot(), move, workers.setting(disk) if move else None)
    # First all of it: if this process is killed half-way, --undo still knows.
    record.store(disk, earlier.under(before) if earlier else before)
    try:
        switch(disk, plan.attributes(), move, plan.cpus)
    except BaseException:
        record.store(disk, earlier)
        raise
    after = disk.snapshot()
    changed = {key: value for key, value in before.attributes.items() if after.get(key) != value}
    before.attributes = changed
    originals = earlier.under(before) if earlier else before
    record.store(disk, originals)
    return originals


def undo(disk: Disk) -> tuple[Originals, dict[str, str]]:
    """Put back what was there before the first apply(): that, and what was there until now."""
    originals = record.load(disk)
    if originals is None:
        raise UblkdError(f"there is nothing to undo for {disk.path}: no record {record.path_of(disk)}")
    now = disk.snapshot()
    switch(disk, originals.attributes, originals.moved, originals.cpus)
    record.store(disk, None)
    return originals, now


@contextmanager
def reverting(disk: Disk) -> Iterator[None]:
    """To the end of the block the disk may be changed by apply(); then it is as it was, and so is its record."""
    try:
        earlier = record.load(disk)
    except record.Stale:
        earlier = None
    before, cpus, placed = disk.snapshot(), workers.setting(disk), disk.placed()
    try:
        yield
    finally:
        moved = workers.setting(disk) != cpus or disk.placed() != placed
        switch(disk, before, moved, cpus)
        record.store(disk, earlier)
