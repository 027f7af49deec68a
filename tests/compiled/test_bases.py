"""Orthonormal bases against dense float64 linear algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neurms.compiled.bases import (
    complement_frame,
    descending_eigenvectors,
    leading_basis,
    noise_floor,
    orthogonal_iteration,
    singular_basis,
    subspace_iteration,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def projector(basis: Tensor) -> Tensor:
    return basis @ basis.mT


def assert_orthonormal(basis: Tensor) -> None:
    eye = torch.eye(basis.shape[-1], dtype=basis.dtype).expand(*basis.shape[:-2], -1, -1)
    torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6), (2, 5, 8)])
def test_leading_basis_spans_the_leading_eigenvectors(shape: tuple[int, ...]) -> None:
    gradient = randn(*shape)
    basis = leading_basis(gradient, 3)
    assert_orthonormal(basis)
    left = torch.linalg.svd(gradient)[0][..., :3]
    torch.testing.assert_close(projector(basis), projector(left), rtol=0, atol=1e-9)
    eigenvalues = (basis.mT @ gradient).square().sum(-1)
    assert (eigenvalues.diff(dim=-1) <= 1e-9).all()


def test_singular_basis_of_either_side() -> None:
    gradient = randn(5, 8)
    left, right = singular_basis(gradient, 2), singular_basis(gradient, 2, right=True)
    values = torch.linalg.svdvals(gradient)[:2]
    torch.testing.assert_close(left.mT @ gradient @ right, torch.diag(values))


def test_descending_eigenvectors() -> None:
    root = randn(4, 4)
    vectors = descending_eigenvectors(root @ root.mT)
    values = torch.linalg.eigvalsh(root @ root.mT).flip(0)
    torch.testing.assert_close(vectors.mT @ root @ root.mT @ vectors, torch.diag(values))


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_subspace_iteration_equals_the_dense_one(decay: float) -> None:
    gradient = randn(7, 9)
    basis = torch.linalg.qr(randn(7, 3, seed=1))[0]
    root = randn(3, 3, seed=2)
    tracked = root @ root.mT
    dense = decay * basis @ tracked @ basis.mT + (1 - decay) * gradient @ gradient.mT
    new = subspace_iteration(gradient, basis, tracked if decay else None, decay)
    assert_orthonormal(new)
    span = torch.linalg.qr(dense @ basis)[0]
    torch.testing.assert_close(projector(new), projector(span), rtol=0, atol=1e-10)
    ritz = new.mT @ dense @ new
    expected = torch.linalg.eigvalsh(span.mT @ dense @ span).flip(0)
    torch.testing.assert_close(ritz, torch.diag(expected), rtol=1e-10, atol=1e-10)


def test_subspace_iteration_converges_to_the_eigenvectors() -> None:
    gradient = randn(6, 9) * torch.logspace(1, -1, 6, dtype=torch.float64)[:, None]
    basis = torch.linalg.qr(randn(6, 2, seed=1))[0]
    for _ in range(40):
        basis = subspace_iteration(gradient, basis, None, 0.0)
    torch.testing.assert_close(
        projector(basis), projector(leading_basis(gradient, 2)), rtol=0, atol=1e-9
    )


def test_orthogonal_iteration_sorts_and_turns() -> None:
    vectors = torch.linalg.qr(randn(4, 4))[0]
    values = torch.tensor([1.0, 8.0, 4.0, 2.0], dtype=torch.float64)
    covariance = vectors @ torch.diag(values) @ vectors.mT
    basis, order = orthogonal_iteration(covariance, vectors)
    assert order.tolist() == [1, 2, 3, 0]
    torch.testing.assert_close((basis.mT @ vectors[:, order]).abs(), torch.eye(4).double())


def test_complement_frame_is_orthonormal_and_orthogonal() -> None:
    basis = torch.linalg.qr(randn(3, 7, 2))[0]
    frame = complement_frame(basis, randn(3, 7, 5, seed=1))
    assert_orthonormal(torch.cat([basis, frame], dim=-1))


def test_complement_frame_is_uniform() -> None:
    count, m, kept, drawn = 20_000, 5, 2, 2
    basis = torch.linalg.qr(randn(m, kept))[0]
    frames = complement_frame(basis.expand(count, m, kept), randn(count, m, drawn, seed=1))
    # An isotropic vector of the complement has mean 0 and covariance P / (m - kept).
    outside = torch.eye(m, dtype=torch.float64) - projector(basis)
    deviation = 5 / count**0.5
    for k in range(drawn):
        vectors = frames[..., k]
        assert vectors.mean(0).abs().max() < deviation
        covariance = vectors.mT @ vectors / count
        torch.testing.assert_close(covariance, outside / (m - kept), rtol=0, atol=deviation)


def test_noise_floor_is_a_few_ulps_of_the_column() -> None:
    squares = randn(6, 4).square().float()
    floor = noise_floor(squares)
    ulps = (floor / squares.sum(0)).sqrt() / torch.finfo(torch.float32).eps
    torch.testing.assert_close(ulps, torch.full_like(ulps, 16.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0, 2, 4, 6])
@pytest.mark.parametrize("shape", [(20, 30), (300, 40), (128, 512)])
def test_no_row_of_a_gradient_of_full_rank_lies_below_the_noise_floor(
    shape: tuple[int, int], spread: int, dtype: torch.dtype
) -> None:
    # What is left of small rows is right beside the same rotation's product in float64.
    m, n = min(shape), max(shape)
    scales = torch.logspace(0, -spread, m, dtype=torch.float64)[:, None]
    for gradient in (
        randn(m, n, seed=1) * scales,
        torch.linalg.qr(randn(m, m))[0] @ (randn(m, n, seed=1) * scales),
        randn(m, n) + 300 * randn(m, 1, seed=1) @ randn(1, n, seed=2),
    ):
        given = gradient.to(dtype)
        basis = descending_eigenvectors(given @ given.mT)
        z = basis.mT @ given
        floor = noise_floor(z.square())
        assert floor.isfinite().all()
        error = z.double() - basis.double().mT @ given.double()
        assert (error.square() <= floor).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0, 1, 2, 3])
def test_noise_floor_lies_above_rounding_in_a_null_space(dtype: torch.dtype, spread: int) -> None:
    scales = torch.logspace(0, -spread, 5, dtype=torch.float64)
    gradient = ((randn(20, 5) * scales) @ randn(5, 30, seed=1)).to(dtype)
    z = descending_eigenvectors(gradient @ gradient.mT).mT @ gradient
    signal = z.square() > noise_floor(z.square())
    assert not signal[5:].any()
    assert signal[:5].all()
