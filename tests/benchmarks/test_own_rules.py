"""The optimizers that the benchmarks alone have."""

from __future__ import annotations

import torch

import neurms
from benchmarks.own_rules import (
    MomentumFirst,
    TwoRates,
    create,
)


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


def test_moments_leave_the_head_to_the_fallback() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    optimizer = create("moments", model, lr=0.1)
    rules = {row.name: row.rule for row in optimizer.plan()}
    assert rules == {
        "0.weight": "neurms",
        "0.bias": "neurms",
        "2.weight": "fallback",
        "2.bias": "fallback",
    }
    assert optimizer.param_groups[0]["variant"] == "P"
    named = create("neurms, normalized", model, lr=0.1)
    assert named.param_groups[0]["normalize"] == "rms"


def test_two_rates_split_where_the_other_rules_do() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    optimizer = TwoRates(model, 0.1, (0.5, 0.9), 0.2, (0.7, 0.9), fused=True)
    hidden, rest = optimizer.param_groups
    assert [p.shape for p in hidden["params"]] == [(4, 3)]
    assert {p.shape for p in rest["params"]} == {(4,), (2, 4), (2,)}
    assert (hidden["lr"], hidden["betas"], rest["lr"]) == (0.1, (0.5, 0.9), 0.2)
    assert hidden["fused"]
    assert rest["fused"]
