# SPDX-License-Identifier: Apache-2.0
"""The ways a run can end, and the exit status that stands for each."""

from __future__ import annotations

from dataclasses import dataclass, field

PANIC = 121
HANG = 122
LOST = 123
DIRTY = 124
CANNOT_START = 125

EXIT_STATUS_HELP = f"""\
exit status:
  the command's own status, or one of these, each with a line on stderr that begins with "vm:"
  {PANIC}  the guest kernel panicked or oopsed; what it printed last may be lost
  {HANG}  the command was still running after --timeout seconds
  {LOST}  the VM ended, or was killed, without a status from the command
  {DIRTY}  the command succeeded, but the guest's kernel log has a WARNING, BUG, lockdep report or the like
  {CANNOT_START}  the VM could not be started, or didn't boot
"""


class VMError(Exception):
    """The VM could not be started. The message says what to do next."""


@dataclass
class Outcome:
    """How a run ended: its exit status, and what to tell the user if that isn't the command's own status."""

    status: int
    message: str = ""
    details: list[str] = field(default_factory=list)

    @property
    def from_command(self) -> bool:
        """Whether the status is the command's own."""
        return not self.message
