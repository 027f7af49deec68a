"""Fits that read a gradient once: the native form against the eager definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neurms.compiled import use_backend
from neurms.compiled.native import compiler, suits
from neurms.compiled.two_sided_once import fit_once, two_sided_once

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")
SHAPES = [(256, 256), (257, 300), (3, 40_000), (40_000, 3), (1, 70_000), (1023, 65)]


def matrix(shape: tuple[int, ...], scale: float = 1.0, seed: int = 0) -> Tensor:
    sample = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return sample * torch.logspace(0, -1, shape[-1]) * torch.logspace(1, -1, shape[-2])[:, None]


def averages(gradient: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    q = torch.rand(gradient.shape[:-1], generator=generator) * gradient.square().mean()
    s = torch.rand((*gradient.shape[:-2], gradient.shape[-1]), generator=generator)
    return q, s * gradient.square().mean()


@pytest.mark.parametrize("tracked", [False, True])
def test_meaning(tracked: bool, backend: str) -> None:
    gradient = matrix((5, 4))
    q, s = averages(gradient)
    squares, old_q, old_s = gradient.square().double(), q.double(), s.double()
    with use_backend(backend):
        made = two_sided_once([gradient], [q], [s], [0.7], 0.9, tracked)
    q, s, left, right, norm = (item for (item,) in made)
    unit = old_s / old_s.mean() if tracked else torch.ones(4).double()
    new_q = squares @ unit / unit.square().sum()
    weights = new_q if tracked else torch.ones(5).double()
    new_s = weights @ squares / weights.square().sum()
    total = 1.0 if tracked else float((0.9 * old_s + 0.1 * new_s).mean())
    torch.testing.assert_close(q, (0.9 * old_q + 0.1 * new_q).float())
    torch.testing.assert_close(s, (0.9 * old_s + 0.1 * new_s).float())
    torch.testing.assert_close(left, 0.7 * total**0.5 * q.rsqrt())
    torch.testing.assert_close(right, s.rsqrt())
    torch.testing.assert_close(norm, (left[:, None] * gradient * right).norm())


@pytest.mark.parametrize("tracked", [False, True])
def test_rank_one_squares_are_fitted_exactly(tracked: bool) -> None:
    gradient = torch.outer(torch.logspace(0, 1, 6), torch.logspace(0, -1, 4)).double()
    q, s = torch.zeros(6).double(), torch.zeros(4).double()
    *_, (left,), (right,), (norm,) = two_sided_once([gradient], [q], [s], [1.0], 0.0, tracked)
    torch.testing.assert_close(left[:, None] * gradient * right, torch.ones(6, 4).double())
    torch.testing.assert_close(norm, torch.tensor(24.0).double().sqrt())


def test_tracked_rounds_converge_to_the_principal_pair() -> None:
    gradient = matrix((30, 20)).double()
    s = torch.zeros(20).double()
    for _ in range(80):
        q, s = fit_once(gradient, s, tracked=True)
    left, size, right = torch.linalg.svd(gradient.square())
    expected = size[0] * torch.outer(left[:, 0], right[0])
    torch.testing.assert_close(torch.outer(q, s), expected, rtol=1e-10, atol=1e-14)


def test_features_that_have_rested_are_seen_again() -> None:
    q, s = torch.zeros(4), torch.zeros(3)
    for alive in (0, 2):
        gradient = torch.zeros(4, 3)
        gradient[:, alive] = 1.0
        made = two_sided_once([gradient], [q], [s], [1.0], 0.9, True)
        q, s, left, right, norm = (item for (item,) in made)
        assert norm > 0
        assert (left[:, None] * gradient * right)[:, alive].all()


@needs_compiler
@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_native_form(shape: tuple[int, int], scale: float, by_columns: bool, tracked: bool) -> None:
    gradient = matrix(shape, scale)
    assert suits(gradient), "the native form must be what this tests"
    gradient = gradient.mT if by_columns else gradient
    q, s = averages(gradient)
    wide = [[x.double()] for x in (gradient, q, s)]
    found = two_sided_once([gradient], [q], [s], [0.7], 0.9, tracked)
    truth = two_sided_once.eager(*wide, [0.7], 0.9, tracked)
    for (one,), (other,) in zip(found, truth, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=3e-6, atol=0)


@needs_compiler
@pytest.mark.parametrize("tracked", [False, True])
def test_many_small_matrices_in_one_call(tracked: bool) -> None:
    shapes = [(64, 65), (5, 3), (128, 128), (1, 1), (300, 70)]
    gradients = [matrix(shape, seed=i) for i, shape in enumerate(shapes)]
    gradients[2] = gradients[2].mT
    qs, ss = (list(x) for x in zip(*map(averages, gradients), strict=True))
    corrections = [0.5 + i for i in range(len(shapes))]
    wide = [[x.double() for x in xs] for xs in (gradients, qs, ss)]
    lists = gradients, qs, ss, corrections
    assert all(two_sided_once._serve(*lists)), "the native form must be what this tests"
    found = two_sided_once(*lists, 0.9, tracked)
    truth = two_sided_once.eager(*wide, corrections, 0.9, tracked)
    for ones, others in zip(found, truth, strict=True):
        for one, other in zip(ones, others, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=3e-6, atol=0)


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norm_shows_a_bad_element(bad: float, by_columns: bool, tracked: bool) -> None:
    gradient = matrix((257, 300))
    gradient[100, 200] = bad
    gradient = gradient.mT if by_columns else gradient
    q, s = averages(matrix(tuple(gradient.shape)))
    *_, (norm,) = two_sided_once([gradient], [q], [s], [1.0], 0.9, tracked)
    assert not norm.isfinite()


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("by_columns", [False, True])
def test_zero_rows_and_columns(by_columns: bool, tracked: bool) -> None:
    gradient = matrix((300, 256))
    gradient[7], gradient[:, 9] = 0, 0
    for sample in (gradient, torch.zeros(300, 256)):
        one = sample.mT if by_columns else sample
        q, s = torch.zeros(one.shape[0]), torch.zeros(one.shape[1])
        *_, (left,), (right,), (norm,) = two_sided_once([one], [q], [s], [1.0], 0.9, tracked)
        assert torch.equal(left == 0, one.abs().sum(1) == 0)
        assert torch.equal(right == 0, one.abs().sum(0) == 0)
        assert norm.isfinite()
