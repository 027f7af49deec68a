"""Adaptive gradient clipping: no row of an update exceeds a share of its row of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from neurms.compiled._tiles import accumulator, check_same_shape, is_tiled, tile_length
from neurms.compiled.backends import kernel


def _row_norms(t: Tensor) -> Tensor:
    # float64, because the square of 1e30 or of 1e-30 is not a float32.
    squares = t.to(torch.float64).square()
    return (squares.sum([2, 3], keepdim=True) if t.dim() == 4 else squares.sum(1, True)).sqrt()


def _clip_(update: Tensor, weight: Tensor, agc: float, floor: float) -> None:
    bound = _row_norms(weight).clamp_(min=floor) * agc
    # A zero row divides to infinity, which the clamp turns into "leave as it is".
    factor = (bound / _row_norms(update)).clamp_(max=1.0)
    update.mul_(factor.to(accumulator(update.dtype)))


@kernel
def row_clip_(update: Tensor, weight: Tensor, agc: float, floor: float = 1e-3) -> Tensor:
    """Shorten, in place, every row of an update that is long beside its row of the weight.

    ``dW_i <- dW_i min(1, agc max(||W_i||, floor) / ||dW_i||)``.

    Args:
        update: Shape (m, n) or (groups, units, features, taps), where a row is one unit's
            features and taps; overwritten.
        weight: The same shape; left as it is.
        agc: Largest allowed ratio of the two norms, positive.
        floor: Stands in for the norm of a smaller row, so that zero rows can leave zero.

    Returns:
        ``update``. A row with a NaN becomes NaN.

    Raises:
        ValueError: If the shapes differ; nothing is changed then.

    Reference:
        NeuRMS, AGC guard; Brock et al. 2021 (arXiv 2102.06171), eq. 3, who clip the gradient and
        not the update.

    Example:
        >>> import torch
        >>> row_clip_(torch.tensor([[3.0, 4.0], [0.0, 0.1]]), torch.ones(2, 2), 0.5)
        tensor([[0.4243, 0.5657],
                [0.0000, 0.1000]])
    """
    check_same_shape("update", update, weight)
    if not is_tiled(update):
        _clip_(update, weight, agc, floor)
        return update
    axis = 1 if update.dim() == 4 and update.size(1) > update.size(0) else 0
    length = tile_length(update, axis)
    for start in range(0, update.size(axis), length):
        rows = min(length, update.size(axis) - start)
        _clip_(update.narrow(axis, start, rows), weight.narrow(axis, start, rows), agc, floor)
    return update
