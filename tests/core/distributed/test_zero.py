"""Every rule inside torch's ZeroRedundancyOptimizer: as alone, and its state serves elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import neurms
from neurms.core.optimizers.registry import is_torch
from tests.core.distributed import trainings, zero
from tests.core.distributed.ranks import Ranks

SETTINGS: dict[str, dict[str, Any]] = {
    **trainings.NEEDS,
    "neurms": {"variant": "P"},
    "alice": {"rank": 3, "leading": 1, "interval": 2},
}
RULES = [name for name in neurms.available() if not is_torch(name)]
DRAWING = ("adapprox", "alice", "apollo", "low_rank_soap")
"""These seed what they draw by parameters' names, of which ZeroRedundancyOptimizer gives none."""


def assert_equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def settings_of(rule: str) -> dict[str, Any]:
    return {"lr": 0.01, **SETTINGS.get(rule, {})}


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in DRAWING])
def test_in_parts_as_alone(pool: Ranks, rule: str) -> None:
    for found in pool.run(2, zero.beside_itself, rule=rule, settings=settings_of(rule)):
        assert_equal(found["parts"], found["alone"])


@pytest.mark.parametrize("rule", ["rmnp", "racs", "soap"])
def test_parameters_that_are_views_of_buckets(pool: Ranks, rule: str) -> None:
    settings = settings_of(rule)
    for found in pool.run(2, zero.beside_itself, rule=rule, settings=settings, views=True):
        assert_equal(found["parts"], found["alone"])


@pytest.mark.parametrize("rule", RULES)
def test_a_state_goes_on_in_the_plain_optimizer_and_back(pool: Ranks, rule: str) -> None:
    for found in pool.run(2, zero.handed_over, rule=rule, settings=settings_of(rule)):
        assert_equal(found["alone"], found["as it was"])
        assert_equal(found["parts"], found["as it was"])


@pytest.mark.parametrize("variant", ["U", "B", "F"])
def test_what_reads_layers_names_the_cure(pool: Ranks, variant: str) -> None:
    for text in pool.run(2, zero.refused, settings={"variant": variant}):
        assert "pass the model itself" in text
        assert 'variant="P"' in text


def test_names_that_were_not_divided_are_refused(pool: Ranks) -> None:
    for text in pool.run(2, zero.refused, settings={"variant": "P"}, named=True):
        assert "param_names holds 8 names" in text
        assert "leave param_names out" in text
