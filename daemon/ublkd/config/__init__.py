# SPDX-License-Identifier: Apache-2.0
"""Settings: declared in schema, read by loader, written out by generate."""
