"""I (x) Q with diagonal Q from one sample: against dense least squares and plain statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neurms.core.structures.base import Context, Transform
from neurms.core.structures.one_sided_diagonal import (
    RowNormalized,
    RowStandardized,
    WithoutRadialPart,
)
from neurms.testing import TransformContract, gradients, run


class TestRowNormalized(TransformContract):
    transform = RowNormalized()
    scale_invariant = True

    def test_equals_the_best_dense_fit(self) -> None:
        """Least squares over q of || g g^T - I (x) diag(q) ||_F, then its inverse root on g."""
        gradient = gradients(3, 4, steps=1)[0]
        vec = gradient.mT.reshape(-1)
        fisher = torch.outer(vec, vec)
        basis = [
            torch.kron(torch.eye(4, dtype=torch.float64), torch.diag(unit)).reshape(-1)
            for unit in torch.eye(3, dtype=torch.float64)
        ]
        q = torch.linalg.lstsq(torch.stack(basis, 1), fisher.reshape(-1, 1)).solution[:, 0]
        root = torch.kron(torch.eye(4, dtype=torch.float64), torch.diag(q)).diag().rsqrt()
        dense = (root * vec).reshape(4, 3).mT
        (update,), _ = run(self.transform, gradient[None])
        torch.testing.assert_close(4**0.5 * update, dense)


class TestRowStandardized(TransformContract):
    transform = RowStandardized()
    scale_invariant = True

    def test_rows_have_mean_zero_and_variance_one(self) -> None:
        (update,), _ = run(self.transform, gradients(3, 8, steps=1))
        zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        torch.testing.assert_close(update.mean(1), zero, atol=1e-12, rtol=0)
        torch.testing.assert_close(update.var(1, correction=0), one)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_constant_rows_get_no_update(self, dtype: torch.dtype) -> None:
        gradient = torch.randn(4, 7, dtype=dtype)
        gradient[2] = 0.1
        (update,), _ = run(self.transform, gradient[None])
        assert update[2].count_nonzero() == 0
        assert update[[0, 1, 3]].count_nonzero() > 0

    def test_zero_rows_and_columns_stay_finite_and_zero(self, steps: Tensor) -> None:
        """Of a zero column the mean remains, by the method's definition; a zero row stays zero."""
        steps = steps.clone()
        steps[:, 1, :] = 0
        steps[:, :, 2] = 0
        for update in run(self.transform, steps)[0]:
            assert update.isfinite().all()
            assert update[1].count_nonzero() == 0


class TestWithoutRadialPart(TransformContract):
    transform = WithoutRadialPart()

    def test_rows_are_orthogonal_to_the_weights(self) -> None:
        gradient, weight = gradients(4, 6, steps=2)
        update = self.transform(gradient, {}, Context(1, weight))
        torch.testing.assert_close(
            (update * weight).sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0
        )
        projector = torch.stack(
            [
                torch.eye(6, dtype=torch.float64) - torch.outer(w, w) / w.dot(w)
                for w in weight.unbind()
            ]
        )
        torch.testing.assert_close(update, (projector @ gradient[:, :, None])[..., 0])

    def test_zero_weights_keep_the_row(self) -> None:
        gradient = gradients(2, 3, steps=1)[0]
        update = self.transform(gradient, {}, Context(1, torch.zeros_like(gradient)))
        assert torch.equal(update, gradient)

    def test_zero_rows_and_columns_stay_finite_and_zero(self, steps: Tensor) -> None:
        """A zero column of the gradient gets minus its part of the projection."""
        steps = steps.clone()
        steps[:, 1, :] = 0
        for update in run(self.transform, steps)[0]:
            assert update.isfinite().all()
            assert update[1].count_nonzero() == 0


@pytest.mark.parametrize("transform", [RowStandardized(), WithoutRadialPart(), RowNormalized()])
@pytest.mark.parametrize("features", [1, 2])
def test_least_features_says_what_cannot_move(transform: Transform, features: int) -> None:
    steps, weight = gradients(4, features, steps=3), gradients(4, features, steps=1, seed=2)[0]
    updates, _ = run(transform, steps, weight)
    moves = all(update.abs().max() > 1e-9 for update in updates)
    assert moves == (features >= transform.least_features)
    assert transform.least_units == 1
    assert run(transform, steps[:, :1], weight[:1])[0][0].shape == (1, features)
