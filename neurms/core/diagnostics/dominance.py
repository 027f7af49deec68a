"""Whether a momentum's rows are nearly orthogonal: RMNP's premise."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neurms.core.diagnostics.factorization import spaced

__all__ = ["Dominance", "row_dominance"]

_BLOCK = 256
_EXACT = 2**28


class Dominance(NamedTuple):
    """Average, least and greatest r_i of a matrix, and of how many rows."""

    r_avg: float
    r_min: float
    r_max: float
    rows: int = 0


@torch.no_grad()
def row_dominance(matrix: Tensor, max_rows: int = 1024) -> Dominance | None:
    """Return the diagonal dominance of V V^T: r_i = (V V^T)_ii / mean_{j != i} |(V V^T)_ij|.

    Row normalisation equals full whitening (Muon) where V V^T is diagonal, that is where every r_i
    is large; n independent normal columns give r_i ~ sqrt(pi n / 2).

    The Gram matrix is made in blocks of 256 rows and never held: 256 m numbers of memory, 2 m n
    min(m, ``max_rows``) operations.

    Args:
        matrix: V, shape (m, n).
        max_rows: Evenly spaced rows i that are looked at, each against all m rows j.

    Returns:
        Statistics over the rows that are not zero; r_i is infinite for a row orthogonal to all
        others. None if there are fewer than two rows, or all are zero.

    Reference:
        RMNP, diagonal dominance. Settled here: zero rows (dead units) have no r_i and are left out
        of the statistics, though they stay in the mean over j.

    Example:
        >>> row_dominance(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        Dominance(r_avg=1.5, r_min=1.0, r_max=2.0, rows=2)
    """
    units = matrix.shape[0]
    if units < 2:
        return None
    chosen = spaced(units, max_rows, matrix.device)
    rows = matrix if chosen is None else matrix[chosen]
    exact = matrix.dtype == torch.float64 or rows.shape[0] * matrix.numel() <= _EXACT
    wide = matrix.to(torch.float64 if exact else torch.float32)
    ratios = [_ratios(block, wide) for block in rows.to(wide.dtype).split(_BLOCK)]
    r = torch.cat(ratios)
    r = r[~r.isnan()]
    if not r.numel():
        return None
    return Dominance(float(r.mean()), float(r.min()), float(r.max()), r.numel())


def _ratios(block: Tensor, matrix: Tensor) -> Tensor:
    diagonal = block.square().sum(1, dtype=torch.float64)
    total = (block @ matrix.T).abs().sum(1, dtype=torch.float64)
    others = (total - diagonal).clamp(min=0.0)
    # What is left of an orthogonal row is rounding of the subtraction.
    others = torch.where(others <= 1e-13 * diagonal, 0.0, others)
    return diagonal * (matrix.shape[0] - 1) / others
