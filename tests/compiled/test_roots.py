"""Roots and sketches against float64 eigendecompositions of the dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neurms.compiled import roots


def spectrum(*values: float, seed: int = 0) -> Tensor:
    d = len(values)
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    return (q * torch.tensor(values, dtype=torch.float64)) @ q.T


@pytest.mark.parametrize("root", [1, 2, 4])
def test_inverse_root_undoes_its_power(root: int) -> None:
    matrices = torch.stack([spectrum(9.0, 2.0, 0.1, 1e-4, seed=s) for s in range(3)])
    result = roots.inverse_root(matrices, root, eps=1e-3)
    back = torch.linalg.matrix_power(torch.linalg.inv(result), root)
    damped = matrices + 1e-3 * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(back, damped, rtol=1e-9, atol=1e-9)


def test_singular_matrices_do_not_blow_up_rounding() -> None:
    column = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)) * 1e12
    update = roots.inverse_root(column @ column.T, 2, eps=1e-6) @ column
    torch.testing.assert_close(update, column / column.norm(), rtol=1e-2, atol=1e-2)


def test_zero_matrix_gets_the_power_of_eps() -> None:
    root = roots.inverse_root(torch.zeros(2, 3, 3), 4, eps=1e-4)
    torch.testing.assert_close(root, 10.0 * torch.eye(3).expand(2, 3, 3))


def test_eigh_tries_float32_again_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = torch.linalg.eigh

    def stubborn(matrix: Tensor) -> Any:
        seen.append(matrix.dtype)
        if matrix.dtype == torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return plain(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    matrix = spectrum(3.0, 2.0, 1.0).float()
    values, vectors = roots.eigh(matrix)
    assert seen == [torch.float32, torch.float64]
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix)


def test_eigh_tries_again_where_lapack_returns_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.linalg.eigh

    def silent(matrix: Tensor) -> Any:
        values, vectors = plain(matrix)
        return (values * float("nan") if matrix.dtype == torch.float32 else values), vectors

    monkeypatch.setattr(torch.linalg, "eigh", silent)
    values, _ = roots.eigh(spectrum(3.0, 2.0, 1.0).float())
    torch.testing.assert_close(values, torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-8, 1.0, 1e8, 1e30])
def test_eigh_at_any_scale(scale: float) -> None:
    # A singular block of zero and unlike columns: plain float32 LAPACK underflows on such.
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(32, 4, generator=generator) * torch.logspace(0, -3, 4)
    columns[torch.rand(32, generator=generator) < 0.6] = 0
    matrix = columns @ columns.T
    values, vectors = roots.eigh(torch.stack([matrix * scale, matrix]))
    torch.testing.assert_close(values[0] / scale, values[1], rtol=1e-5, atol=1e-5)
    back = (vectors[0] * (values[0] / scale)) @ vectors[0].T
    torch.testing.assert_close(back, matrix, rtol=1e-4, atol=1e-4)


def test_eigh_gives_up_on_nan() -> None:
    with pytest.raises(torch.linalg.LinAlgError):
        roots.eigh(torch.full((3, 3), float("nan"), dtype=torch.float64))


@pytest.mark.parametrize("shape", [(7, 3), (5, 5), (3, 7), (2, 6, 4)])
def test_positive_qr(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q, r = roots.positive_qr(matrix)
    torch.testing.assert_close(q @ r, matrix)
    torch.testing.assert_close(q.mT @ q, torch.eye(q.shape[-1]).to(q).expand_as(q.mT @ q))
    assert (r.diagonal(dim1=-2, dim2=-1) >= 0).all()
    turned, _ = roots.positive_qr(matrix.flip(-2))
    if shape[-2] >= shape[-1]:
        torch.testing.assert_close(turned, q.flip(-2))


@pytest.mark.parametrize(("d", "k", "c"), [(8, 3, 2), (8, 3, 20), (6, 6, 2), (20, 4, 4), (5, 1, 1)])
def test_frequent_directions_bound_what_they_lose(d: int, k: int, c: int) -> None:
    generator = torch.Generator().manual_seed(2)
    basis, values = torch.zeros(d, k, dtype=torch.float64), torch.zeros(k, dtype=torch.float64)
    exact, lost = torch.zeros(d, d, dtype=torch.float64), 0.0
    for _ in range(8):
        columns = torch.randn(d, c, generator=generator, dtype=torch.float64)
        columns *= torch.logspace(1, -1, d, dtype=torch.float64)[:, None]
        joint = (basis * values) @ basis.T + columns @ columns.T
        top = torch.linalg.eigvalsh(joint).flip(0)
        basis, values, cutoff = roots.frequent_directions(basis, values, columns)
        expected = top[k] if k < d else torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(cutoff, expected, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(values, top[:k] - expected, rtol=1e-8, atol=1e-9)
        exact, lost = exact + columns @ columns.T, lost + float(cutoff)
        gap = torch.linalg.eigvalsh(exact - (basis * values) @ basis.T)
        assert gap.min() >= -1e-8 * top[0]
        assert gap.max() <= lost + 1e-8 * top[0]
    torch.testing.assert_close(basis.T @ basis, torch.eye(k, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (2, 9, 9)])
def test_randomized_svd_is_the_best_fit(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(*shape, generator=generator, dtype=torch.float64)
    left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
    sigma = 2.0 ** -torch.arange(sigma.shape[-1], dtype=torch.float64).expand_as(sigma)
    matrix = (left * sigma[..., None, :]) @ right
    draws = torch.randn(*shape[:-2], shape[-1], 6, generator=generator, dtype=torch.float64)
    q, u = roots.randomized_svd(matrix, draws, rank=3, iterations=8)
    best = (left[..., :3] * sigma[..., None, :3]) @ right[..., :3, :]
    torch.testing.assert_close(q @ u.mT, best, rtol=0, atol=1e-7)
    torch.testing.assert_close(q.mT @ q, torch.eye(3).to(q).expand_as(q.mT @ q))


def test_eigenvalues_are_those_of_eigh() -> None:
    matrices = torch.stack([spectrum(9.0, -2.0, 0.1, 1e-4, seed=s) for s in range(3)])
    torch.testing.assert_close(roots.eigenvalues(matrices), roots.eigh(matrices)[0])


def test_eigenvalues_try_again_where_lapack_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(matrix: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigvalsh", refuse)
    matrix = spectrum(3.0, 2.0, 1.0)
    expected = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(roots.eigenvalues(matrix), expected)
