# SPDX-License-Identifier: Apache-2.0
"""``python -m vm`` with ``tests`` on the path: the same as ``scripts/vm``."""

import sys

from .cli import main

sys.exit(main())
