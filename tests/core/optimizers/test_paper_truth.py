"""SharedBasis, Alice, Alice-0 and Eigen-Adam against the papers' dense algorithms, 25 steps."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import pytest
import torch

from neurms.core.optimizers.registry import create
from tests.core.optimizers.paper_truth import (
    DenseAlice,
    DenseEigenAdam,
    DenseSharedBasis,
    Matrix,
    exact_first_update,
    skewed_gradients,
)

SHAPES = [(6, 10), (10, 6), (8, 8)]


class Dense(Protocol):
    def update(self, gradient: Matrix) -> Matrix: ...


def assert_same(name: str, settings: dict[str, Any], dense: Dense, steps: list[Matrix]) -> None:
    """Compare updates, each relative to its own largest entry."""
    weight = torch.nn.Parameter(torch.zeros(steps[0].shape, dtype=torch.float64))
    optimizer = create(name, [weight], lr=1.0, **settings)
    for number, gradient in enumerate(steps, 1):
        weight.data.zero_()
        weight.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        truth = dense.update(gradient)
        error = float(np.abs(-weight.detach().numpy() - truth).max() / np.abs(truth).max())
        assert error <= 1e-6, f"step {number}: off by {error:.1e}"


def turned(dense: Dense) -> Dense:
    """The algorithm on transposed gradients."""

    class Turned:
        def update(self, gradient: Matrix) -> Matrix:
            return dense.update(gradient.T).T

    return Turned()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("interval", "transpose"), [(1, False), (1, True), (4, True)])
def test_eigen_adam(shape: tuple[int, int], interval: int, transpose: bool, seed: int) -> None:
    # Not transposed, a tall matrix has a null space in its first step, whose basis is anybody's.
    betas = (0.9, 0.999, 0.99)
    settings = {"betas": betas, "interval": interval, "eps": 0.0, "transpose_tall": transpose}
    dense: Dense = DenseEigenAdam(betas, interval)
    steps = skewed_gradients(*shape, seed=seed)
    flips = transpose and shape[0] > shape[1]
    assert_same("eigen_adam", settings, turned(dense) if flips else dense, steps)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("interval", "rotate"), [(100, False), (4, True)])
@pytest.mark.parametrize("tracking", [True, False])
def test_alice(
    shape: tuple[int, int], interval: int, rotate: bool, tracking: bool, seed: int
) -> None:
    # Signs matter where moments that are not rotated meet a second basis.
    betas = (0.9, 0.9, 0.999 if tracking else 0.0)
    settings = {
        "betas": betas,
        "rank": 3,
        "leading": 3,
        "interval": interval,
        "alpha": 1.0,
        "tracking": tracking,
        "rotate_moments": rotate,
    }
    dense: Dense = DenseAlice(betas, 3, interval, 0.4, 1.01, rotate=rotate)
    steps = skewed_gradients(*shape, seed=seed)
    assert_same("alice", settings, turned(dense) if shape[0] > shape[1] else dense, steps)


class FirstFrom:
    """An algorithm whose first update is known better than it computes it."""

    def __init__(self, first: Matrix, others: Dense) -> None:
        self.first: Matrix | None = first
        self.others = others

    def update(self, gradient: Matrix) -> Matrix:
        first, self.first = self.first, None
        return self.others.update(gradient) if first is None else first


def first_basis(gradient: Matrix, directions: int) -> Matrix:
    """The span of the longest rows, which is settled where the paper draws at random."""
    longest = np.argsort(np.linalg.norm(gradient, axis=1))[::-1][:directions]
    return np.linalg.qr(gradient[longest].T)[0]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("rank", [2, 5, 8])
def test_shared_basis(shape: tuple[int, int], rank: int, iterations: int, seed: int) -> None:
    steps = skewed_gradients(*shape, seed=seed)
    k = min(rank, *shape)
    dense = DenseSharedBasis(first_basis(steps[0], k), shape[0], k, 1e-6, iterations)
    settings = {"rank": k, "momentum": 0.0, "grafting": None, "eps": 1e-6, "iterations": iterations}
    settings["norm_iterations"] = 40
    exact = exact_first_update(steps[0], dense.basis, 1e-6, iterations)
    dense.update(steps[0])
    assert_same("shared_basis", settings, FirstFrom(exact, dense), steps)


@pytest.mark.parametrize(("decades", "tolerance"), [(0, 1e-4), (2, 0.02), (4, 0.1)])
def test_eigen_adam_in_float32_is_near_the_truth(decades: int, tolerance: float) -> None:
    # Rows over many decades: with small rows taken for noise the last was off by half.
    random = np.random.default_rng(0)
    scales = np.logspace(0, -decades, 96)[:, None]
    steps = [(random.standard_normal((96, 128)) * scales).astype(np.float32) for _ in range(12)]
    dense = DenseEigenAdam((0.9, 0.999, 0.999), 5)
    weights = [torch.nn.Parameter(torch.zeros(96, 128)) for _ in range(2)]
    settings = {"interval": 5, "eps": 0.0}
    plain, scaled = (create("eigen_adam", [w], lr=1.0, **settings) for w in weights)
    truth = np.zeros((96, 128))
    for gradient in steps:
        weights[0].grad = torch.from_numpy(gradient.copy())
        weights[1].grad = 100 * weights[0].grad
        plain.step()
        scaled.step()
        truth -= dense.update(gradient.astype(np.float64))
    norm = np.linalg.norm(truth)
    first, second = (w.detach().double().numpy() for w in weights)
    assert np.linalg.norm(first - truth) <= tolerance * norm
    assert np.linalg.norm(first - second) <= 1e-4 * norm
