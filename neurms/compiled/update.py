"""The optimizer's pass over weights: scale the gradient, move the velocity, move the weight.

Weights come as (m,), as (m, n), or as blocks (groups, units, features, taps). A unit scale has one
number per unit (m,), a feature scale one per feature (n,), for blocks groups x units and groups x
features; scales that already have the weight's number of axes broadcast as they are.

The gradient is read, never written (unless it is the weight itself): users log ``.grad`` after the
step. Eager with both scales therefore needs a temporary, of one tile on a CPU. Weights of less than
32 bits are updated in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from neurms.compiled._operators import operator
from neurms.compiled._tiles import (
    accumulator,
    along_features,
    along_units,
    check_same_shape,
    is_tiled,
    part,
    tile_length,
)
from neurms.compiled.backends import Kernel, kernel
from neurms.compiled.lists import list_kernel
from neurms.compiled.native import addresses, are_plain, library, numbers, threads

__all__ = ["Item", "apply_updates_", "as_rows", "have_rows", "scale_gradients_"]

Item = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""A weight, its gradient, velocity, unit scale and feature scale."""


def _product(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    if right is not None:
        x = x * right
    return x if left is None else x * left


def _accumulate_(
    target: Tensor,
    x: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    step: Tensor | None,
    decay: Tensor | None,
    overwrite: bool,
) -> None:
    """``target <- decay target + step left x right``, without its first term to ``overwrite``."""
    wide = accumulator(target.dtype)
    narrow = target.dtype != wide or x.dtype != wide
    x = x.to(wide)
    if step is not None:
        if left is not None:
            left = left * step
        elif right is not None:
            right = right * step
        else:
            x = x * step
    if overwrite:
        target.copy_(_product(x, left, right))
        return
    if narrow:
        kept = target.to(wide) if decay is None else target.to(wide) * decay
        target.copy_(kept + _product(x, left, right))
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


def _move_tile(
    w: Tensor,
    g: Tensor,
    velocity: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    rate: Tensor,
    decay: Tensor | None,
    momentum: Tensor,
    fresh: Tensor | None,
    scale_gradient: bool,
    scale_velocity: bool,
    nesterov: bool,
    overwrite: bool,
    measure: bool,
) -> Tensor:
    """Do what :func:`apply_updates_` says, on one tile, with scales that broadcast already."""
    moved = g
    if velocity is not None:
        into_left = left if scale_gradient else None
        into_right = right if scale_gradient else None
        _accumulate_(velocity, g, into_left, into_right, fresh, momentum, False)
        moved = velocity
        if nesterov:
            # What has entered the velocity, once more; then what is kept of it.
            moved = velocity.to(accumulator(velocity.dtype), copy=True)
            _accumulate_(moved, g, into_left, into_right, fresh, momentum, False)
        left = left if scale_velocity else None
        right = right if scale_velocity else None
    total = torch.zeros(0, dtype=torch.float64, device=w.device)
    if measure:
        moved, left, right = _product(moved.to(accumulator(w.dtype)), left, right), None, None
        total = moved.to(torch.float64).square().sum()
    _accumulate_(w, moved, left, right, -rate, decay, overwrite)
    return total


def _moved_weight(
    w: Tensor,
    g: Tensor,
    velocity: Tensor | None,
    s: Tensor | None,
    c: Tensor | None,
    rate: Tensor,
    decay: Tensor | None,
    momentum: Tensor,
    fresh: Tensor | None,
    scale_gradient: bool,
    scale_velocity: bool,
    nesterov: bool,
    overwrite: bool,
    measure: bool,
) -> Tensor:
    wide = accumulator(w.dtype)
    left = None if s is None else along_units(s, w).to(wide)
    right = None if c is None else along_features(c, w).to(wide)
    flags = (scale_gradient, scale_velocity, nesterov, overwrite, measure)
    if not is_tiled(w):
        return _move_tile(w, g, velocity, left, right, rate, decay, momentum, fresh, *flags)
    axis = 1 if w.dim() == 4 and w.size(1) > w.size(0) else 0
    length = tile_length(w, axis)
    totals: list[Tensor] = []
    for start in range(0, w.size(axis), length):
        rows = min(length, w.size(axis) - start)
        total = _move_tile(
            w.narrow(axis, start, rows),
            g.narrow(axis, start, rows),
            part(velocity, axis, start, rows),
            part(left, axis, start, rows),
            part(right, axis, start, rows),
            rate,
            decay,
            momentum,
            fresh,
            *flags,
        )
        totals.append(total)
    return torch.stack(totals).sum(0)


# Numbers that change from step to step go as they are; compiled forms get them as 0-d tensors.
_move: Kernel[..., Any] = kernel(_moved_weight)


@list_kernel
def apply_updates_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    velocities: Sequence[Tensor | None],
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    rates: Sequence[float | Tensor],
    decays: Sequence[float],
    momentum: float = 0.0,
    fresh: float = 1.0,
    scale_gradient: bool = True,
    scale_velocity: bool = False,
    nesterov: bool = False,
    measure: bool = False,
) -> Tensor | None:
    """Descend along scaled gradients, in place: one read of G, one read and write of W.

    Without a velocity ``W <- decay W - rate L G R`` with ``L = diag(left)``, ``R = diag(right)``.
    With one, ``V <- momentum V + fresh L G R``, or ``fresh G`` unless ``scale_gradient``; then
    ``W <- decay W - rate V``, or with ``scale_velocity`` ``- rate L V R``. With ``nesterov``
    ``momentum V``, and once more what has entered it, stands for V on the way out.

    Args:
        weights: Shapes (m,), (m, n) or (groups, units, features, taps); overwritten. With a decay
            of 0 a weight is not read, and may be its own gradient.
        gradients: The same shapes; left as they are.
        velocities: The same shapes, zeros before the first step; overwritten. None for none.
        lefts: Unit scales, shape (m,), or None for 1.
        rights: Feature scales, shape (n,), or None for 1; None for (m,) weights.
        rates: Learning rates; numbers, or 0-d tensors, which are not waited for.
        decays: ``1 - lr * weight_decay`` of each; 1 saves the eager form a pass over W.
        momentum: What is kept of velocities.
        fresh: Weight of the gradient in the velocity.
        scale_gradient: Whether scales apply on the way into the velocity.
        scale_velocity: Whether they apply on the way out of it.
        nesterov: Whether weights move as if the next velocity had the same gradient again.
        measure: Whether sums of squares are asked for.

    Returns:
        With ``measure`` the sums of squares of what each weight moved by but for its rate, so of L
        G R or of the velocity's term, shape (count,), float64; else None.

    Raises:
        ValueError: If shapes do not fit; nothing is changed then.

    Reference:
        NeuRMS, variants U (no right) and F, momentum coupling; Structured-Fisher paper, Algorithm
        1. Without scales this is ``torch.optim.SGD``.

    Example:
        >>> import torch
        >>> w, b, s = torch.ones(2, 2), torch.ones(2), torch.tensor([1.0, 2.0])
        >>> gradients = [w.clone(), b.clone()]
        >>> apply_updates_([w, b], gradients, [None] * 2, [s, s], [None] * 2, [0.25] * 2, [1.0] * 2)
        >>> w, b
        (tensor([[0.7500, 0.7500],
                [0.5000, 0.5000]]), tensor([0.7500, 0.5000]))
    """
    _check(weights, gradients, velocities, lefts, rights)
    flags = (scale_gradient, scale_velocity, nesterov)
    items = zip(weights, gradients, velocities, lefts, rights, rates, decays, strict=True)
    sums = [
        _move(
            *(w, g, v, left, right, rate),
            None if decay in (0.0, 1.0) else decay,
            momentum,
            None if fresh == 1.0 else fresh,
            *flags,
            decay == 0.0,
            measure,
        )
        for w, g, v, left, right, rate, decay in items
    ]
    if not measure:
        return None
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64, device="cpu")


def _check(*columns: Sequence[Any]) -> None:
    for w, g, v, s, c in zip(*columns, strict=True):
        check_same_shape("gradient", g, w)
        if v is not None:
            check_same_shape("velocity", v, w)
        if s is not None:
            along_units(s, w)
        if c is not None:
            along_features(c, w)


def scale_gradients_(
    gradients: Sequence[Tensor], lefts: Sequence[Tensor | None], rights: Sequence[Tensor | None]
) -> None:
    """Scale gradients in place: ``G <- L G R``.

    Args:
        gradients: Shapes (m,), (m, n) or (groups, units, features, taps); overwritten.
        lefts: Unit scales, shape (m,), or None for 1.
        rights: Feature scales, shape (n,), or None for 1; None for (m,) gradients.

    Raises:
        ValueError: If shapes do not fit; nothing is changed then.

    Reference:
        NeuRMS, "scale the gradient before the velocity", for optimizers that do the rest.

    Example:
        >>> import torch
        >>> g = torch.ones(2, 2)
        >>> scale_gradients_([g], [torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 3.0])])
        >>> g
        tensor([[1., 3.],
                [2., 6.]])
    """
    count = len(gradients)
    velocities = [None] * count
    apply_updates_(gradients, gradients, velocities, lefts, rights, [-1.0] * count, [0.0] * count)


# ------------------------------------------------------------- native


def _fit(items: Sequence[Item]) -> list[bool]:
    """Return which items have shapes that the native form serves as they are."""
    return [
        0 < w.ndim < 3
        and g.shape == w.shape
        and (v is None or v.shape == w.shape)
        and (left is None or left.shape == w.shape[:1])
        and (right is None or (w.ndim == 2 and right.shape == w.shape[1:]))
        for w, g, v, left, right in items
    ]


def as_rows(item: Item) -> Item | None:
    """Return an item as matrices stored by rows, or as vectors; None where it cannot be one."""
    w, g, velocity, left, right = item
    if w.ndim == 2 and not w.is_contiguous():
        v = None if velocity is None else velocity.mT
        item = w.mT, g.mT, v, right, left
    elif w.ndim == 4 and w.numel():
        groups, units, _, taps = w.shape
        blocks = [x for x in (w, g, velocity) if x is not None]
        if (right is not None and groups > 1) or not are_plain(blocks):
            return None
        if any(x.shape != w.shape for x in blocks):
            return None
        shape = groups * units, -1
        left = None if left is None else left.reshape(-1)
        right = None if right is None else right.reshape(-1).repeat_interleave(taps)
        v = None if velocity is None else velocity.view(shape)
        item = w.view(shape), g.view(shape), v, left, right
    return item if are_plain([x for x in item if x is not None]) and _fit([item])[0] else None


def have_rows(*columns: Sequence[Any]) -> list[bool]:
    """Return which items the native form serves; plain ones are seen without a call for each."""
    items: list[Item] = list(zip(*columns[:5], strict=True))
    plain = are_plain([x for item in items for x in item if x is not None])
    fit = _fit(items) if plain else [False] * len(items)
    return [good or as_rows(item) is not None for good, item in zip(fit, items, strict=True)]


def _apply_natively(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    velocities: Sequence[Tensor | None],
    *rest: Any,
) -> Tensor | None:
    lefts, rights, rates, decays, *numbers_and_flags, measure = rest
    kernels = library()
    assert kernels is not None
    items: Any = zip(weights, gradients, velocities, lefts, rights, strict=True)
    stored = map(Tensor.is_contiguous, weights)
    items = [
        item if by_rows and item[0].ndim < 3 else as_rows(item)
        for by_rows, item in zip(stored, items, strict=True)
    ]
    # A vector is one row, whose elements have factors of their own.
    items = [
        (w, g, v, left, right) if w.ndim == 2 else (w, g, v, None, left)
        for w, g, v, left, right in items
    ]
    w, g, v, left, right = zip(*items, strict=True)
    measured = torch.empty(len(w), dtype=torch.float64, device="cpu") if measure else None
    kernels.neurms_apply_updates(
        len(w),
        *map(addresses, (w, g, v)),
        numbers("q", [x.shape[0] if x.ndim == 2 else 1 for x in w]),
        numbers("q", [x.shape[-1] for x in w]),
        *map(addresses, (left, right)),
        numbers("f", rates),
        numbers("f", decays),
        *numbers_and_flags,
        None if measured is None else measured.data_ptr(),
        threads(),
    )
    # Autograd must know, as of any write: a graph that is kept has saved these weights.
    increment_version([*weights, *[x for x in velocities if x is not None]])
    return measured


# ------------------------------------------------------------- in graphs


def _result(weights: Sequence[Tensor], *rest: Any) -> Tensor:
    """Return what the operator does, uninitialised."""
    return weights[0].new_empty(len(weights) if rest[-1] else 0, dtype=torch.float64)


def _run(
    weights: Sequence[Tensor], gradients: Sequence[Tensor], velocities: Sequence[Tensor], *rest: Any
) -> Tensor:
    there = [v if v.shape == w.shape else None for v, w in zip(velocities, weights, strict=True)]
    sums = apply_updates_.on("auto")(weights, gradients, there, *rest)
    return _result(weights, *rest) if sums is None else sums


# A graph can hold no lists of absent tensors that are written into, for which empty ones stand, and
# no result that may be absent.
_operator = operator(
    _result,
    _run,
    ("weights", "velocities"),
    None,
    "apply_updates_",
    "(Tensor(a0!)[] weights, Tensor[] gradients, Tensor(a2!)[] velocities, Tensor?[] lefts, "
    "Tensor?[] rights, float[] rates, float[] decays, float momentum, float fresh, "
    "bool scale_gradient, bool scale_velocity, bool nesterov, bool measure) -> Tensor",
)


def _in_graph(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    velocities: Sequence[Tensor | None],
    *rest: Any,
) -> Tensor | None:
    # rest[2] are the rates; its last six have defaults.
    rest = (*rest, *(0.0, 1.0, True, False, False, False)[len(rest) - 4 :])
    if not weights or _operator is None or any(isinstance(rate, Tensor) for rate in rest[2]):
        return apply_updates_.eager(weights, gradients, velocities, *rest)
    there = [w.new_empty(0, 0, 0) if v is None else v for v, w in zip(velocities, weights)]  # noqa: B905
    sums: Tensor = _operator(weights, gradients, there, *rest)
    return sums if rest[-1] else None


apply_updates_.native(have_rows, _in_graph)(_apply_natively)
