"""How factors reach a tensor: a weight that moves, or a gradient that is scaled in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neurms.compiled.agc import row_clip_
from neurms.compiled.update import apply_updates_
from neurms.core.ground.layout import Layout
from neurms.core.unitwise.rule import UnitwiseRule

__all__ = ["Factors", "Move", "apply_", "seen", "write_moves_"]

Factors = tuple[Tensor | None, Tensor | None]


class Move(NamedTuple):
    """One tensor's part: T <- decay T - rate S G C, or with a velocity in between.

    Args:
        target: A weight of any layout, or a bias (m,); overwritten.
        gradient: G, the same shape; it may be the target itself.
        velocity: The same shape, advanced in place, or None without momentum.
        layout: Units and features of all three.
        factors: s (m,) and c (n,), None for 1.
        rate: Learning rate.
        decay: What is kept of the target.
        weight: What ``agc`` bounds the rows of the update by.
        gain: Factor of the update, before ``agc``.
    """

    target: Tensor
    gradient: Tensor
    velocity: Tensor | None
    layout: Layout
    factors: Factors
    rate: float
    decay: float
    weight: Tensor
    gain: float | Tensor = 1.0


def write_moves_(moves: Sequence[Move], rule: UnitwiseRule, backend: str = "auto") -> None:
    """Move tensors by their scaled gradients, all of them in one call.

    Args:
        moves: Tensors of one parameter group.
        rule: Its rule.
        backend: How kernels run.
    """
    bounded = [rule.agc is not None and move.target.ndim > 1 for move in moves]
    apply_([move for move, own in zip(moves, bounded, strict=True) if not own], rule, backend)
    for move, own in zip(moves, bounded, strict=True):
        if own:
            _apply_clipped_(move, rule, backend)


def apply_(moves: Sequence[Move], rule: UnitwiseRule, backend: str) -> None:
    """Move tensors of one parameter group in one call, without ``agc``."""
    shown = [seen(move) for move in moves]
    velocities = [move.velocity for move in shown]
    # B's gradients came out of backward scaled; its velocity may be scaled once more.
    applied = not rule.upstream or (rule.momentum and rule.coupled)
    apply_updates_.on(backend)(
        [move.target for move in shown],
        [move.gradient for move in shown],
        velocities if rule.momentum else [None] * len(shown),
        [move.factors[0] if applied else None for move in shown],
        [move.factors[1] if applied else None for move in shown],
        [move.rate * move.gain for move in shown],
        [move.decay for move in shown],
        momentum=rule.momentum,
        scale_gradient=not rule.upstream,
        scale_velocity=rule.coupled,
    )
    for move, own in zip(moves, shown, strict=True):
        if own is not move:
            _write_back(move.layout, move.target, own.target)
            if move.velocity is not None and own.velocity is not None:
                _write_back(move.layout, move.velocity, own.velocity)


def _apply_clipped_(move: Move, rule: UnitwiseRule, backend: str) -> None:
    """As above, with the update formed so that its rows can be bounded."""
    wide = move.gradient.dtype if move.velocity is None else move.velocity.dtype
    update = torch.empty_like(move.gradient, dtype=wide).zero_()
    apply_([move._replace(target=update, rate=-1.0, decay=0.0)], rule, backend)
    rows = move.layout.matrix(update).clone()
    assert rule.agc is not None
    row_clip_(rows, move.layout.matrix(move.weight.detach().to(rows.dtype)), rule.agc)
    clipped = move.layout.from_matrix(rows)
    move.target.mul_(move.decay).add_(clipped.to(move.target.dtype), alpha=-move.rate)


def seen(move: Move) -> Move:
    """Return a move of a vector or a matrix as it is, of anything else by blocks.

    Blocks (groups, units, features, taps) are views, or copies where the strides of the kernel
    positions allow none.
    """
    layout = move.layout
    if move.target.ndim < 2 or layout.is_matrix:
        return move
    return move._replace(
        target=_blocks(layout, move.target),
        gradient=_blocks(layout, move.gradient),
        velocity=None if move.velocity is None else _blocks(layout, move.velocity),
    )


def _blocks(layout: Layout, tensor: Tensor) -> Tensor:
    try:
        return layout.blocks(tensor)
    except RuntimeError:
        return layout.blocks(tensor.contiguous())


def _write_back(layout: Layout, tensor: Tensor, blocks: Tensor) -> None:
    """Bring ``tensor`` up to date if its ``blocks``, which were written, are a copy."""
    if blocks.data_ptr() != tensor.data_ptr():
        own = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        layout.blocks(own).copy_(blocks)
        tensor.copy_(own)
