# SPDX-License-Identifier: Apache-2.0
"""What scripts/tune is made of: a disk is read, rules say what should change, a record makes it undoable."""
