"""The table of rules: each name leads to the class of its own module."""

from __future__ import annotations

import pytest

from neurms.core.optimizers.rules import RULES, rule_class


@pytest.mark.parametrize("name", RULES)
def test_a_name_is_a_module(name: str) -> None:
    found = rule_class(name)
    assert found.rule == name
    assert (found.__module__, found.__name__) == (f"neurms.core.optimizers.{name}", RULES[name])


@pytest.mark.parametrize("name", ["adamw", "NeuRMS", "base"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"rule='{name}' is not known; choose one of .*'neurms'"):
        rule_class(name)
