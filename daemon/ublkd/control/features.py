# SPDX-License-Identifier: Apache-2.0
"""What the loaded driver can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ublkd.control import uapi

if TYPE_CHECKING:
    from ublkd.control.commands import Control


class Features(int):
    """The driver's UBLK_F_* bits. `assumed` is true if it could not be asked."""

    assumed: bool = False

    def names(self) -> list[str]:
        """Names without the UBLK_F_ prefix, lowest bit first."""
        return uapi.flag_names(self)

    def has(self, name: str) -> bool:
        """Whether a flag, by name, is supported."""
        return bool(self & uapi.FLAGS[name].value)


# Drivers before GET_FEATURES (6.5): what all of them have. Zero copy was only reserved then.
FALLBACK = Features(
    uapi.F_URING_CMD_COMP_IN_TASK | uapi.F_NEED_GET_DATA | uapi.F_USER_RECOVERY | uapi.F_USER_RECOVERY_REISSUE
)
FALLBACK.assumed = True


def probe(ctrl: Control) -> Features:
    """The features of the driver that ctrl talks to."""
    return ctrl.get_features()
