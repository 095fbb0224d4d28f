"""Adapters that stores are made of and changed with."""

import pytest

from tests.compressor.change.made import SHAPES


@pytest.fixture(scope="session")
def some(make_factors):
    """Adapters of one family: `some(first, last)` → name → factors. Always the same by name."""
    made = make_factors(60, kind="real", ranks=(2, 4, 3), shapes=SHAPES, shared=3)
    return lambda first, last: {f"adapter-{i:02d}": dict(made[i]) for i in range(first, last)}
