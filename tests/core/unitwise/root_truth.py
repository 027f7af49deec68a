"""What NeuRMS makes of a second moment, for every test that works factors out by itself."""

from __future__ import annotations

from typing import Any

EPS = 1e-8


def inverse_root(moment: Any, eps: float = EPS, v_min: float = 0.0) -> Any:
    """Return the factor that a corrected second moment gives, before it is clipped.

    Of tensors, or without ``v_min`` of NumPy's arrays.
    """
    root = moment + eps
    return (root.clamp(min=v_min) if v_min else root) ** -0.5
