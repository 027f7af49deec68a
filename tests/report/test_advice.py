"""Advice on layers whose answer is known by construction."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neurms.callbacks.profiler import profile

M, N, ROWS, STEPS = 48, 40, 64, 8

Signals = Callable[[torch.Generator], tuple[Tensor, Tensor]]


def scales(count: int, decades: float) -> Tensor:
    """Evenly spread magnitudes in an order that says nothing."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    return torch.logspace(-decades / 2, decades / 2, count)[order]


def advised(signals: Signals, optimizer: Any = None) -> tuple[str, str]:
    """Give a linear layer these D and H for some steps and return its advice."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Sequential(nn.Linear(N, M, bias=False))
    made = optimizer(layer) if optimizer else torch.optim.SGD(layer.parameters(), lr=0.0)
    with profile(layer, made, every_n_steps=1, warmup_steps=0, beta=0.8) as profiler:
        for _ in range(STEPS):
            errors, inputs = signals(generator)
            (layer(inputs) * errors).sum().backward()
            made.step()
            made.zero_grad()
    (advice,) = profiler.report().advice()
    return advice.rule, advice.reason


def independent(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """D and H know nothing of each other: E[d^2 h^2] = E[d^2] E[h^2] exactly."""
    errors = torch.randn(ROWS, M, generator=generator) * scales(M, 2)
    return errors, torch.randn(ROWS, N, generator=generator) * scales(N, 2)


def taking_turns(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Each eighth of the units is wrong only where its own eighth of the inputs is on."""
    turn = torch.arange(ROWS)[:, None] % 8
    errors = torch.randn(ROWS, M, generator=generator).abs() * (turn == torch.arange(M) % 8)
    inputs = 1 + 0.1 * torch.randn(ROWS, N, generator=generator)
    return errors * scales(M, 2), inputs * (turn == torch.arange(N) % 8)


def whitened(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """G has orthogonal rows of one size: v and u are flat, and nothing else sticks out."""
    q, _ = torch.linalg.qr(torch.randn(M, M, generator=generator))
    errors = torch.eye(M).repeat(1, 1)[:, :M]
    inputs = q[:, :N] * N**0.5
    return errors, inputs


def collinear(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """All rows of G point one way and have one size."""
    direction = torch.randn(N, generator=generator).sign()
    errors = torch.ones(ROWS, M) + 0.01 * torch.randn(ROWS, M, generator=generator)
    return errors, direction.repeat(ROWS, 1) * torch.randn(ROWS, 1, generator=generator).abs()


def test_factoring_statistics_call_for_f() -> None:
    rule, reason = advised(independent)
    assert rule == "F"
    assert "the factorisation holds" in reason
    assert "over 8 steps" in reason
    rho, expected = map(float, re.findall(r"\d+\.\d+", reason))
    assert 0.7 * expected <= rho
    assert "if the factors were exact" in reason
    assert "at most" not in reason


def test_correlated_statistics_of_uneven_units_call_for_u() -> None:
    rule, reason = advised(taking_turns)
    assert rule == "U"
    assert "does not hold" in reason
    assert "-fold in v" in reason


def test_orthogonal_rows_call_for_rmnp() -> None:
    rule, reason = advised(whitened)
    assert rule == "RMNP"
    assert "r_avg" in reason


def test_gradients_that_foretell_themselves_call_for_racs() -> None:
    """G^2 has rank one by margins that D and H, which cancel over rows, do not show."""
    row, column = scales(M, 2), scales(N, 2)

    def cancelling(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        # Pairs of rows whose products cancel hide what is left over from D^2 and H^2.
        noise = 100 * torch.randn(ROWS, M, generator=generator)
        loud = 100 * torch.randn(ROWS, N, generator=generator)
        errors = torch.cat([noise, -noise, row * torch.randn(ROWS, M, generator=generator)])
        inputs = torch.cat([loud, loud, column * torch.randn(ROWS, N, generator=generator)])
        return errors.double(), inputs.double()

    generator = torch.Generator().manual_seed(0)
    layer = nn.Sequential(nn.Linear(N, M, bias=False).double())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    with profile(layer, optimizer, every_n_steps=1, warmup_steps=0, beta=0.8) as profiler:
        for _ in range(STEPS):
            errors, inputs = cancelling(generator)
            (layer(inputs) * errors).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    (advice,) = profiler.report().advice()
    assert advice.rule == "P", advice.reason
    assert "foretell" in advice.reason


def test_where_no_premise_holds_adamw_has_none() -> None:
    rule, reason = advised(collinear)
    assert rule == "AdamW"
    assert "r_avg" in reason


def test_embeddings_single_units_and_short_runs() -> None:
    model = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with profile(model, optimizer, every_n_steps=1, warmup_steps=0) as profiler:
        for _ in range(4):
            model(torch.arange(7)).sum().backward()
            optimizer.step()
    assert [advice.rule for advice in profiler.report().advice()] == ["AdamW", "AdamW"]

    layer = nn.Sequential(nn.Linear(5, 3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with profile(layer, optimizer, every_n_steps=1, warmup_steps=0) as profiler:
        layer(torch.ones(2, 5)).sum().backward()
        optimizer.step()
    (advice,) = profiler.report().advice()
    assert advice.rule == "undecided"
    assert "1 profiled steps; 3 are needed" in str(advice)


@pytest.mark.parametrize("decades", [1.0, 2.0, 4.0])
def test_exact_factors_show_the_expected_rho(decades: float) -> None:
    """Normal entries of variance v_i u_j: rho comes out as expected, far below 1."""
    from neurms.core.diagnostics.factorization import expected_correlation, factor_correlation
    from neurms.core.ground.layout import Layout

    generator = torch.Generator().manual_seed(0)
    layout = Layout((800, 600), (0,), (1,))
    v, u = scales(800, decades), scales(600, decades)
    found = []
    for _ in range(8):
        g = torch.randn(800, 600, generator=generator) * (v[:, None] * u).sqrt()
        found.append(float(factor_correlation(g, layout, v, u)))
    expected = float(expected_correlation(layout, v, u))
    assert sum(found) / len(found) == pytest.approx(expected, rel=0.03)
    assert expected < 3**-0.5
    # Typical, no bound: gradients lie on both sides of it, and nothing may call it a maximum.
    assert min(found) < expected < max(found)
