"""Kernels: functions of tensors, without state, module or parameter.

Each has one eager definition, its specification; :func:`use_backend` chooses how it runs. Those of
``moments``, ``update``, ``finite``, ``square_sums``, ``gradient_factors`` and ``two_sided_once``
take lists of tensors, and ``row_update`` has a form that does: a single layer is a list of one.

=================================  ================================================
``reductions``                     sums of squares of columns and channels
``moments``                        second moments moved, and the scale factors they give
``update``                         the optimizer's pass over weights
``row_update``                     RMNP's step in one walk
``square_sums``                    a gradient's row and column sums of squares, a bias's with it
``gradient_factors``               the factors that its own moments give
``two_sided``, ``two_sided_once``  RACS's rank-one fits
``agc``                            row-wise clipping of an update
``gemm``                           the update as one matrix product (no gradient)
``signals``                        D or H observed and scaled at once
``finite``                         the look for bad numbers
``correlation``                    rho, the factorisation's faithfulness
``unit_blocks``                    small blocks of units turned and rooted
=================================  ================================================
"""

from neurms.compiled.agc import row_clip_
from neurms.compiled.backends import (
    BACKENDS,
    Kernel,
    compilations,
    current_backend,
    kernel,
    use_backend,
    validate_backend,
)
from neurms.compiled.correlation import correlation_from_sums, correlation_sums
from neurms.compiled.finite import within
from neurms.compiled.gemm import scaled_gemm_, update_gemm_
from neurms.compiled.moments import ema_, moment_factors, move_moments
from neurms.compiled.native import warm_up
from neurms.compiled.reductions import channel_square_sum, column_square_sum
from neurms.compiled.update import apply_updates_, scale_gradients_

__all__ = [
    "BACKENDS",
    "Kernel",
    "apply_updates_",
    "channel_square_sum",
    "column_square_sum",
    "compilations",
    "correlation_from_sums",
    "correlation_sums",
    "current_backend",
    "ema_",
    "kernel",
    "moment_factors",
    "move_moments",
    "row_clip_",
    "scale_gradients_",
    "scaled_gemm_",
    "update_gemm_",
    "use_backend",
    "validate_backend",
    "warm_up",
    "within",
]
