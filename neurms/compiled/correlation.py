"""How faithful a factored second moment is: the correlation of G^2 with v u^T."""

from __future__ import annotations

import torch
from torch import Tensor

from neurms.compiled._tiles import along_features, along_units, is_tiled, tile_length
from neurms.compiled.backends import kernel


def _tile_sums(g: Tensor, left: Tensor, right: Tensor) -> Tensor:
    x = g.to(torch.float64).square()
    inner = [2, 3] if g.dim() == 4 else [1]
    rows = (x * right).sum(inner, keepdim=True)
    return torch.stack((x.sum(), x.square().sum(), (rows * left).sum()))


@kernel
def correlation_sums(g: Tensor, v: Tensor, u: Tensor) -> Tensor:
    """The five sums of a Pearson correlation between ``G_ij^2`` and ``v_i u_j``.

    With x = G_ij^2 and y = v_i u_j over all ij: ``sum x, sum x^2, sum y, sum y^2, sum x y``. The
    product v u^T is never formed: ``sum y = sum v sum u``, ``sum y^2 = sum v^2 sum u^2`` and
    ``sum x y = v^T X u``. The sums of row blocks of G add up to those of G, each block with its
    part of v.

    Args:
        g: The gradient, shape (m, n) or (groups, units, features, taps), any floating dtype.
        v: Unit second moments, shape (m,).
        u: Feature second moments, shape (n,), shared by the taps.

    Returns:
        Shape (5,), float64: fourth powers of gradients leave float32's range.

    Raises:
        ValueError: If v or u does not fit g.

    Reference:
        NeuRMS, diagnostic rho.

    Example:
        >>> import torch
        >>> g = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
        >>> sums = correlation_sums(g, torch.tensor([1.0, 9.0]), torch.tensor([1.0, 4.0]))
        >>> correlation_from_sums(sums, g.numel())
        tensor(1., dtype=torch.float64)
    """
    left = along_units(v.to(torch.float64), g)
    right = along_features(u.to(torch.float64), g)
    taps = g.size(3) if g.dim() == 4 else 1
    if g.dim() == 4:
        sum_y = (left.sum([1, 2, 3]) * right.sum([1, 2, 3])).sum() * taps
        sum_yy = (left.square().sum([1, 2, 3]) * right.square().sum([1, 2, 3])).sum() * taps
    else:
        sum_y = left.sum() * right.sum()
        sum_yy = left.square().sum() * right.square().sum()
    if not is_tiled(g):
        sums = _tile_sums(g, left, right)
    else:
        sums = torch.zeros(3, dtype=torch.float64, device=g.device)
        axis = 1 if g.dim() == 4 and g.size(1) > g.size(0) else 0
        length = tile_length(g, axis)
        for start in range(0, g.size(axis), length):
            rows = min(length, g.size(axis) - start)
            left_rows = left.narrow(axis, start, rows)
            right_rows = right if right.size(axis) == 1 else right.narrow(axis, start, rows)
            sums += _tile_sums(g.narrow(axis, start, rows), left_rows, right_rows)
    return torch.stack((sums[0], sums[1], sum_y, sum_yy, sums[2]))


def correlation_from_sums(sums: Tensor, count: int) -> Tensor:
    """Pearson's correlation from :func:`correlation_sums`.

    ``rho = (N sum xy - sum x sum y) / sqrt((N sum x^2 - (sum x)^2) (N sum y^2 - (sum y)^2))``.

    Args:
        sums: Shape (5,), float64.
        count: N, the number of elements of the gradient.

    Returns:
        0-d float64 in [-1, 1]; NaN where the correlation is undefined, because the gradient is
        empty or one side is constant.

    Reference:
        NeuRMS, diagnostic rho.

    Example:
        >>> import torch
        >>> correlation_from_sums(torch.tensor([3.0, 5.0, 3.0, 5.0, 4.0]).double(), 2)
        tensor(-1., dtype=torch.float64)
    """
    sum_x, sum_xx, sum_y, sum_yy, sum_xy = (sums / max(count, 1)).unbind()
    variance_x = _variance(sum_x, sum_xx)
    variance_y = _variance(sum_y, sum_yy)
    covariance = sum_xy - sum_x * sum_y
    # Two roots, because the product of the variances may leave even float64's range.
    return (covariance / variance_x.sqrt() / variance_y.sqrt()).clamp(-1.0, 1.0)


def _variance(mean: Tensor, mean_square: Tensor) -> Tensor:
    variance = mean_square - mean.square()
    # What is left of a constant is rounding; NaN says that there is nothing to correlate.
    undefined = variance <= mean_square * 1e-13
    return torch.where(undefined, torch.full_like(variance, torch.nan), variance)
