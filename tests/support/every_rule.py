"""A test for every rule; by default, of the recommended one alone."""

import pytest

every_rule = pytest.mark.parametrize(
    "rule", ["centered", *(pytest.param(r, marks=pytest.mark.slow) for r in ("paper", "official"))]
)
