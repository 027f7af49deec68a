"""From second moments to scale factors, and the guards on them: vectors of m or n numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from neurms.compiled.backends import kernel


def inverse_root(v: Tensor, correction: Tensor, eps: float, v_min: float) -> Tensor:
    """Return ``max(v / correction + eps, v_min)^(-1/2)``."""
    corrected = v / correction.to(v.device, v.dtype)
    return corrected.add_(eps).clamp_(min=v_min).rsqrt_()


@kernel
def scale_factors(
    v: Tensor, correction: Tensor, eps: float, v_min: float, low: float, high: float
) -> Tensor:
    """Bounded inverse RMS of every unit or feature.

    ``s = clip(max(v / correction + eps, v_min)^(-1/2), low, high)``.

    Args:
        v: Second moments, shape (m,), float32 or float64, not negative.
        correction: 0-d tensor, ``1 - beta^t``, or 1 for no bias correction.
        eps: Added inside the root.
        v_min: Floor inside the root.
        low: Smallest factor.
        high: Largest factor.

    Returns:
        Shape (m,), the dtype of ``v``. NaN stays NaN.

    Reference:
        NeuRMS, s_i and c_j. Settled: ``bias_correction=False`` (correction 1) is Algorithm 1.

    Example:
        >>> import torch
        >>> scale_factors(torch.tensor([4.0, 0.0]), torch.tensor(1.0), 0.0, 1e-12, 0.0, 100.0)
        tensor([  0.5000, 100.0000])
    """
    return inverse_root(v, correction, eps, v_min).clamp_(low, high)


@kernel
def relative_scale_factors(
    v: Tensor, correction: Tensor, eps: float, v_min: float, kappa: float
) -> Tensor:
    """Inverse RMS of every unit, within a factor kappa of the layer's median.

    ``s = max(v / correction + eps, v_min)^(-1/2)``, then clipped to
    ``[median(s) / kappa, median(s) * kappa]``; of two middle values the lower is the median.

    Args:
        v: Second moments, shape (..., m), float32 or float64, not negative.
        correction: 0-d tensor, ``1 - beta^t``, or 1 for no bias correction.
        eps: Added inside the root.
        v_min: Floor inside the root.
        kappa: At least 1.

    Returns:
        Shape (m,), the dtype of ``v``. A NaN anywhere makes every factor NaN.

    Reference:
        Not in the NeuRMS draft, whose absolute s_max means something else in every layer and for
        every loss; this clip does not change when all errors are multiplied by a constant (with
        eps = 0).

    Example:
        >>> import torch
        >>> v = torch.tensor([1.0, 1.0, 1e-8])
        >>> relative_scale_factors(v, torch.tensor(1.0), 0.0, 1e-12, 10.0)
        tensor([ 1.,  1., 10.])
    """
    s = inverse_root(v, correction, eps, v_min)
    if s.numel() == 0:
        return s
    # Of each layer by itself where several are stacked.
    median = s.median(-1, True)[0]
    return torch.minimum(torch.maximum(s, median / kappa), median * kappa)


@kernel
def ema_(v: Tensor, sample: Tensor, beta: float) -> Tensor:
    """Exponential moving average, in place.

    ``v <- beta v + (1 - beta) sample``.

    Args:
        v: Any shape, float32 or float64; overwritten.
        sample: The same shape; cast to the dtype of ``v``.
        beta: In [0, 1). A number, not a tensor: ``1 - beta`` in float32 loses four digits.

    Returns:
        ``v``.

    Example:
        >>> import torch
        >>> ema_(torch.tensor([1.0]), torch.tensor([3.0]), 0.5)
        tensor([2.])
    """
    return v.lerp_(sample.to(v.dtype), 1.0 - beta)
