# SPDX-License-Identifier: Apache-2.0
"""The statistics segment: layout (the ABI), segment (its maker), reader (everybody else)."""
