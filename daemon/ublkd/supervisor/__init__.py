# SPDX-License-Identifier: Apache-2.0
"""The supervisor: one process per device, which creates it and looks after its workers."""

from ublkd.supervisor.lifecycle import plan, recover, resize, run_background, run_foreground, stop_device, upgrade

__all__ = ["plan", "recover", "resize", "run_background", "run_foreground", "stop_device", "upgrade"]
