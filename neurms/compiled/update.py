"""The optimizer's pass over a weight: scale the gradient, move the velocity, move the weight.

Weights come as (m,), as (m, n), or as blocks (groups, units, features, taps). A unit scale s has
one number per unit (m,), a feature scale c one per feature (n,), for blocks groups x units and
groups x features; scales that already have the weight's number of axes broadcast as they are.
Learning rate, decay and momentum are 0-d tensors, so that schedules do not recompile.

The gradient is read, never written (except by :func:`scale_gradient_`, whose purpose it is): users
log ``.grad`` after the step. Eager with both scales therefore needs a temporary, of one tile on a
CPU. Weights of less than 32 bits are updated in float32 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from neurms.compiled._tiles import (
    accumulator,
    along_features,
    along_units,
    check_same_shape,
    is_tiled,
    part,
    tile_length,
)
from neurms.compiled.backends import kernel
from neurms.compiled.native import LEAST_ELEMENTS, fits, library, threads


def _scalar(value: Tensor, w: Tensor) -> Tensor:
    return value.to(w.device, accumulator(w.dtype))


def _left(s: Tensor | None, w: Tensor) -> Tensor | None:
    return None if s is None else along_units(s, w).to(accumulator(w.dtype))


def _right(c: Tensor | None, w: Tensor) -> Tensor | None:
    return None if c is None else along_features(c, w).to(accumulator(w.dtype))


def _step_scale(s: Tensor | None, lr: Tensor, w: Tensor) -> Tensor:
    step = -_scalar(lr, w)
    return step if s is None else s * step


def _product(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    if right is not None:
        x = x * right
    return x if left is None else x * left


def _accumulate_(
    target: Tensor, x: Tensor, left: Tensor | None, right: Tensor | None, decay: Tensor | None
) -> None:
    """``target <- decay target + left x right`` on one tile, scales already broadcastable."""
    wide = accumulator(target.dtype)
    if target.dtype != wide or x.dtype != wide:
        moved = _product(x.to(wide), left, right)
        kept = target.to(wide) if decay is None else target.to(wide) * decay
        target.copy_(kept + moved)
        return
    if decay is not None:
        target.mul_(decay)
    if right is not None:
        if left is None:
            target.addcmul_(x, right)
        else:
            target.addcmul_(x * right, left)
    elif left is not None:
        target.addcmul_(x, left)
    else:
        target.add_(x)


def _tile_axis(w: Tensor) -> int:
    return 1 if w.dim() == 4 and w.size(1) > w.size(0) else 0


@kernel
def scaled_update_(
    w: Tensor,
    g: Tensor,
    s: Tensor | None,
    c: Tensor | None,
    lr: Tensor,
    decay: Tensor | None = None,
) -> Tensor:
    """Descend along the scaled gradient, in place: one read of g, one read and write of w.

    ``W <- decay W - lr S G C`` with ``S = diag(s)``, ``C = diag(c)``.

    Args:
        w: The weight, shape (m,), (m, n) or (groups, units, features, taps); overwritten.
        g: The gradient, the same shape; left as it is.
        s: Unit scales, shape (m,), or None for 1.
        c: Feature scales, shape (n,), or None for 1; None for a (m,) weight.
        lr: 0-d tensor.
        decay: 0-d tensor, ``1 - lr * weight_decay``, or None for 1 (saves a pass over w).

    Returns:
        ``w``.

    Raises:
        ValueError: If shapes do not fit; nothing is changed then.

    Reference:
        NeuRMS, variants U (c None) and F. Without scales this is ``torch.optim.SGD``.

    Example:
        >>> import torch
        >>> w, g = torch.ones(2, 2), torch.ones(2, 2)
        >>> scaled_update_(w, g, torch.tensor([1.0, 2.0]), None, torch.tensor(0.25))
        tensor([[0.7500, 0.7500],
                [0.5000, 0.5000]])
    """
    check_same_shape("g", g, w)
    left = _step_scale(_left(s, w), lr, w)
    right = _right(c, w)
    keep = None if decay is None else _scalar(decay, w)
    if not is_tiled(w):
        _accumulate_(w, g, left, right, keep)
        return w
    axis = _tile_axis(w)
    length = tile_length(w, axis)
    for start in range(0, w.size(axis), length):
        rows = min(length, w.size(axis) - start)
        _accumulate_(
            w.narrow(axis, start, rows),
            g.narrow(axis, start, rows),
            part(left, axis, start, rows),
            part(right, axis, start, rows),
            keep,
        )
    return w


def _is_matrix(
    w: Tensor, g: Tensor, s: Tensor | None, c: Tensor | None, lr: Tensor, decay: Tensor | None
) -> bool:
    """Return whether the native step takes this call: a matrix with one factor a row or column."""
    return w.numel() >= LEAST_ELEMENTS and _is_any_matrix(w, g, s, c, lr, decay)


def _is_any_matrix(
    w: Tensor, g: Tensor, s: Tensor | None, c: Tensor | None, lr: Tensor, decay: Tensor | None
) -> bool:
    if w.dim() != 2 or g.shape != w.shape or not fits(w, g, s, c):
        return False
    units = s is None or s.shape == w.shape[:1]
    return units and (c is None or c.shape == w.shape[1:])


@scaled_update_.native(_is_matrix, mutates=("w",), returns="w", fits=_is_any_matrix)
def _scaled_step_(
    w: Tensor, g: Tensor, s: Tensor | None, c: Tensor | None, lr: Tensor, decay: Tensor | None
) -> Tensor:
    kernels = library()
    assert kernels is not None
    kernels.neurms_scaled_step(
        w.data_ptr(),
        g.data_ptr(),
        *w.shape,
        None if s is None else s.data_ptr(),
        None if c is None else c.data_ptr(),
        float(lr),
        1.0 if decay is None else float(decay),
        threads(),
    )
    # Autograd must know, as of any write: a graph that is kept has saved this weight.
    increment_version(w)
    return w


@kernel
def scaled_momentum_update_(
    w: Tensor,
    velocity: Tensor,
    g: Tensor,
    s: Tensor | None,
    c: Tensor | None,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor | None = None,
    scale_velocity: bool = False,
) -> Tensor:
    """Heavy-ball descent along the scaled gradient, in place.

    ``V <- momentum V + S G C``; then ``W <- decay W - lr V``, or with ``scale_velocity``
    ``W <- decay W - lr S V C``.

    Args:
        w: The weight, shape (m,), (m, n) or (groups, units, features, taps); overwritten.
        velocity: The same shape, zeros before the first step; overwritten.
        g: The gradient, the same shape; left as it is.
        s: Unit scales, shape (m,), or None for 1.
        c: Feature scales, shape (n,), or None for 1; None for a (m,) weight.
        lr: 0-d tensor.
        momentum: 0-d tensor.
        decay: 0-d tensor, ``1 - lr * weight_decay``, or None for 1 (saves a pass over w).
        scale_velocity: Apply the scales to the velocity as well.

    Returns:
        ``w``.

    Raises:
        ValueError: If shapes do not fit; nothing is changed then.

    Reference:
        NeuRMS, momentum coupling. Without scales this is ``torch.optim.SGD(momentum=...)``.

    Example:
        >>> import torch
        >>> w, v, g = torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2)
        >>> s = torch.tensor([2.0])
        >>> scaled_momentum_update_(w, v, g, s, None, torch.tensor(0.25), torch.tensor(0.5))
        tensor([[0.5000, 0.5000]])
        >>> v
        tensor([[2., 2.]])
    """
    check_same_shape("velocity", velocity, w)
    check_same_shape("g", g, w)
    left = _left(s, w)
    right = _right(c, w)
    step = _step_scale(left if scale_velocity else None, lr, w)
    step_right = right if scale_velocity else None
    mu = _scalar(momentum, velocity)
    keep = None if decay is None else _scalar(decay, w)
    if not is_tiled(w):
        _accumulate_(velocity, g, left, right, mu)
        _accumulate_(w, velocity, step, step_right, keep)
        return w
    axis = _tile_axis(w)
    length = tile_length(w, axis)
    for start in range(0, w.size(axis), length):
        rows = min(length, w.size(axis) - start)
        v_rows = velocity.narrow(axis, start, rows)
        left_rows = part(left, axis, start, rows)
        right_rows = part(right, axis, start, rows)
        _accumulate_(v_rows, g.narrow(axis, start, rows), left_rows, right_rows, mu)
        _accumulate_(
            w.narrow(axis, start, rows),
            v_rows,
            part(step, axis, start, rows),
            part(step_right, axis, start, rows),
            keep,
        )
    return w


def _is_heavy_ball(
    w: Tensor,
    velocity: Tensor,
    g: Tensor,
    s: Tensor | None,
    c: Tensor | None,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor | None,
    scale_velocity: bool,
) -> bool:
    return w.numel() >= LEAST_ELEMENTS and _is_any_heavy_ball(w, velocity, g, s, c, lr)


def _is_any_heavy_ball(
    w: Tensor,
    velocity: Tensor,
    g: Tensor,
    s: Tensor | None,
    c: Tensor | None,
    lr: Tensor,
    *rest: object,
) -> bool:
    shaped = velocity.shape == w.shape and fits(velocity)
    return shaped and _is_any_matrix(w, g, s, c, lr, None)


@scaled_momentum_update_.native(
    _is_heavy_ball, mutates=("w", "velocity"), returns="w", fits=_is_any_heavy_ball
)
def _scaled_momentum_step_(
    w: Tensor,
    velocity: Tensor,
    g: Tensor,
    s: Tensor | None,
    c: Tensor | None,
    lr: Tensor,
    momentum: Tensor,
    decay: Tensor | None,
    scale_velocity: bool,
) -> Tensor:
    kernels = library()
    assert kernels is not None
    kernels.neurms_scaled_momentum_step(
        w.data_ptr(),
        velocity.data_ptr(),
        g.data_ptr(),
        *w.shape,
        None if s is None else s.data_ptr(),
        None if c is None else c.data_ptr(),
        float(lr),
        float(momentum),
        1.0 if decay is None else float(decay),
        scale_velocity,
        threads(),
    )
    increment_version((w, velocity))
    return w


@kernel
def scale_gradient_(g: Tensor, s: Tensor | None, c: Tensor | None) -> Tensor:
    """Scale a gradient in place: ``G <- S G C``.

    Args:
        g: Shape (m,), (m, n) or (groups, units, features, taps); overwritten.
        s: Unit scales, shape (m,), or None for 1.
        c: Feature scales, shape (n,), or None for 1; None for a (m,) gradient.

    Returns:
        ``g``.

    Raises:
        ValueError: If shapes do not fit; nothing is changed then.

    Reference:
        NeuRMS, "scale the gradient before the velocity", for optimizers that do the rest.

    Example:
        >>> import torch
        >>> scale_gradient_(torch.ones(2, 2), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0]))
        tensor([[1., 3.],
                [2., 6.]])
    """
    left = _left(s, g)
    right = _right(c, g)
    if left is None and right is None:
        return g
    if not is_tiled(g):
        _scale_(g, left, right)
        return g
    axis = _tile_axis(g)
    length = tile_length(g, axis)
    for start in range(0, g.size(axis), length):
        rows = min(length, g.size(axis) - start)
        _scale_(
            g.narrow(axis, start, rows),
            part(left, axis, start, rows),
            part(right, axis, start, rows),
        )
    return g


def _scale_(g: Tensor, left: Tensor | None, right: Tensor | None) -> None:
    if g.dtype != accumulator(g.dtype):
        g.copy_(_product(g.to(torch.float32), left, right))
        return
    if right is not None:
        g.mul_(right)
    if left is not None:
        g.mul_(left)
