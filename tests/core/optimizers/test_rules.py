"""The table of rules: each name leads to the class of its own module."""

from __future__ import annotations

import pytest

from neurms.core.catalog import HOMES
from neurms.core.optimizers.rules import rule_class, rule_names


@pytest.mark.parametrize("name", HOMES)
def test_a_name_is_a_class(name: str) -> None:
    found = rule_class(name)
    assert found.rule == name
    assert f"{found.__module__}.{found.__name__}" == HOMES[name]


def test_the_catalog_is_announced() -> None:
    assert rule_names()[: len(HOMES)] == list(HOMES)


@pytest.mark.parametrize("name", ["adamw", "NeuRMS", "base"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"rule='{name}' is not known; choose one of .*'neurms'"):
        rule_class(name)
