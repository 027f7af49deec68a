"""Newton-Schulz and whitening: against float64 SVDs, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neurms.compiled.backends import use_backend
from neurms.compiled.orthogonalization import newton_schulz, whiten

SHAPES = [(6, 4), (4, 6), (5, 5), (3, 4, 6)]
QUINTIC = (3.4445, -4.7750, 2.0315)


def polar(matrix: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vt


def quintic(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return what the rounds make of a matrix, by its singular values in float64."""
    a, b, c = QUINTIC
    u, sigma, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    sigma = sigma / sigma.norm(dim=-1, keepdim=True)
    for _ in range(steps):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    return u @ torch.diag_embed(sigma) @ vt


def skewed(m: int, n: int, powers: float) -> Tensor:
    """Return a matrix whose singular values fall by so many powers of ten."""
    u, _, vt = torch.linalg.svd(torch.randn(m, n, dtype=torch.float64), full_matrices=False)
    sigma = torch.logspace(0, -powers, min(m, n), dtype=torch.float64)
    return (u * sigma) @ vt


def apart(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_both_iterations_converge_to_the_polar_factor(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    cubic = newton_schulz(x, 60, 1.5, -0.5, 0.0)
    torch.testing.assert_close(cubic, polar(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whiten(x, 60, 0.5), polar(x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 6)])
def test_backends_agree_with_the_definition(patient_backend: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for function, settings in ((newton_schulz, (5, *QUINTIC)), (whiten, (5, 0.8))):
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
        lambda y: newton_schulz(y, 5, *QUINTIC),
        lambda y: whiten(y, 10, 0.8),
    ):
        torch.testing.assert_close(function(x * scale), function(x), rtol=1e-3, atol=1e-4)


def test_rank_deficient_and_zero_matrices_stay_finite() -> None:
    thin = torch.randn(8, 1) @ torch.randn(1, 6)
    for x in (thin, torch.zeros(8, 6)):
        for out in (newton_schulz(x, 5, *QUINTIC), whiten(x, 10, 0.8)):
            assert out.isfinite().all()
            assert torch.linalg.matrix_rank(out, rtol=1e-2) == torch.linalg.matrix_rank(x)


# Long, tall, square, a batch; the last is large enough for corners that are not computed twice.
LARGE = [(130, 200), (200, 130), (150, 150), (2, 128, 192), (513, 770)]


@pytest.mark.parametrize("shape", LARGE)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_rounds_on_the_gram_matrix_are_the_rounds_on_the_matrix(
    shape: tuple[int, ...], dtype: torch.dtype, bound: float
) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    assert apart(newton_schulz(x.to(dtype), 5, *QUINTIC), quintic(x)) < bound


@pytest.mark.parametrize("bfloat16", [0, 1, 2])
def test_skewed_matrices_keep_the_stated_precision(bfloat16: int) -> None:
    """Nine powers of ten between singular values: below 1e-3 in float32, .3 in bfloat16."""
    x = skewed(130, 260, 9.0).float()
    found = newton_schulz(x, 5, *QUINTIC, bfloat16)
    assert apart(found, quintic(x)) < (0.3 if bfloat16 else 1e-3)


@pytest.mark.parametrize("shape", [(130, 260), (40, 30), (2, 30, 40)])
@pytest.mark.parametrize("bfloat16", [1, 2])
def test_bfloat16_differs_by_a_few_percent(shape: tuple[int, ...], bfloat16: int) -> None:
    x = torch.randn(shape)
    found = newton_schulz(x, 5, *QUINTIC, bfloat16)
    assert found.dtype is torch.float32
    assert 1e-4 < apart(found, quintic(x)) < 5e-2


def test_products_of_float32_stand_in_for_those_of_bfloat16() -> None:
    """The same but for the order of sums, whose last bits the rounding to bfloat16 may show."""
    x = torch.randn(64, 96)
    native, emulated = (newton_schulz(x, 5, *QUINTIC, form) for form in (1, 2))
    assert apart(emulated, native.double()) < 1e-2


def test_many_rounds_of_a_long_matrix_converge() -> None:
    x = torch.randn(128, 256, dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(x, 60, 1.5, -0.5, 0.0), polar(x), rtol=0, atol=1e-9)
