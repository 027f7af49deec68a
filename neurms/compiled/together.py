"""Several layers in one native call: where caches are cold, calls cost more than small kernels.

What each function does to one layer is what a kernel does: :func:`~.signals.moment_factors_`,
:func:`~.update.scaled_update_` and :func:`~.update.scaled_momentum_update_`, to the last bit for
matrices. They have no other form; callers see to it that everything is plain (see
:func:`~neurms.compiled.native.is_plain`) and :func:`~neurms.compiled.native.library` is there.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import increment_version

from neurms.compiled.native import library, threads

__all__ = ["all_within_each", "moment_factors_each_", "scaled_updates_each_"]


def moment_factors_each_(
    moments: Sequence[Tensor],
    squares: Sequence[Tensor],
    weights: Sequence[float],
    corrections: Sequence[float],
    beta: float,
    eps: float,
    v_min: float,
    low: float,
    high: float,
) -> Sequence[Tensor]:
    """Move the second moments of several layers and return the factors that they then give.

    Args:
        moments: v of each layer, shape (k,); overwritten.
        squares: Its sums of squares, shape (k,).
        weights: What makes a mean of them.
        corrections: Its ``1 - beta^t``, or 1 for no bias correction.
        beta: Decay, in [0, 1).
        eps: Added inside the root.
        v_min: Floor inside the root.
        low: Smallest factor.
        high: Largest factor.

    Returns:
        s of each layer, parts of one new tensor.

    Reference:
        NeuRMS, v_i with s_i and u_j with c_j.

    Example:
        >>> import torch
        >>> v = [torch.tensor([1.0]), torch.tensor([0.0, 0.0])]
        >>> q = [torch.tensor([14.0]), torch.tensor([2.0, 0.5])]
        >>> moment_factors_each_(v, q, [0.5, 1.0], [1.0, 0.5], 0.5, 0.0, 0.0, 0.0, 100.0)
        (tensor([0.5000]), tensor([0.7071, 1.4142]))
    """
    kernels = library()
    assert kernels is not None
    sizes = [v.numel() for v in moments]
    flat = moments[0].new_empty(sum(sizes))
    factors: Sequence[Tensor] = flat.split(sizes)
    count = len(sizes)
    kernels.neurms_moment_factors_each(
        count,
        _pointers(moments),
        _pointers(squares),
        struct.pack(f"{count}q", *sizes),
        struct.pack(f"{count}d", *weights),
        struct.pack(f"{count}d", *corrections),
        beta,
        eps,
        v_min,
        low,
        high,
        _pointers(factors),
    )
    increment_version(moments)
    return factors


def scaled_updates_each_(
    targets: Sequence[Tensor],
    gradients: Sequence[Tensor],
    velocities: Sequence[Tensor] | None,
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    decays: Sequence[float],
    lr: float,
    momentum: float = 0.0,
    scale_velocity: bool = False,
) -> None:
    """Descend along the scaled gradients of several weights and biases, in place.

    ``W <- decay W - lr S G C``, or ``V <- momentum V + S G C`` and ``W <- decay W - lr V``.

    Args:
        targets: Weights (m, n) and biases (m,); overwritten.
        gradients: Of the same shapes; left as they are.
        velocities: Of the same shapes, or None for no momentum; overwritten.
        lefts: Unit factors (m,), or None for 1.
        rights: Feature factors (n,) of weights, or None for 1.
        decays: ``1 - lr * weight_decay`` of each.
        lr: Learning rate.
        momentum: What is kept of velocities.
        scale_velocity: Whether a velocity is scaled once more on its way into the weight.

    Reference:
        NeuRMS, variants U and F, momentum coupling.

    Example:
        >>> import torch
        >>> w, b = torch.ones(2, 1), torch.ones(2)
        >>> s = torch.tensor([1.0, 2.0])
        >>> scaled_updates_each_(
        ...     [w, b], [w.clone(), b.clone()], None, [s, s], [None] * 2, [1, 1], 0.25
        ... )
        >>> w.flatten(), b
        (tensor([0.7500, 0.5000]), tensor([0.7500, 0.5000]))
    """
    kernels = library()
    assert kernels is not None
    count = len(targets)
    rows = [target.shape[0] for target in targets]
    columns = [target.shape[1] if target.dim() == 2 else 1 for target in targets]
    kernels.neurms_scaled_steps_each(
        count,
        _pointers(targets),
        _pointers(gradients),
        None if velocities is None else _pointers(velocities),
        struct.pack(f"{count}q", *rows),
        struct.pack(f"{count}q", *columns),
        _pointers(lefts),
        _pointers(rights),
        struct.pack(f"{count}f", *decays),
        lr,
        momentum,
        scale_velocity,
        threads(),
    )
    # Autograd must know, as of any write: a graph that is kept has saved these weights.
    increment_version(targets)
    if velocities is not None:
        increment_version(velocities)


def all_within_each(tensors: Sequence[Tensor], bounds: Sequence[float]) -> bool:
    """Return whether no magnitude in any of several tensors exceeds that tensor's bound.

    Args:
        tensors: Any shapes.
        bounds: At most the greatest float32 each.

    Returns:
        False where there is a NaN; True without tensors.

    Example:
        >>> import torch
        >>> all_within_each([torch.tensor([1.0]), torch.tensor([-3.0, 2.0])], [2.0, 2.0])
        False
    """
    kernels = library()
    assert kernels is not None
    count = len(tensors)
    sizes = struct.pack(f"{count}q", *[tensor.numel() for tensor in tensors])
    limits = struct.pack(f"{count}f", *bounds)
    return bool(kernels.neurms_all_within_each(count, _pointers(tensors), sizes, limits, threads()))


def _pointers(tensors: Sequence[Tensor | None]) -> bytes:
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    return struct.pack(f"{len(pointers)}Q", *pointers)
