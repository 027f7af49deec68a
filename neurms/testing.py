"""Tests for what you write yourself: the contract that every transform and structure keeps.

It needs pytest, and ``import neurms`` does not load it. Put
``pytest.register_assert_rewrite("neurms.testing")`` into your ``conftest.py`` to see the values of
an assertion that fails.

Example:
    >>> from neurms.core.structures.one_sided_diagonal import RowNormalized
    >>> class TestRowNormalized(TransformContract):
    ...     transform = RowNormalized()
    ...     scale_invariant = True
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from neurms.core.optimizers.recipe import stack_states
from neurms.core.structures.base import Context, State, Transform

__all__ = ["TransformContract", "gradients", "run"]


def gradients(*shape: int, steps: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return (steps, *shape) random gradients with rows and columns of unlike scale."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(steps, *shape, generator=generator, dtype=torch.float64)
    rows = torch.logspace(-1, 1, shape[-2], dtype=torch.float64)[:, None]
    columns = torch.logspace(0.5, -0.5, shape[-1], dtype=torch.float64)
    return (sample * rows * columns).to(dtype)


def run(
    transform: Transform, steps: Tensor, weight: Tensor | None = None, seeds: tuple[int, ...] = (7,)
) -> tuple[list[Tensor], State]:
    """Feed gradients to a transform from its first state on.

    Args:
        transform: What is run.
        steps: Gradients, shape (steps, ..., m, n).
        weight: The weights, shape (..., m, n); None stands for ones where they are needed.
        seeds: One integer for each matrix of the batch.

    Returns:
        The update of each step, shape (..., m, n), and the last state.
    """
    state = transform.init(steps[0])
    if weight is None and transform.needs_weight:
        weight = torch.ones_like(steps[0])
    updates = []
    for number, gradient in enumerate(steps, 1):
        context = Context(number, weight, seeds)
        updates.append(transform(gradient, state, context).clone())
    return updates, state


class TransformContract:
    """What every transform and structure promises; inherit it and set :attr:`transform`.

    State is allocated once, with shapes that the meta device predicts, and changed in place. What
    comes in is not written. Dtypes are kept. A batch gives what its matrices give alone. The same
    twice is bit for bit the same. Zero gradients, rows and columns stay zero and finite. Scale and
    order of units and features matter, or not, as the attributes below say.
    """

    transform: Transform
    """What is tested."""
    scale_invariant = False
    """Whether multiplying all gradients by a constant leaves the updates unchanged."""
    permutes_units = True
    """Whether permuting rows of all gradients permutes the updates alike."""
    permutes_features = True
    """Whether permuting columns of all gradients permutes the updates alike."""
    tolerance = 1e-9
    """Of the comparison of permuted updates, relative and absolute."""

    @pytest.fixture(params=[(6, 4), (4, 6), (5, 5)], ids=lambda shape: f"{shape[0]}x{shape[1]}")
    def steps(self, request: Any) -> Tensor:
        """Return four gradients (4, m, n) of a shape."""
        return gradients(*request.param, steps=4)

    def test_init_predicts_memory_on_meta(self, steps: Tensor) -> None:
        """Meta tensors are enough for ``init``, which is how memory is predicted."""
        real = self.transform.init(steps[0])
        predicted = self.transform.init(steps[0].to("meta"))
        assert {k: (v.shape, v.dtype) for k, v in real.items()} == {
            k: (v.shape, v.dtype) for k, v in predicted.items()
        }
        assert all(value.is_meta for value in predicted.values())

    def test_state_keeps_its_tensors(self, steps: Tensor) -> None:
        """All state is there after ``init``, and later only its values change."""
        state = self.transform.init(steps[0])
        before = {key: (id(value), value.shape, value.dtype) for key, value in state.items()}
        weight = torch.ones_like(steps[0])
        for number, gradient in enumerate(steps, 1):
            self.transform(gradient, state, Context(number, weight))
        assert {k: (id(v), v.shape, v.dtype) for k, v in state.items()} == before

    def test_inputs_are_not_written(self, steps: Tensor) -> None:
        """Gradients and weights are read only."""
        copy = steps.clone()
        weight = torch.ones_like(steps[0])
        run(self.transform, steps, weight)
        assert torch.equal(steps, copy)
        assert torch.equal(weight, torch.ones_like(weight))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_dtype_is_kept(self, steps: Tensor, dtype: torch.dtype) -> None:
        """Updates have the dtype and the shape of gradients, and are finite."""
        updates, _ = run(self.transform, steps.to(dtype))
        assert all(u.dtype == dtype and u.shape == steps[0].shape for u in updates)
        assert all(u.isfinite().all() for u in updates)

    def test_batch_equals_one_by_one(self) -> None:
        """What else is in a batch does not matter."""
        batch = gradients(3, 5, 4, steps=4)
        seeds = (11, 12, 13)
        together, _ = run(self.transform, batch, seeds=seeds)
        for i, seed in enumerate(seeds):
            alone, _ = run(self.transform, batch[:, i], seeds=(seed,))
            for a, b in zip(together, alone, strict=True):
                torch.testing.assert_close(a[i], b, rtol=1e-7, atol=1e-9)

    def test_stacked_state_continues_like_the_single_ones(self) -> None:
        """State tensors start with the matrix's batch axes."""
        batch = gradients(2, 4, 5, steps=3)
        _, batched = run(self.transform, batch, seeds=(1, 2))
        singles = [run(self.transform, batch[:, i], seeds=(i + 1,))[1] for i in range(2)]
        if not batched:
            return
        stacked = stack_states(singles)
        for key, value in batched.items():
            torch.testing.assert_close(value, stacked[key], rtol=1e-6, atol=1e-8)

    def test_deterministic(self, steps: Tensor) -> None:
        """The same gradients give the same bits."""
        first, _ = run(self.transform, steps)
        second, _ = run(self.transform, steps)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_zero_gradient_gives_zero_update(self, steps: Tensor) -> None:
        """Nothing comes of nothing, without a division by zero."""
        updates, state = run(self.transform, torch.zeros_like(steps))
        assert all(u.count_nonzero() == 0 for u in updates)
        assert all(v.isfinite().all() for v in state.values() if v.is_floating_point())

    def test_zero_rows_and_columns_stay_finite_and_zero(self, steps: Tensor) -> None:
        """A unit or a feature without a gradient does not move."""
        steps = steps.clone()
        steps[:, 1, :] = 0
        steps[:, :, 2] = 0
        updates, _ = run(self.transform, steps)
        for update in updates:
            assert update.isfinite().all()
            assert update[1].abs().max() <= 1e-6 * update.abs().max()
            assert update[:, 2].abs().max() <= 1e-6 * update.abs().max()

    def test_scale_invariance(self, steps: Tensor) -> None:
        """The unit of gradients matters exactly where it is said to."""
        plain, _ = run(self.transform, steps)
        scaled, _ = run(self.transform, steps * 1e4)
        same = all(
            torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(plain, scaled, strict=True)
        )
        assert same == self.scale_invariant

    def test_permutation_equivariance(self, steps: Tensor) -> None:
        """Units and features have no order, unless it is said that they have."""
        units = torch.randperm(steps.shape[-2], generator=torch.Generator().manual_seed(3))
        features = torch.randperm(steps.shape[-1], generator=torch.Generator().manual_seed(4))
        weight = gradients(*steps.shape[1:], steps=1, seed=9)[0]
        plain, _ = run(self.transform, steps, weight)
        if self.permutes_units:
            permuted, _ = run(self.transform, steps[:, units], weight[units])
            for a, b in zip(plain, permuted, strict=True):
                torch.testing.assert_close(a[units], b, rtol=self.tolerance, atol=self.tolerance)
        if self.permutes_features:
            permuted, _ = run(self.transform, steps[..., features], weight[:, features])
            for a, b in zip(plain, permuted, strict=True):
                torch.testing.assert_close(
                    a[:, features], b, rtol=self.tolerance, atol=self.tolerance
                )
