"""Blocks moved natively: against the definition in float64, dense roots, and torch's norms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neurms.compiled import unit_blocks as module
from neurms.compiled import use_backend
from neurms.compiled.native import LEAST_ELEMENTS, compiler
from neurms.compiled.roots import orthonormal, positive_qr
from neurms.compiled.unit_blocks import move_unit_blocks_, mover

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")

EPS, ITERATIONS = 1e-30, 8
native = module._native
# Units, rank, features: with and without a remainder of 16, ranks of one to four lines, n near k.
SHAPES = [(70, 1, 5), (33, 2, 3), (16, 5, 9), (40, 16, 100), (70, 17, 17), (50, 32, 300)]
SHAPES += [(1, 32, 40), (35, 33, 50), (20, 48, 60), (18, 64, 200), (64, 32, 32), (3, 3, 4)]


def operands(m: int, k: int, n: int, scale: float = 1.0, seed: int = 0) -> list[Tensor | None]:
    """Return blocks, rho, B in the frame, and a gradient in it."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    old = orthonormal(randn(n, k))
    new = orthonormal(old + 0.3 * randn(n, k))
    root = randn(m, k, max(1, k - 1)) * scale
    rho = torch.rand(m, generator=generator) * scale**2
    gradient = randn(m, n) * scale
    coordinates = gradient @ new
    if k == n:
        return [root @ root.mT, rho, new.mT @ old, coordinates, None, None]
    vectors, triangle = positive_qr(torch.cat([new, old], dim=-1))
    outside = gradient - coordinates @ new.mT
    further = outside @ vectors[:, k:]
    beyond = (outside - further @ vectors[:, k:].mT).norm(dim=-1, keepdim=True)
    to_old = triangle[:, k:].contiguous()
    return [root @ root.mT, rho, to_old, coordinates, further, beyond]


def copies(of: list[Tensor | None], dtype: torch.dtype = torch.float32) -> list[Any]:
    return [None if x is None else x.to(dtype, copy=True) for x in of]


def close(ours: Tensor, truth: Tensor, tolerance: float | Tensor) -> None:
    """Compare in units of each unit's largest number."""
    size = truth.abs().flatten(1).amax(-1) if truth.ndim > 1 else truth.abs()
    error = (ours.double() - truth).abs().flatten(1) if truth.ndim > 1 else ours.double() - truth
    worst = error.amax(-1) if truth.ndim > 1 else error.abs()
    assert (worst <= tolerance * size).all(), f"off by {(worst / size).max():.1e}"


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition_in_float64(shape: tuple[int, int, int], scale: float) -> None:
    given = operands(*shape, scale)
    ours, truth = copies(given), copies(given, torch.float64)
    inside, factor = native(*ours, EPS, ITERATIONS)
    inside64, factor64 = move_unit_blocks_(*truth, EPS, ITERATIONS)
    # An eigenvalue is right beside the block's size, and so is rho, which is a small one alone
    # where the basis is whole: its root takes half of its relative error.
    size = truth[0].abs().amax((-2, -1)) + truth[1]
    roots = 5e-7 * size / truth[1] if shape[1] == shape[2] else torch.zeros_like(size)
    close(inside, inside64, 5e-6 + roots)
    close(factor, factor64, 2e-6 + roots)
    assert ((ours[1].double() - truth[1]).abs() <= 2e-6 * size).all()
    size = truth[0].abs().amax((-2, -1)).clamp(min=scale**2)
    error = (ours[0].double() - truth[0]).abs().amax((-2, -1))
    assert (error <= 1e-6 * size).all()
    assert torch.equal(ours[0], ours[0].mT)


@pytest.mark.parametrize("k", [1, 2, 3, 16, 31, 64])
def test_the_root_is_the_dense_one(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    root = torch.randn(21, k, k, generator=generator, dtype=torch.float64)
    blocks, c = root @ root.mT, torch.randn(21, k, generator=generator, dtype=torch.float64)
    # A ridge of 1 beside eigenvalues of up to 4 k: rounding moves their roots by 1e-7 times that.
    moved = blocks + c[:, :, None] * c[:, None, :]
    whole = moved + torch.eye(k, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(whole)
    dense = vectors @ torch.diag_embed(values.rsqrt()) @ vectors.mT @ c[:, :, None]
    ours = [blocks.float(), torch.zeros(21), torch.eye(k), c.float(), None, None]
    inside, factor = native(*ours, 1.0, ITERATIONS)
    close(inside, dense[..., 0], 1e-5)
    least = torch.linalg.eigvalsh(moved)[:, :1]
    torch.testing.assert_close(factor.double(), (1 + least).rsqrt(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1].double(), least[:, 0], rtol=1e-5, atol=4e-6 * k)
    left = moved - least[:, :, None] * torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(ours[0].double(), left, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [5, 32])
def test_rho_grows_by_the_spectral_norm(k: int) -> None:
    m, n = 20, 2 * k + 3
    given = operands(m, k, n)
    blocks, rho, to_old, c, further, beyond = copies(given, torch.float64)
    # The frame's coordinates are all that the residual lives in.
    outer = torch.cat([c, further, beyond], dim=-1)
    lifted = torch.nn.functional.pad(to_old, (0, 0, 0, 1))
    whole = lifted @ blocks @ lifted.mT + outer[:, :, None] * outer[:, None, :]
    least = torch.linalg.eigvalsh(whole[:, :k, :k])[:, 0]
    whole[:, :k, :k] = least[:, None, None] * torch.eye(k, dtype=torch.float64)
    norm = torch.linalg.matrix_norm(whole, ord=2)
    ours = copies(given)
    native(*ours, EPS, 40)
    close(ours[1], rho + norm, 1e-5)


def degenerate(k: int) -> dict[str, Tensor]:
    eye = torch.eye(k)
    vector = torch.linspace(1.0, 2.0, k)
    return {
        "nothing": torch.zeros(k, k),
        "rank one": torch.outer(vector, vector),
        "all alike": 3.0 * eye,
        "diagonal": torch.diag(vector),
        "graded down": torch.diag(torch.logspace(0, -30, k)),
        "graded up": torch.diag(torch.logspace(-30, 0, k)),
        "in two parts": torch.block_diag(
            torch.ones(k // 2, k // 2), torch.ones(k - k // 2, k - k // 2)
        ),
        "tiny": 1e-30 * torch.outer(vector, vector),
    }


@pytest.mark.parametrize("along", ["none", "one", "all"])
@pytest.mark.parametrize("k", [2, 5, 32, 64])
def test_degenerate_blocks(k: int, along: str) -> None:
    blocks = torch.stack([*degenerate(k).values()])
    c = torch.zeros(len(blocks), k)
    c[:, : {"none": 0, "one": 1, "all": k}[along]] = 0.7
    given = [blocks, torch.ones(len(blocks)), torch.eye(k), c, None, None]
    ours, truth = copies(given), copies(given, torch.float64)
    inside, factor = native(*ours, EPS, ITERATIONS)
    inside64, factor64 = move_unit_blocks_(*truth, EPS, ITERATIONS)
    close(inside, inside64, 2e-5)
    close(factor, factor64, 1e-6)
    size = truth[0].abs().amax((-2, -1), keepdim=True) + truth[1][:, None, None]
    assert ((ours[0].double() - truth[0]).abs() <= 2e-6 * size + 1e-7).all()


def test_units_do_not_depend_on_their_place() -> None:
    given = operands(50, 32, 80)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    first, second = copies(given), copies(given)
    for at in (0, 1, 3, 4, 5):
        second[at] = second[at][order].contiguous()
    results = native(*first, EPS, ITERATIONS), native(*second, EPS, ITERATIONS)
    for a, b in zip((*results[0], *first[:2]), (*results[1], *second[:2]), strict=True):
        assert torch.equal(a[order], b)


def test_threads_change_nothing() -> None:
    given = operands(70, 32, 80)
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            moved = copies(given)
            found.append((*native(*moved, EPS, ITERATIONS), *moved[:2]))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 3, 4, 5])
def test_nan_and_infinity_are_errors(at: int, bad: float) -> None:
    given = copies(operands(20, 8, 30))
    given[at][17, 0] = bad
    with pytest.raises(torch.linalg.LinAlgError, match="NaN"):
        native(*given, EPS, ITERATIONS)


def test_batches_and_views() -> None:
    pair = [copies(operands(20, 8, 30, seed=seed)) for seed in (0, 1)]
    stacked = [torch.stack(x) for x in zip(*pair, strict=True)]
    wide = torch.stack([stacked[0], stacked[0]], dim=1)[:, 0]  # not contiguous
    assert not wide.is_contiguous()
    inside, factor = native(wide, *stacked[1:], EPS, ITERATIONS)
    for at, one in enumerate(pair):
        alone, alone_factor = native(*one, EPS, ITERATIONS)
        assert torch.equal(inside[at], alone)
        assert torch.equal(factor[at], alone_factor)
        assert torch.equal(wide[at], one[0])
        assert torch.equal(stacked[1][at], one[1])


def test_what_is_served() -> None:
    large = torch.zeros(LEAST_ELEMENTS // 1024, 32, 32)
    assert mover(large) is native
    assert mover(large[:-1]) is move_unit_blocks_
    assert mover(large.double()) is move_unit_blocks_
    assert mover(torch.zeros(16, 65, 65)) is move_unit_blocks_
    with use_backend("eager"):
        assert mover(large) is move_unit_blocks_


def test_autograd_sees_that_the_state_changed() -> None:
    given = copies(operands(20, 8, 30))
    weight = torch.ones(20, requires_grad=True)
    product = (weight * given[1]).sum()
    native(*given, EPS, ITERATIONS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
