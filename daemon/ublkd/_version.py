# SPDX-License-Identifier: Apache-2.0
"""The one version string."""

__version__ = "0.1.0"
