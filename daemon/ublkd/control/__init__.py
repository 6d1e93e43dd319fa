# SPDX-License-Identifier: Apache-2.0
"""/dev/ublk-control: one method per command, each with a bounded wait."""
