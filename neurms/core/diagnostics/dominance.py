"""Whether a momentum's rows are nearly orthogonal: RMNP's premise."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neurms.compiled.normalization import row_normalize
from neurms.compiled.orthogonalization import newton_schulz
from neurms.core.diagnostics.factorization import spaced
from neurms.core.ground.errors import check_positive_int
from neurms.core.structures.one_sided_full import MUON_COEFFICIENTS

__all__ = ["Dominance", "row_dominance", "whitening_gap"]

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


@torch.no_grad()
def whitening_gap(matrix: Tensor, steps: int = 5) -> float:
    """Return ||U_NS - U_row|| / ||U_row||: how far Muon's update of a momentum is from RMNP's.

    U_NS is ``steps`` rounds of Newton-Schulz, U_row has rows of norm 1. The premise of RMNP is that
    they are alike where V V^T is nearly diagonal. Orthogonal rows still leave what the rounds do to
    singular values of 1, up to .3; a matrix of more rows than columns has no orthogonal ones.

    Args:
        matrix: V, shape (m, n).
        steps: Rounds of Newton-Schulz; Muon has 5.

    Returns:
        The relative distance, 0 for a matrix of zeros.

    Raises:
        ValueError: ``steps`` is below 1.

    Reference:
        RMNP, arXiv 2603.20527, whose comparison is of the plain norm; divided by ||U_row||, the
        root of the number of rows that are not zero, matrices of different shapes compare.

    Example:
        >>> import torch
        >>> whitening_gap(torch.eye(4)) < 0.35 < whitening_gap(torch.ones(4, 4))
        True
    """
    check_positive_int("steps", steps)
    rows = row_normalize(matrix, torch.finfo(matrix.dtype).tiny)
    norm = torch.linalg.vector_norm(rows)
    if norm == 0:
        return 0.0
    whitened = newton_schulz(matrix, steps, *MUON_COEFFICIENTS)
    return float(torch.linalg.vector_norm(whitened - rows) / norm)


def _ratios(block: Tensor, matrix: Tensor) -> Tensor:
    diagonal = block.square().sum(1, dtype=torch.float64)
    total = (block @ matrix.T).abs().sum(1, dtype=torch.float64)
    others = (total - diagonal).clamp(min=0.0)
    # What is left of an orthogonal row is rounding of the subtraction.
    others = torch.where(others <= 1e-13 * diagonal, 0.0, others)
    return diagonal * (matrix.shape[0] - 1) / others
