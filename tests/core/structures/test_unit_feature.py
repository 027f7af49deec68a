"""C (x) S: against dense Kronecker products, and the contract with moments beside gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from neurms.core.optimizers.plan import tensor_bytes
from neurms.core.structures.base import Context, Moments, State
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.testing import TransformContract, gradients


@dataclass(frozen=True)
class FromGradient(UnitFeatureDiagonal):
    """Takes its moments from the gradient itself, so that the contract, which has no D, applies."""

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        squares = update.square()
        moments = Moments(squares.mean(-1), squares.mean(-2))
        return super().__call__(update, state, replace(context, moments=moments))


class TestUnits(TransformContract):
    transform = FromGradient()
    scale_invariant = True


class TestUnitsAndFeatures(TransformContract):
    # Whitened on both sides, a gradient that grows k times gives an update of 1/k.
    transform = FromGradient(factored=True)
    scale_invariant = False


class TestRelative(TransformContract):
    transform = FromGradient(clip="relative", kappa=2.0)
    scale_invariant = True


def moments(m: int, n: int, steps: int) -> list[Moments]:
    generator = torch.Generator().manual_seed(5)
    return [
        Moments(
            torch.rand(m, generator=generator, dtype=torch.float64) * 10,
            torch.rand(n, generator=generator, dtype=torch.float64) / 10,
        )
        for _ in range(steps)
    ]


def run(transform: UnitFeatureDiagonal, steps: Tensor, seen: list[Moments]) -> tuple[Tensor, State]:
    state = transform.init(steps[0])
    for number, (gradient, moment) in enumerate(zip(steps, seen, strict=True), 1):
        update = transform(gradient, state, Context(number, moments=moment))
    return update, state


@pytest.mark.parametrize("factored", [False, True], ids=["I (x) S", "C (x) S"])
@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("bounds", [(0.0, 1e9), (0.5, 0.8)], ids=["free", "clipped"])
def test_equals_the_dense_kronecker_structure(
    bounds: tuple[float, float], correction: bool, factored: bool
) -> None:
    m, n = 4, 3
    steps, seen = gradients(m, n, steps=3), moments(m, n, 3)
    transform = UnitFeatureDiagonal(
        beta=0.7,
        eps=1e-3,
        s_min=bounds[0],
        s_max=bounds[1],
        c_max=3.0,
        bias_correction=correction,
        factored=factored,
    )
    update, state = run(transform, steps, seen)

    def averaged(samples: list[Tensor]) -> Tensor:
        weights = torch.tensor([0.7**2, 0.7, 1.0], dtype=torch.float64) * 0.3
        mean = (torch.stack(samples) * weights[:, None]).sum(0)
        return mean / (1 - 0.7**3) if correction else mean

    s = ((averaged([x.units for x in seen]) + 1e-3) ** -0.5).clip(*bounds)
    c = ((averaged([x.features for x in seen]) + 1e-3) ** -0.5).clip(0, 3.0)
    c = c if factored else torch.ones(n, dtype=torch.float64)
    # vec stacks columns: vec(S G C) = (C (x) S) vec(G).
    dense = torch.kron(torch.diag(c), torch.diag(s)) @ steps[-1].mT.reshape(-1)
    torch.testing.assert_close(update, dense.reshape(n, m).mT, rtol=1e-12, atol=1e-14)
    assert ("u" in state) == factored


def test_fresh_statistics_bound_every_entry_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    d = torch.randn(9, 4, generator=generator, dtype=torch.float64) * 1e-3
    h = torch.randn(9, 5, generator=generator, dtype=torch.float64) * 50
    transform = UnitFeatureDiagonal(factored=True, eps=0.0, v_min=1e-30, s_max=1e9, c_max=1e9)
    fresh = Moments(d.square().mean(0), h.square().mean(0))
    update, _ = run(transform, (d.T @ h / 9)[None], [fresh])
    assert update.abs().max() <= 1.0
    one = Moments(d[0].square(), h[0].square())
    update, _ = run(transform, torch.outer(d[0], h[0])[None], [one])
    torch.testing.assert_close(update.abs(), torch.ones(4, 5, dtype=torch.float64))


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_state_is_m_or_m_plus_n_numbers(batch: tuple[int, ...], factored: bool) -> None:
    state = UnitFeatureDiagonal(factored=factored).init(torch.empty(*batch, 7, 5, device="meta"))
    copies = batch[0] if batch else 1
    assert tensor_bytes(state) == 4 * copies * (7 + 5 * factored)


def test_relative_clip_is_within_kappa_of_the_median() -> None:
    transform = UnitFeatureDiagonal(beta=0.0, eps=0.0, clip="relative", kappa=3.0)
    v = torch.tensor([1.0, 4.0, 4.0, 9.0, 1e8], dtype=torch.float64)
    s, _ = transform.factors({"v": v}, 1)
    torch.testing.assert_close(s, torch.tensor([1, 0.5, 0.5, 1 / 3, 0.5 / 3], dtype=torch.float64))
    larger, _ = transform.factors({"v": 1e6 * v}, 1)
    torch.testing.assert_close(larger, s / 1e3)


def test_relative_clip_with_dead_units() -> None:
    # More than half of the units dead: the median is theirs, and nothing is infinite.
    transform = UnitFeatureDiagonal(clip="relative", kappa=10.0)
    s, _ = transform.factors({"v": torch.tensor([0.0, 0.0, 0.0, 1.0])}, 1)
    assert s.isfinite().all()
    assert s.tolist() == pytest.approx([1e4, 1e4, 1e4, 1e3])


def test_bias_correction_is_exact_in_float64_however_long() -> None:
    transform = UnitFeatureDiagonal(beta=0.999)
    v = torch.full((3,), 1 - 0.999**2, dtype=torch.float64)
    s, _ = transform.factors({"v": v}, 2)
    torch.testing.assert_close(s, ((torch.ones(3) + 1e-8) ** -0.5).double(), rtol=1e-7, atol=0)
    exact = (v / (1 - 0.999**2) + 1e-8) ** -0.5
    torch.testing.assert_close(s, exact, rtol=1e-15, atol=0)


def test_moments_that_were_not_seen_are_left_out() -> None:
    transform = UnitFeatureDiagonal(factored=True, beta=0.5)
    gradient = torch.ones(2, 3)
    state = transform.init(gradient)
    transform.observe(gradient, state, Context(1, moments=Moments(units=torch.ones(2))))
    assert state["v"].tolist() == [0.5, 0.5]
    assert state["u"].tolist() == [0.0] * 3
    with pytest.raises(ValueError, match="none were given"):
        transform.observe(gradient, state, Context(2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1.0}, "beta=1.0"),
        ({"eps": -1.0}, "eps=-1.0"),
        ({"eps": 0, "v_min": 0}, "eps=0 and v_min=0"),
        ({"s_min": 3, "s_max": 2}, "s_min=3.*s_max=2"),
        ({"c_min": 3, "c_max": 2}, "c_min=3.*c_max=2"),
        ({"s_max": float("inf")}, "s_max=inf"),
        ({"kappa": 0.0}, "kappa=0.0"),
        ({"clip": "soft"}, "clip='soft'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnitFeatureDiagonal(**settings)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.99])
def test_theorem_1_fails_where_the_factor_knows_the_batch(beta: float) -> None:
    """Its mean update points uphill; with the factor of the batches before, it does not."""
    rare, size = 0.1 * (1 - beta) + 0.001, 4.0 / (0.1 * (1 - beta) + 0.001)
    outcomes = ((rare, size), (1 - rare, -1.0))
    mean_gradient = sum(chance * d for chance, d in outcomes)
    assert mean_gradient > 1.0
    structure = UnitFeatureDiagonal(
        beta=beta, s_min=1e-6, s_max=1e6, bias_correction=False, eps=1e-8
    )

    def mean_update(knows_batch: bool) -> float:
        total = 0.0
        for chance, d in outcomes:
            gradient = torch.tensor([[d]], dtype=torch.float64)
            # v has settled on the common batches when this one comes.
            state = {"v": torch.ones(1, dtype=torch.float64)}
            if knows_batch:
                moments = Moments(units=torch.tensor([d * d], dtype=torch.float64))
                structure.observe(gradient, state, Context(2, moments=moments))
            total += chance * float(structure.precondition(gradient, state, Context(2)))
        return total

    assert mean_update(knows_batch=True) < 0
    assert mean_update(knows_batch=False) == pytest.approx(mean_gradient, rel=1e-6)
