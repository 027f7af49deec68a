"""S (x) Q: against a float64 SVD and a dense Kronecker product."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from neurms.compiled.two_sided import two_sided_fit
from neurms.core.structures.base import Context
from neurms.core.structures.two_sided import Fit, TwoSidedDiagonal
from neurms.testing import TransformContract, gradients, run


class TestTwoSidedDiagonal(TransformContract):
    transform = TwoSidedDiagonal()
    scale_invariant = True

    @pytest.mark.parametrize("shape", [(6, 4), (4, 6), (40, 30)])
    def test_scales_are_principal_singular_vectors(self, shape: tuple[int, int]) -> None:
        gradient = gradients(*shape, steps=1)[0]
        q, s = two_sided_fit(gradient, iterations=60)
        left, _, right = torch.linalg.svd(gradient.square())
        torch.testing.assert_close(q / q.norm(), left[:, 0].abs(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(s / s.norm(), right[0].abs(), rtol=1e-9, atol=1e-12)

    def test_equals_the_dense_kronecker_structure(self) -> None:
        steps = gradients(4, 3, steps=3)
        transform = TwoSidedDiagonal(beta=0.5)
        updates, state = run(transform, steps)
        # vec stacks columns: F = S (x) Q, and the update is F^(-1/2) vec(G).
        fisher = torch.kron(torch.diag(state["s"]), torch.diag(state["q"]))
        vec = steps[-1].mT.reshape(-1)
        dense = (torch.linalg.inv(fisher).sqrt() @ vec).reshape(3, 4).mT
        torch.testing.assert_close(updates[-1], dense, rtol=1e-10, atol=1e-12)

    def test_bias_correction_removes_the_start_at_zero(self) -> None:
        gradient = gradients(4, 3, steps=1)[0]
        first = TwoSidedDiagonal(beta=0.9, bias_correction=True)
        no_average = TwoSidedDiagonal(beta=0.0)
        corrected = first(gradient, first.init(gradient), Context(1))
        plain = no_average(gradient, no_average.init(gradient), Context(1))
        torch.testing.assert_close(corrected, plain)
        paper = TwoSidedDiagonal(beta=0.9)
        torch.testing.assert_close(paper(gradient, paper.init(gradient), Context(1)), 10 * plain)

    def test_bias_correction_of_sums(self) -> None:
        gradient = gradients(4, 3, steps=1)[0]
        first = TwoSidedDiagonal(beta=0.9, bias_correction=True, fit="sums")
        no_average = TwoSidedDiagonal(beta=0.0, fit="sums")
        corrected = first(gradient, first.init(gradient), Context(1))
        torch.testing.assert_close(
            corrected, no_average(gradient, no_average.init(gradient), Context(1))
        )

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"fit": "rows"}, "fit='rows'"),
            ({"beta": 1.0}, "beta=1.0"),
            ({"iterations": 0}, "iterations=0"),
            ({"beta": -0.1}, "beta"),
        ],
    )
    def test_bad_settings(self, settings: dict[str, float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TwoSidedDiagonal(**settings)  # type: ignore[arg-type]


def truth(steps: Tensor, fit: str, beta: float) -> list[np.ndarray]:
    """The definitions of the two fits of one read, word by word."""
    q, s, updates = np.zeros(steps.shape[1]), np.zeros(steps.shape[2]), []
    for g in steps.double().numpy():
        squares = g**2
        if fit == "sums":
            new_q, new_s = squares.mean(1), squares.mean(0)
        else:
            start = np.maximum(s / s.mean(), 1e-3) if s.any() else np.ones_like(s)
            new_q = squares @ start / (start @ start)
            new_s = new_q @ squares / (new_q @ new_q)
        q, s = beta * q + (1 - beta) * new_q, beta * s + (1 - beta) * new_s
        total = s.mean() if fit == "sums" else 1.0
        updates.append(np.sqrt(total) * g / np.sqrt(np.outer(q, s)))
    return updates


@pytest.mark.parametrize("fit", ["tracked", "sums"])
@pytest.mark.parametrize("shape", [(7, 5), (4, 9), (1, 6), (6, 1)])
def test_fits_of_one_read_over_25_steps(shape: tuple[int, int], fit: Fit) -> None:
    steps = gradients(*shape, steps=25)
    updates, _ = run(TwoSidedDiagonal(fit=fit), steps)
    for update, expected in zip(updates, truth(steps, fit, 0.9), strict=True):
        np.testing.assert_allclose(update.numpy(), expected, rtol=1e-12, atol=1e-14)


class TestTracked(TransformContract):
    transform = TwoSidedDiagonal(fit="tracked")
    scale_invariant = True


class TestSums(TransformContract):
    transform = TwoSidedDiagonal(fit="sums")
    scale_invariant = True
