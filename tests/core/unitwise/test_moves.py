"""How factors reach a weight: the two ways of writing agree, and write nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neurms.core.ground.layout import default_layout, layout_of
from neurms.core.taps.products import Product
from neurms.core.unitwise.moves import Move, write_moves_
from neurms.core.unitwise.neurms import NeuRMS
from neurms.core.unitwise.products import write_product_
from neurms.core.unitwise.rule import UnitwiseRule
from neurms.core.unitwise.statistics import Factors


def rule_of(**settings: Any) -> UnitwiseRule:
    return UnitwiseRule.of({**NeuRMS.default_settings(), "variant": "F", **settings})


def move_of(
    parameter: Tensor,
    gradient: Tensor,
    module: nn.Module | None,
    factors: Factors,
    velocity: Tensor | None = None,
    decay: float = 1.0,
) -> Move:
    layout = layout_of(module, "weight") if module else None
    layout = layout or default_layout(parameter)
    return Move(parameter, gradient, velocity, layout, factors, 0.1, decay, parameter)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("variant", ["U", "B", "F"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("coupling", ["gradient", "gradient+velocity"])
@pytest.mark.parametrize("decay", [1.0, 0.95])
def test_the_product_in_backward_is_the_gradient_at_the_step(
    decay: float, coupling: str, momentum: float, variant: str
) -> None:
    d, h, start = normal(6, 4), normal(6, 3), normal(4, 3)
    s, c = torch.rand(4).double(), torch.rand(3).double() if variant == "F" else None
    rule = rule_of(variant=variant, momentum_coupling=coupling, momentum=momentum)
    by_step, by_product = start.clone(), start.clone()
    one, other = (normal(4, 3),) * 2 if momentum else (None, None)
    other = None if other is None else other.clone()
    move = move_of(by_step, d.T @ h, nn.Linear(3, 4).double(), (s, c), one, decay)
    write_moves_([move], rule)
    write_product_(by_product, Product(d, h), (s, c), rule, other, 0.1, decay)
    torch.testing.assert_close(by_step, by_product, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(one, other)
    assert not torch.equal(by_step, start)


@pytest.mark.parametrize("agc", [None, 0.01])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradients_and_factors_are_only_read(momentum: float, agc: float | None) -> None:
    weight, gradient, s, c = normal(4, 3), normal(4, 3), normal(4).abs(), normal(3).abs()
    kept = [t.clone() for t in (gradient, s, c)]
    velocity = torch.zeros_like(weight) if momentum else None
    rule = rule_of(momentum=momentum, agc=agc)
    write_moves_([move_of(weight, gradient, nn.Linear(3, 4), (s, c), velocity)], rule)
    assert all(map(torch.equal, kept, (gradient, s, c)))
    errors, inputs = normal(5, 4), normal(5, 3)
    kept = [t.clone() for t in (errors, inputs)]
    write_product_(weight, Product(errors, inputs), (s, c), rule, velocity, 0.1, 1.0)
    assert all(map(torch.equal, kept, (errors, inputs)))


def test_agc_bounds_each_row_of_the_update_before_lr() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    gradient = torch.tensor([[6.0, 8.0], [6.0, 8.0], [0.3, 0.4]], dtype=torch.float64)
    before = weight.clone()
    ones = torch.ones(3, dtype=torch.float64)
    move = move_of(weight, gradient, nn.Linear(2, 3), (ones, None))
    write_moves_([move], rule_of(agc=0.5, variant="U"))
    lengths = ((before - weight) / 0.1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([2.5, 0.5e-3, 0.5], dtype=torch.float64))


def test_a_bias_is_scaled_by_s_and_not_clipped() -> None:
    bias, gradient, s = torch.ones(4), torch.arange(4.0), torch.tensor([1.0, 2.0, 3.0, 4.0])
    write_moves_([move_of(bias, gradient, None, (s, None))], rule_of(agc=1e-6))
    torch.testing.assert_close(bias, 1 - 0.1 * s * gradient)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_odd_strides_are_written_through(kind: type[nn.Module], groups: int) -> None:
    module = kind(4, 6, (3, 2), groups=groups).double()
    start, gradient = module.weight.detach(), normal(*module.weight.shape)
    odd = start.transpose(2, 3).contiguous().transpose(2, 3)
    velocity = torch.zeros_like(odd)
    assert velocity.stride() == odd.stride() != start.stride()
    plain, plainly = start.clone(), torch.zeros_like(start)
    s, c = torch.rand(6).double(), torch.rand(4).double()
    pair = ((plain, plainly), (odd, velocity))
    for _ in range(2):
        moves = [move_of(w, gradient, module, (s, c), v) for w, v in pair]
        write_moves_(moves, rule_of(momentum=0.9))
    torch.testing.assert_close(odd, plain)
    torch.testing.assert_close(velocity, plainly)
    assert not torch.equal(plain, start)
