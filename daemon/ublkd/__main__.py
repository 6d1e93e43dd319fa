# SPDX-License-Identifier: Apache-2.0
"""`python -m ublkd` and the command `ublkd`."""

import sys


def main() -> None:
    """Run the command line and exit with its status."""
    from ublkd.cli import main as run

    sys.exit(run())


if __name__ == "__main__":
    main()
