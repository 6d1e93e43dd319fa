# SPDX-License-Identifier: Apache-2.0
"""Who is put through the power cuts, for the host's side and the guest's."""

MIB = 1 << 20

# subject: (server, file system, MiB of the backing file)
SUBJECTS = {
    "ublkd-ext4": ("ublkd", "ext4", 48),
    "ublkd-xfs": ("ublkd", "xfs", 304),
    "ublkd-raw": ("ublkd", "raw", 16),
    "loop-ext4": ("loop", "ext4", 48),
    "loop-xfs": ("loop", "xfs", 304),
    "loop-raw": ("loop", "raw", 16),
    # acknowledges flushes without one: must be caught, or the proof proves nothing
    "hasty-raw": ("hasty", "raw", 16),
}


def disk_bytes(subject: str) -> int:
    """Size of the disk that its backing file is on."""
    return (SUBJECTS[subject][2] + 48) * MIB
