# SPDX-License-Identifier: Apache-2.0
"""What scripts/bench is made of: subjects are set up, fio measures them in turns, a report compares them."""
