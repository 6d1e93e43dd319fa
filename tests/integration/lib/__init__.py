# SPDX-License-Identifier: Apache-2.0
"""What the integration tests share: served devices, the command line, disks, traces, leaks."""
