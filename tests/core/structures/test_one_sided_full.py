"""I (x) M from one sample: against the dense inverse root of the fitted Fisher matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neurms.core.structures.one_sided_full import Orthogonalized, Whitened
from neurms.testing import TransformContract, gradients, run


def dense_whitening(gradient: Tensor) -> Tensor:
    """Return (I (x) M)^(-1/2) vec(G) as a matrix, with M = G G^T / n the best fit to g g^T."""
    m, n = gradient.shape
    blocks = gradient @ gradient.mT / n
    fisher = torch.kron(torch.eye(n, dtype=torch.float64), blocks)
    values, vectors = torch.linalg.eigh(fisher)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.mT
    return (root @ gradient.mT.reshape(-1)).reshape(n, m).mT


class TestOrthogonalized(TransformContract):
    transform = Orthogonalized()
    scale_invariant = True

    @pytest.mark.parametrize("shape", [(3, 5), (4, 4)])
    def test_equals_the_dense_fit(self, shape: tuple[int, int]) -> None:
        gradient = torch.randn(shape, dtype=torch.float64)
        (update,), _ = run(Orthogonalized(60, (1.5, -0.5, 0.0)), gradient[None])
        torch.testing.assert_close(
            shape[1] ** 0.5 * update, dense_whitening(gradient), rtol=1e-7, atol=1e-8
        )

    def test_muons_singular_values(self) -> None:
        sigma = torch.linalg.svdvals(run(Orthogonalized(), torch.randn(1, 30, 50))[0][0])
        assert 0.6 < float(sigma.min()) <= float(sigma.max()) < 1.25


class TestWhitened(TransformContract):
    transform = Whitened(rescale=False)
    scale_invariant = True
    tolerance = 1e-6

    @pytest.mark.parametrize("shape", [(3, 5), (4, 4)])
    def test_equals_the_dense_fit(self, shape: tuple[int, int]) -> None:
        gradient = torch.randn(shape, dtype=torch.float64)
        (update,), _ = run(Whitened(60, 0.5, rescale=False), gradient[None])
        torch.testing.assert_close(
            shape[1] ** 0.5 * update, dense_whitening(gradient), rtol=1e-6, atol=1e-7
        )

    def test_rescaling_keeps_the_norm(self) -> None:
        gradient = gradients(5, 4, steps=1)
        (update,), _ = run(Whitened(rescale=True), gradient)
        torch.testing.assert_close(update.norm(), gradient.norm())

    def test_tall_and_wide_agree(self) -> None:
        gradient = gradients(6, 4, steps=1)
        (update,), _ = run(Whitened(), gradient)
        (transposed,), _ = run(Whitened(), gradient.mT)
        torch.testing.assert_close(update, transposed.mT)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (Orthogonalized, {"steps": 0}, "steps=0"),
        (Orthogonalized, {"coefficients": (1.0, 2.0)}, "coefficients="),
        (Whitened, {"steps": 0}, "steps=0"),
        (Whitened, {"beta": 0.0}, "beta=0.0"),
        (Whitened, {"beta": 1.5}, "beta=1.5"),
    ],
)
def test_bad_settings(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)
