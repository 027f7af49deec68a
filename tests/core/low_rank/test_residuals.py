"""What lies outside of the subspace: the optimal compensation and the scaled residual."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neurms.core.low_rank.residuals import (
    OptimalCompensation,
    Projection,
    ScaledResidual,
    column_scale,
)
from neurms.core.structures.base import Context, State
from neurms.testing import gradients


def projection(gradient: Tensor, basis: Tensor, *, knows_energy: bool = False) -> Projection:
    """Return the step of a structure that normalises the columns of z."""
    z = basis.mT @ gradient
    direction = z / z.square().sum(-2, keepdim=True).sqrt()
    energy = z.square().sum(-2) if knows_energy else None
    return Projection(gradient, basis, z, direction, 0.5 * direction, energy)


def orthonormal(m: int, r: int) -> Tensor:
    return torch.linalg.qr(gradients(m, r, steps=1, seed=4)[0])[0]


def test_compensation_is_the_least_squares_optimum_of_theorem_5_1() -> None:
    m, n, r = 5, 3, 2
    basis = orthonormal(m, r)
    outside = torch.eye(m, dtype=torch.float64) - basis @ basis.mT
    steps = gradients(m, n, steps=4)
    residual = OptimalCompensation(1.0, 0.5, gamma=1e9)
    state = residual.init(steps[0], False)
    fisher = torch.zeros(n, m, m, dtype=torch.float64)
    for number, gradient in enumerate(steps, 1):
        update = residual(projection(gradient, basis), state, Context(number))
        columns = (outside @ gradient).mT
        fisher = 0.5 * fisher + 0.5 * columns[:, :, None] * columns[:, None, :]
    for j in range(n):
        # Minimise ||s U_c U_c^T - F_j|| over s, then apply the pseudo-inverse root of the fit.
        s = torch.linalg.lstsq(outside.reshape(-1, 1), fisher[j].reshape(-1, 1)).solution
        values, vectors = torch.linalg.eigh(s * outside)
        root = vectors[:, r:] @ torch.diag(values[r:].rsqrt()) @ vectors[:, r:].mT
        torch.testing.assert_close(update[:, j], root @ steps[-1, :, j])


@pytest.mark.parametrize("knows_energy", [False, True])
def test_compensation_equals_the_algorithm(knows_energy: bool) -> None:
    steps, basis = gradients(6, 4, steps=5), orthonormal(6, 2)
    residual = OptimalCompensation(0.4, 0.9, 1.01)
    state = residual.init(steps[0], knows_energy)
    assert ("inside_energy" in state) != knows_energy
    p = torch.zeros(4, dtype=torch.float64)
    phi = 0.0
    for number, gradient in enumerate(steps, 1):
        seen = projection(gradient, basis, knows_energy=knows_energy)
        update = residual(seen, state, Context(number))
        p = 0.9 * p + 0.1 * (gradient.square().sum(0) - seen.z.square().sum(0))
        c = 2.0 * (gradient - seen.inside) / p.sqrt()
        eta = 1.01 / max(float(c.norm()) / phi, 1.01) if number > 1 else 1.0
        phi = eta * float(c.norm())
        torch.testing.assert_close(update, 0.4 * eta * c)


@pytest.mark.parametrize("knows_energy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_inside_the_subspace_get_no_compensation(
    dtype: torch.dtype, knows_energy: bool
) -> None:
    basis = orthonormal(6, 2)
    steps = gradients(6, 4, steps=4)
    steps[:, :, 1] = (basis @ basis.mT @ steps)[:, :, 1]
    share = torch.tensor([0.9, 1.1], dtype=torch.float64) * 256 * torch.finfo(dtype).eps
    inside, outside = basis[:, 0], torch.linalg.qr(basis, mode="complete")[0][:, 5]
    steps[:, :, 2] = inside * (1 - share[0] ** 2).sqrt() + outside * share[0]
    steps[:, :, 3] = inside * (1 - share[1] ** 2).sqrt() + outside * share[1]
    residual = OptimalCompensation()
    steps, basis = steps.to(dtype), basis.to(dtype)
    state = residual.init(steps[0], knows_energy)
    for number, gradient in enumerate(steps, 1):
        seen = projection(gradient, basis, knows_energy=knows_energy)
        update = residual(seen, state, Context(number))
        norms = update.norm(dim=0)
        assert (norms[[0, 3]] > 0.1).all()
        assert (norms[[1, 2]] == 0).all()


def test_full_rank_leaves_nothing_to_compensate() -> None:
    gradient, basis = gradients(4, 6, steps=1)[0], orthonormal(4, 4)
    residual = OptimalCompensation()
    state = residual.init(gradient, False)
    update = residual(projection(gradient, basis), state, Context(1))
    assert update.abs().max() < 1e-9


def test_zero_gradient_is_finite() -> None:
    zero = torch.zeros(5, 4, dtype=torch.float64)
    seen = Projection(zero, zero[:, :2], zero[:2], zero[:2], zero[:2], None)
    for residual in (OptimalCompensation(), ScaledResidual(), ScaledResidual(compensation=0.5)):
        state: State = residual.init(zero, False)
        for step in (1, 2):
            assert residual(seen, state, Context(step)).count_nonzero() == 0


def test_scaled_residual_follows_the_columns_of_the_inside() -> None:
    gradient, basis = gradients(6, 4, steps=1)[0], orthonormal(6, 2)
    seen = projection(gradient, basis)
    residual = ScaledResidual(inside=0.25)
    update = residual(seen, residual.init(gradient, False), Context(1))
    factors = seen.direction.norm(dim=0) / seen.z.norm(dim=0)
    torch.testing.assert_close(update, (gradient - 0.25 * seen.inside) * factors, rtol=1e-6, atol=0)
    torch.testing.assert_close(column_scale(seen.direction, seen.z), factors, rtol=1e-6, atol=0)


def test_fira_plus_has_the_norm_of_the_low_rank_update() -> None:
    gradient, basis = gradients(6, 4, steps=1)[0], orthonormal(6, 2)
    seen = projection(gradient, basis)
    residual = ScaledResidual(compensation=0.7)
    state = residual.init(gradient, False)
    assert state == {}
    update = residual(seen, state, Context(1))
    assert float(update.norm()) == pytest.approx(0.7 * float(seen.update.norm()), rel=1e-12)
    direction = (gradient - seen.inside) * column_scale(seen.direction, seen.z)
    torch.testing.assert_close(update / update.norm(), direction / direction.norm())


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (OptimalCompensation, {"compensation": -1.0}, "compensation=-1.0"),
        (OptimalCompensation, {"beta": 1.0}, "beta=1.0"),
        (OptimalCompensation, {"gamma": 0.9}, "gamma=0.9"),
        (OptimalCompensation, {"floor": -1e-5}, "floor"),
        (ScaledResidual, {"gamma": 0.5}, "gamma=0.5"),
        (ScaledResidual, {"inside": -1.0}, "inside"),
        (ScaledResidual, {"compensation": -0.1}, "compensation=-0.1"),
    ],
)
def test_bad_settings(kind: type, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_two_products_give_what_three_give(dtype: torch.dtype, off: float) -> None:
    m, n, r = 520, 300, 8
    basis = orthonormal(m, r)
    steps = gradients(m, n, steps=4)
    # Columns that lie in the subspace: as a whole, and for the most part.
    inside = basis @ basis.mT @ steps
    for column, share in enumerate((0.0, 1e-2, 0.3)):
        steps[:, :, column] = inside[:, :, column] + share * (steps - inside)[:, :, column]
    residual = OptimalCompensation()
    states = [residual.init(steps[0].to(dtype), True) for _ in range(2)]
    exact = residual.init(steps[0], True)
    for number, gradient in enumerate(steps, 1):
        seen = projection(gradient.to(dtype), basis.to(dtype), knows_energy=True)
        formed = seen.update + residual(seen, states[0], Context(number))
        joined = residual.joined(seen, states[1], Context(number))
        true = projection(gradient, basis, knows_energy=True)
        truth = true.update + residual(true, exact, Context(number))
        assert float((joined - truth).norm() / truth.norm()) < off
        assert float((joined - formed).norm() / truth.norm()) < off
        torch.testing.assert_close(joined[:, 0], seen.update[:, 0])
        torch.testing.assert_close(states[1]["phi"].double(), exact["phi"], rtol=off, atol=0)
