"""Kernels: functions of tensors, without state, module or parameter.

Each has one eager definition, its specification; :func:`use_backend` chooses how it runs.

=================================  ================================================
``reductions``                     sums of squares of columns and channels
``scaling``                        second moments to scale factors, moving averages
``update``                         the optimizer's pass over a weight
``agc``                            row-wise clipping of an update
``gemm``                           the update as one matrix product (no gradient)
``signals``                        D or H observed and scaled at once
``together``                       several layers in one native call
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
from neurms.compiled.gemm import bfloat16_gemm_, update_gemm_
from neurms.compiled.native import warm_up
from neurms.compiled.reductions import channel_square_sum, column_square_sum
from neurms.compiled.scaling import ema_, relative_scale_factors, scale_factors
from neurms.compiled.update import scale_gradient_, scaled_momentum_update_, scaled_update_

__all__ = [
    "BACKENDS",
    "Kernel",
    "bfloat16_gemm_",
    "channel_square_sum",
    "column_square_sum",
    "compilations",
    "correlation_from_sums",
    "correlation_sums",
    "current_backend",
    "ema_",
    "kernel",
    "relative_scale_factors",
    "row_clip_",
    "scale_factors",
    "scale_gradient_",
    "scaled_momentum_update_",
    "scaled_update_",
    "update_gemm_",
    "use_backend",
    "validate_backend",
    "warm_up",
]
