"""The optimizers that the benchmarks alone have."""

from __future__ import annotations

import torch

import neurms
from benchmarks.own_rules import (
    Moments,
    MomentumFirst,
    NormalizedLength,
    ProbedMoments,
    TwoRates,
    create,
)
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


def test_normalized_steps_have_the_length_of_their_rate_and_neurms_s_direction() -> None:
    weights = {}
    for rule, lr in ((neurms.NeuRMS, 1e-3), (NormalizedLength, 1e-2)):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = rule(model, lr=lr)
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        weights[rule] = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    for plain, scaled in zip(*weights.values(), strict=True):
        cosine = torch.cosine_similarity(plain.flatten(), scaled.flatten(), 0)
        torch.testing.assert_close(cosine, torch.ones(()), rtol=1e-5, atol=0)
    for weight in weights[NormalizedLength][::2]:
        # At the first step the corrected average is the step's own RMS.
        torch.testing.assert_close(weight.square().mean().sqrt().item(), 1e-2, rtol=1e-4, atol=0)


def test_normalized_lengths_follow_their_average_through_a_schedule() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2, bias=False)
    twin = torch.nn.Linear(3, 2, bias=False)
    twin.load_state_dict(model.state_dict())
    optimizer = NormalizedLength(model, lr=1e-2, head="rule")
    plain = neurms.NeuRMS(twin, lr=1.0, head="rule")
    average = 0.0
    for step in range(1, 6):
        optimizer.param_groups[0]["lr"] = lr = 1e-2 / step
        inputs = torch.randn(5, 3)
        twin.load_state_dict(model.state_dict())
        before = model.weight.detach().clone()
        for net, rule in ((model, optimizer), (twin, plain)):
            rule.zero_grad()
            net(inputs).square().sum().backward()
            rule.step()
        moved = (twin.weight - before).detach()
        average = 0.9 * average + 0.1 * moved.square().mean().sqrt().item()
        wanted = moved * lr / (average / (1 - 0.9**step))
        torch.testing.assert_close(model.weight - before, wanted, rtol=1e-3, atol=1e-6)
