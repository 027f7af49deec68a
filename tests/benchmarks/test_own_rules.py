"""The optimizers that the benchmarks alone have."""

from __future__ import annotations

import torch

import neurms
from benchmarks.own_rules import MomentumFirst, create


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
