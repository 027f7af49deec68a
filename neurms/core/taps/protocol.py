"""What a tap delivers, and to whom."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Sink", "Sums", "UpdateSink"]


class Sums(NamedTuple):
    """Column sums of squares of one layer over one backward firing.

    With d the error signal as autograd delivers it (loss scale divided out) and h the layer's
    input: ``unit_square_sum[i] = sum_rows d_i^2`` and ``feature_square_sum[j] = sum_rows h_j^2``.

    Attributes:
        unit_square_sum: Shape (units,), float32 (float64 for float64 signals).
        rows: Number of rows of D: batch x every position that the layer wrote.
        feature_square_sum: Shape (features,), same dtypes; None where the tap leaves H alone.
        feature_rows: Number of rows of H: batch x every position that the layer read. It differs
            from ``rows`` in convolutions, whose input has other positions than their output.
    """

    unit_square_sum: Tensor
    rows: int
    feature_square_sum: Tensor | None = None
    feature_rows: int = 0


@runtime_checkable
class Sink(Protocol):
    """Receives the statistics of one layer from a :class:`~neurms.core.taps.hooks.HookTap`.

    Calls come from whatever thread runs the backward pass, one at a time for each tap.
    """

    def add(self, sums: Sums) -> None:
        """Take sums of a firing whose gradient accumulates into the weight.

        They are pending until the optimizer's step. ``rows`` is 0 for an empty batch.
        """

    def rescale(self, sums: Sums) -> Tensor | None:
        """Return factors (units,) by which D is multiplied from here on, or None to leave it.

        Called before :meth:`add` with the same sums, which describe D as it arrived. The factors
        act on the layer's own gradient *and* on everything upstream (NeuRMS's variant B).
        """

    def loss_scale(self) -> Tensor | float | None:
        """Return the factor that the loss carries (a GradScaler's), or None; D is divided by it."""


@runtime_checkable
class UpdateSink(Protocol):
    """Receives D and H themselves from a :class:`~neurms.core.taps.backward.BackwardUpdateTap`."""

    def rescale_errors(self, errors: Tensor) -> Tensor | None:
        """Return what replaces D (rows, units) in the update and upstream, or None to leave it.

        Called once for each backward pass, before anything reads D (NeuRMS's variant B).
        """

    def update(self, errors: Tensor, activations: Tensor) -> Tensor | None:
        """Write the layer's update into its weight.

        Called once the upstream product has read the weight.

        Args:
            errors: D, shape (rows, units), in the dtype of the forward product.
            activations: H, shape (rows, features), in the same dtype.

        Returns:
            The column sums of D, shape (units,), if they came along; else None. They become the
            bias's gradient.
        """
