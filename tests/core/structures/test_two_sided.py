"""S (x) Q: against a float64 SVD and a dense Kronecker product."""

from __future__ import annotations

import pytest
import torch

from neurms.compiled.two_sided import two_sided_fit
from neurms.core.structures.base import Context
from neurms.core.structures.two_sided import TwoSidedDiagonal
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

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"beta": 1.0}, "beta=1.0"),
            ({"iterations": 0}, "iterations=0"),
            ({"beta": -0.1}, "beta"),
        ],
    )
    def test_bad_settings(self, settings: dict[str, float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            TwoSidedDiagonal(**settings)  # type: ignore[arg-type]
