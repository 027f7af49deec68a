"""A recipe is its transforms, one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from neurms.core.optimizers.base import PreconditionedOptimizer
from neurms.core.optimizers.recipe import Recipe, stack_states
from neurms.core.structures.base import Context, Transform
from neurms.core.structures.diagonal import Diagonal
from neurms.core.structures.one_sided_diagonal import RowNormalized
from neurms.core.transforms.momentum import Momentum
from neurms.core.transforms.safeguards import TrustRatio


def chain(*transforms: Transform, **settings: Any) -> Recipe:
    return Recipe(transforms, **settings)


def test_transforms_run_in_order() -> None:
    gradient = torch.randn(4, 3)
    averaged = chain(RowNormalized(), Momentum(0.5), scale=2.0)
    update = averaged.update(gradient, averaged.init(gradient), Context(1))
    torch.testing.assert_close(update.norm(dim=1), torch.ones(4))
    normalized = chain(Momentum(0.5), RowNormalized(), scale=2.0)
    update = normalized.update(gradient, normalized.init(gradient), Context(1))
    torch.testing.assert_close(update.norm(dim=1), torch.full((4,), 2.0))


def test_state_is_joint_and_clashes_are_refused() -> None:
    matrix = torch.zeros(4, 3)
    assert chain(Diagonal(), Momentum(0.5)).init(matrix).keys() == {
        "exp_avg",
        "exp_avg_sq",
        "momentum",
    }
    with pytest.raises(ValueError, match=r"both keep \['momentum'\]"):
        chain(Momentum(0.5), Momentum(0.9)).init(matrix)


def test_needs_the_weight_if_a_transform_does() -> None:
    assert chain(Momentum(0.5), TrustRatio()).needs_weight
    assert not chain(Momentum(0.5)).needs_weight


def test_stacked_states() -> None:
    stacked = stack_states([{"a": torch.ones(2)}, {"a": torch.zeros(2)}])
    assert torch.equal(stacked["a"], torch.tensor([[1.0, 1.0], [0.0, 0.0]]))


@pytest.mark.parametrize(
    ("decay", "expected"), [("before", 0.9 * 2 - 0.3), ("after", 0.9 * (2 - 0.3)), ("none", 1.7)]
)
def test_where_the_decay_enters(decay: str, expected: float) -> None:
    class Plain(PreconditionedOptimizer):
        rule = "plain"

        def __init__(self, params: object) -> None:
            super().__init__(params, {"lr": 0.1}, {"weight_decay": 1.0})  # type: ignore[arg-type]

        @classmethod
        def recipe(cls, settings: object) -> Recipe:
            return chain(Momentum(0.0), decay=decay)

    weight = nn.Parameter(torch.full((2, 2), 2.0))
    weight.grad = torch.full((2, 2), 3.0)
    Plain([weight]).step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), expected))
