"""The optimizers that the benchmarks alone have."""

from __future__ import annotations

import torch

import neurms
from benchmarks.own_rules import Moments, MomentumFirst, ProbedMoments, TwoRates, create
from neurms.core.structures.base import Context
from neurms.core.structures.gradient_moments import GradientMoments


def trained(make: type[neurms.SharedBasis], momentum: float) -> torch.Tensor:
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 4, bias=False)
    optimizer = make(model, lr=0.01, rank=2, momentum=momentum, head="rule")
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
    return model.weight.detach()


def test_momentum_first_differs_from_the_paper_s_order_by_the_momentum_alone() -> None:
    assert torch.equal(trained(MomentumFirst, 0.0), trained(neurms.SharedBasis, 0.0))
    assert not torch.equal(trained(MomentumFirst, 0.9), trained(neurms.SharedBasis, 0.9))


def test_own_names_are_made_beside_the_library_s() -> None:
    model = torch.nn.Linear(2, 2)
    assert type(create("shared_basis, momentum first", model, lr=0.1)) is MomentumFirst
    assert type(create("racs", model, lr=0.1)) is neurms.RACS


def test_orthogonal_probes_would_be_the_exact_moments() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(6, 8)
    exact, probed = GradientMoments(), ProbedMoments(probes=4096)
    made = [
        structure(gradient, structure.init(gradient), Context(step=1))
        for structure in (exact, probed)
    ]
    # The mean of 4,096 squares is off by some sqrt(2 / 4096).
    torch.testing.assert_close(made[1], made[0], rtol=0.08, atol=0.02)
    again = probed(gradient, probed.init(gradient), Context(step=1))
    assert torch.equal(made[1], again)


def test_moments_leave_head_and_biases_to_the_fallback() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    rules = {row.name: row.rule for row in Moments(model).plan()}
    assert rules.pop("0.weight") == "moments"
    assert set(rules.values()) == {"fallback"}


def test_two_rates_split_where_the_other_rules_do() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    optimizer = TwoRates(model, 0.1, (0.5, 0.9), 0.2, (0.7, 0.9), fused=True)
    hidden, rest = optimizer.param_groups
    assert [p.shape for p in hidden["params"]] == [(4, 3)]
    assert {p.shape for p in rest["params"]} == {(4,), (2, 4), (2,)}
    assert (hidden["lr"], hidden["betas"], rest["lr"]) == (0.1, (0.5, 0.9), 0.2)
    assert hidden["fused"]
    assert rest["fused"]
