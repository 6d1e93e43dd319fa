# SPDX-License-Identifier: Apache-2.0
"""What the tests with hostile input share. UBLKD_FUZZ_EXAMPLES makes them long, and random."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_MANY = int(os.environ.get("UBLKD_FUZZ_EXAMPLES", "0"))

fuzz = settings(
    max_examples=_MANY or 100,
    derandomize=not _MANY,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 1, 4096, 1 << 31, 1 << 32, 1 << 63, 1 << 64, 10**400, -(1 << 63) - 1]),
)
TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["", "\0", "a\0b", "-", "--", "/", "..", "\n", "\udcff", "9" * 5000, "1." + "0" * 5000, "0-99999999"]
    ),
)
SCALARS: st.SearchStrategy[Any] = st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), TEXTS)
JSON: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)
# deep enough for any parser that calls itself
NESTED = ["[" * 100_000, '{"a":' * 100_000, "[" * 50_000 + "]" * 50_000]
