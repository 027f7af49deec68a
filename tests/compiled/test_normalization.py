"""Row normalisation, Newton-Schulz and whitening: against float64 SVDs, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neurms.compiled.backends import use_backend
from neurms.compiled.normalization import newton_schulz, row_normalize, whiten

SHAPES = [(6, 4), (4, 6), (5, 5), (3, 4, 6)]


def polar(matrix: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vt


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_have_norm_one(patient_backend: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    x[..., 1, :] = 0.0
    with use_backend(patient_backend):
        out = row_normalize(x, 1e-12)
    truth = torch.nn.functional.normalize(x.double(), dim=-1, eps=1e-12)
    torch.testing.assert_close(out.double(), truth, rtol=1e-6, atol=1e-7)
    assert out[..., 1, :].count_nonzero() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_both_iterations_converge_to_the_polar_factor(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    cubic = newton_schulz(x, 60, 1.5, -0.5, 0.0)
    torch.testing.assert_close(cubic, polar(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whiten(x, 60, 0.5), polar(x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 6)])
def test_backends_agree_with_the_definition(patient_backend: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for function, settings in ((newton_schulz, (5, 3.4445, -4.7750, 2.0315)), (whiten, (5, 0.8))):
        with use_backend(patient_backend):
            out = function(x, *settings)
        torch.testing.assert_close(out, function.eager(x, *settings), rtol=1e-4, atol=1e-5)


def test_quintic_acts_on_singular_values_alone() -> None:
    """Each round maps sigma to a sigma + b sigma^3 + c sigma^5 and keeps the singular vectors."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = torch.randn(5, 7, dtype=torch.float64)
    u, sigma, vt = torch.linalg.svd(x, full_matrices=False)
    sigma = sigma / sigma.norm()
    for _ in range(5):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    torch.testing.assert_close(newton_schulz(x, 5, a, b, c), u @ torch.diag(sigma) @ vt)


def test_relaxed_whitening_ends_in_its_interval() -> None:
    x = torch.randn(40, 60, dtype=torch.float64)
    for steps in (10, 11, 25):
        sigma = torch.linalg.svdvals(whiten(x, steps, 0.8))
        assert sigma.min() > 0.56
        assert sigma.max() < 1.61


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    x = torch.randn(4, 6)
    for function in (
        lambda y: newton_schulz(y, 5, 3.4445, -4.7750, 2.0315),
        lambda y: whiten(y, 10, 0.8),
    ):
        torch.testing.assert_close(function(x * scale), function(x), rtol=1e-3, atol=1e-4)


def test_rank_deficient_and_zero_matrices_stay_finite() -> None:
    thin = torch.randn(8, 1) @ torch.randn(1, 6)
    for x in (thin, torch.zeros(8, 6)):
        for out in (newton_schulz(x, 5, 3.4445, -4.7750, 2.0315), whiten(x, 10, 0.8)):
            assert out.isfinite().all()
            assert torch.linalg.matrix_rank(out, rtol=1e-2) == torch.linalg.matrix_rank(x)
