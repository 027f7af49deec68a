"""S (x) M: against the best Kronecker fit of the dense Fisher matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neurms.core.optimizers.plan import tensor_bytes
from neurms.core.structures.base import Context
from neurms.core.structures.scaled_full import ScaledFull, scaled_full_fit
from neurms.core.structures.two_sided import TwoSidedDiagonal
from neurms.testing import TransformContract, gradients, run


class TestScaledFull(TransformContract):
    transform = ScaledFull()
    scale_invariant = True
    tolerance = 1e-6


def best_fit(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Theorem D.1 as a problem of rank one: the rows vec(g_j g_j^T) ~ s_j vec(M), by an SVD."""
    m = len(gradient)
    rows = torch.stack([torch.outer(g, g).flatten() for g in gradient.T])
    left, values, right = torch.linalg.svd(rows, full_matrices=False)
    sign = torch.sign(right[0].reshape(m, m).diagonal().sum())
    return values[0] * sign * right[0].reshape(m, m), sign * left[:, 0]


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (3, 3)])
def test_fit_is_the_best_in_frobenius_norm(shape: tuple[int, int]) -> None:
    gradient = gradients(*shape, steps=1)[0]
    block, s = scaled_full_fit(gradient, 200)
    best_block, best_s = best_fit(gradient)
    ours = torch.kron(torch.diag(s), block)
    best = torch.kron(torch.diag(best_s), best_block)
    torch.testing.assert_close(ours, best, rtol=1e-6, atol=1e-8 * float(best.max()))
    # No other S (x) M of the same s or the same M is nearer to the dense Fisher matrix.
    vector = gradient.T.flatten()
    fisher = torch.outer(vector, vector)
    distance = torch.linalg.norm(fisher - ours)
    for seed in range(5):
        noise = gradients(shape[0], shape[0], steps=1, seed=seed)[0] * block.max() * 1e-3
        other = torch.kron(torch.diag(s), block + noise + noise.T)
        assert torch.linalg.norm(fisher - other) > distance


def test_update_is_the_dense_inverse_root() -> None:
    steps = gradients(4, 5, steps=4)
    transform = ScaledFull(beta=0.8)
    updates, state = run(transform, steps)
    least = 1e-6 * torch.linalg.eigvalsh(state["block"])[-1]
    block = state["block"] + least * torch.eye(4, dtype=steps.dtype)
    fisher = torch.kron(torch.diag(state["s"]), block) / (1 - 0.8**4) ** 2
    values, vectors = torch.linalg.eigh(fisher)
    dense = vectors @ ((vectors.mT @ steps[-1].T.flatten()) / values.sqrt())
    torch.testing.assert_close(updates[-1], dense.reshape(5, 4).T, rtol=1e-6, atol=1e-8)


def test_one_unit_is_racs() -> None:
    steps = gradients(1, 6, steps=3)
    # Fits of each step, as averages share the magnitude otherwise between M and s than q and s do.
    ours, _ = run(ScaledFull(beta=0.0, eps=1e-12), steps)
    racs, _ = run(TwoSidedDiagonal(beta=0.0), steps)
    for a, b in zip(ours, racs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("scale", [2.0**-50, 2.0**50])
def test_extreme_scales_in_float32(scale: float) -> None:
    steps = gradients(4, 6, steps=3, dtype=torch.float32)
    plain, _ = run(ScaledFull(), steps)
    scaled, _ = run(ScaledFull(), steps * scale)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_state_is_m_squared_plus_n() -> None:
    assert tensor_bytes(ScaledFull().init(torch.empty(7, 5, device="meta"))) == 4 * (49 + 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1.0}, "beta=1.0"),
        ({"iterations": 0}, "iterations=0"),
        ({"eps": 0.0}, "eps=0.0"),
    ],
)
def test_bad_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaledFull(**settings)  # type: ignore[arg-type]


def test_observe_then_precondition_is_the_step() -> None:
    steps = gradients(4, 5, steps=2)
    transform, state = ScaledFull(), ScaledFull().init(steps[0])
    updates, _ = run(transform, steps)
    for number, gradient in enumerate(steps, 1):
        transform.observe(gradient, state, Context(number))
        update = transform.precondition(gradient, state, Context(number))
        torch.testing.assert_close(update, updates[number - 1])
