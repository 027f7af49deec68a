"""What NeuRMS makes of a second moment, for every test that works factors out by itself."""

from __future__ import annotations

from torch import Tensor

EPS = 1e-8


def inverse_root(moment: Tensor, eps: float = EPS, v_min: float = 0.0) -> Tensor:
    """Return the factor that a corrected second moment gives, before it is clipped."""
    return (moment + eps).clamp(min=v_min) ** -0.5
