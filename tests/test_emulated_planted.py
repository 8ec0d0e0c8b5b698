"""Planted bugs are noticed: one for each kind of check (results, bank conflicts, divergence, races, bounds)."""

import pytest
from emulator.planted import BUGS, check_is_noticed


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_noticed(name, tmp_path):
    check_is_noticed(BUGS[name], tmp_path)
