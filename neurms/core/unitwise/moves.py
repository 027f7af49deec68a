"""How factors reach a tensor: a weight that moves, or a gradient that is scaled in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neurms.compiled.agc import row_clip_
from neurms.compiled.move_square_sums import move_square_sums
from neurms.compiled.update import apply_updates_
from neurms.core.ground.layout import Layout
from neurms.core.ground.shards import local, row_shard
from neurms.core.ground.spans import SpanKind, is_observed, span
from neurms.core.optimizers.view import View
from neurms.core.unitwise.lengths import Length, gains_, over_ranks
from neurms.core.unitwise.rule import UnitwiseRule
from neurms.core.unitwise.statistics import Factors

__all__ = ["Move", "Scaled", "move_", "write_moves_"]


Scaled = tuple[View, Factors, int]
"""A parameter that moves, its factors s and c, and the number of its step."""


def move_(
    parts: Sequence[Scaled], rule: UnitwiseRule, backend: str, *, into_gradients: bool = False
) -> None:
    """Move parameters of one group by their scaled gradients.

    Args:
        parts: The parameters, whose state holds a velocity and a length where those are due.
        rule: Their rule.
        backend: How kernels run.
        into_gradients: Whether gradients are overwritten by what would move the parameters, for an
            optimizer that does the rest.
    """
    if not parts:
        return
    if not into_gradients and _move_at_once_(parts, rule, backend):
        return
    kind: SpanKind = "scale" if into_gradients else "update"
    of = _into_gradient if into_gradients else _into_weight
    moves = None
    if rule.normalize:
        # Measured all together, observed or not: the other ranks take part in one exchange.
        with span("scale", [view.parameter for view, _, _ in parts]):
            moves = normalized([of(part, rule) for part in parts], parts, rule, backend)
    # Who measures wants each parameter's time.
    for own in [slice(i, i + 1) for i in range(len(parts))] if is_observed() else [slice(None)]:
        with span(kind, [view.parameter for view, _, _ in parts[own]]):
            made = [of(part, rule) for part in parts[own]] if moves is None else moves[own]
            write_moves_([move for move in made if move.target.numel()], rule, backend)
            if not into_gradients:
                for (view, _, _), move in zip(parts[own], made, strict=True):
                    view.written(move.target)


def _move_at_once_(parts: Sequence[Scaled], rule: UnitwiseRule, backend: str) -> bool:
    """Move parameters that are matrices and vectors as they are; return whether they were.

    The same one call of the kernel, whose lists are made without a call for each parameter.
    """
    if rule.normalize is not None or rule.agc is not None or is_observed():
        return False
    views = [view for view, _, _ in parts]
    if not all([v.kept is v.dtype and not v.sharded for v in views]):
        return False
    targets = [view.parameter for view in views]
    two = [target.ndim >= 2 for target in targets]
    if not all([v.route.layout.is_matrix for v, own in zip(views, two, strict=True) if own]):
        return False
    # B's gradients came out of backward scaled; its velocity may be scaled once more.
    applied = not rule.upstream or (rule.momentum and rule.coupled)
    absent: list[Tensor | None] = [None] * len(parts)
    rate, decay = float(views[0].group["lr"]), views[0].decay
    apply_updates_.on(backend)(
        targets,
        [view.gradient for view in views],
        [view.state["momentum"] for view in views] if rule.momentum else absent,
        [s for _, (s, _), _ in parts] if applied else absent,
        [c for _, (_, c), _ in parts] if applied else absent,
        [rate] * len(parts),
        [decay if own else 1.0 for own in two],
        momentum=rule.momentum,
        scale_gradient=not rule.upstream,
        scale_velocity=rule.coupled,
    )
    return True


def _into_weight(part: Scaled, rule: UnitwiseRule) -> Move:
    view, target = part[0], part[0].target()
    # Weight decay is for weights.
    decay = view.decay if view.parameter.ndim >= 2 else 1.0
    gradient, velocity, layout, factors = _shown(part, rule)
    rate = float(view.group["lr"])
    return Move(target, gradient, velocity, layout, factors, rate, decay, target)


def _into_gradient(part: Scaled, rule: UnitwiseRule) -> Move:
    gradient, velocity, layout, factors = _shown(part, rule)
    weight = local(part[0].parameter)
    return Move(gradient, gradient, velocity, layout, factors, -1.0, 0.0, weight)


def _shown(
    part: Scaled, rule: UnitwiseRule
) -> tuple[Tensor, Tensor | None, Layout, tuple[Tensor | None, Tensor | None]]:
    """Return what this rank holds of a gradient and its velocity, with their layout and factors."""
    view, factors, _ = part
    gradient, layout = view.gradient, view.route.layout
    velocity = view.state["momentum"] if rule.momentum else None
    if not view.sharded:
        return gradient, velocity, layout, factors
    shard = row_shard(view.parameter, layout)
    assert shard is not None, "other cuts are refused when layers are attached"
    layout, s, c = shard.narrowed(layout, *factors)
    return local(gradient), None if velocity is None else local(velocity), layout, (s, c)


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
    factors: tuple[Tensor | None, Tensor | None]
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


# ------------------------------------------------------------- normalize="rms"


def normalized(
    moves: Sequence[Move], parts: Sequence[Scaled], rule: UnitwiseRule, backend: str
) -> list[Move]:
    """Return moves whose updates are divided by their lengths; velocities advance at once.

    One more read of what moves the tensors, and one all-reduce of a float64 number for each where
    ranks hold rows of them.

    Args:
        moves: Tensors of one parameter group; those without entries, of a rank that a small matrix
            does not reach, too.
        parts: Their parameters, which have the lengths.
        rule: Their rule.
        backend: How kernels run.
    """
    lengths = [_length_of(view, step) for view, _, step in parts]
    own = _without_velocity(moves, rule, backend)
    # A part without rows of a grouped kernel has no blocks to be seen as.
    there = [seen(move) for move in own if move.target.numel()]
    found = move_square_sums.on(backend)(
        [move.gradient for move in there],
        [move.factors[0] for move in there],
        [move.factors[1] for move in there],
    )
    pieces = iter(found.unbind())
    device = moves[0].target.device
    zero = torch.zeros((), dtype=torch.float64, device=device)
    sums = [next(pieces).to(device) if move.target.numel() else zero for move in own]
    gains = gains_(lengths, over_ranks(torch.stack(sums), lengths))
    # On a CPU plain numbers, which cost less; an accelerator is not waited for.
    factors: Sequence[Any] = gains.tolist() if gains.is_cpu else gains.unbind()
    return [move._replace(gain=gain) for move, gain in zip(own, factors, strict=True)]


def _without_velocity(moves: Sequence[Move], rule: UnitwiseRule, backend: str) -> list[Move]:
    """Return moves whose gradient and factors are all that moves their targets."""
    nothing = (None, None)
    # B's gradients came out of backward scaled.
    entering = [move._replace(factors=nothing) if rule.upstream else move for move in moves]
    if not rule.momentum:
        return entering
    advance, rest = [], []
    for move, before in zip(moves, entering, strict=True):
        velocity = move.velocity
        assert velocity is not None
        advance.append(
            before._replace(target=velocity, velocity=None, rate=-1.0, decay=rule.momentum)
        )
        leaving = move.factors if rule.coupled else nothing
        rest.append(move._replace(gradient=velocity, velocity=None, factors=leaving))
    apply_([move for move in advance if move.target.numel()], rule, backend)
    return rest


def _length_of(view: View, step: int) -> Length:
    parameter = view.parameter
    shard = row_shard(parameter, view.route.layout) if view.sharded else None
    return Length(view.state["length"], step, parameter.numel(), shard)
