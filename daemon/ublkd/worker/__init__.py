# SPDX-License-Identifier: Apache-2.0
"""What runs in a worker process: one queue, one pinned CPU, one io_uring."""
