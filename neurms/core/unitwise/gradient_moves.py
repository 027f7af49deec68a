"""Moves of variant P by tensor: of matrices that are cut or laid out otherwise, and of biases."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from neurms.compiled.update import apply_updates_
from neurms.core.ground.shards import local, own_part
from neurms.core.optimizers.view import View
from neurms.core.structures.gradient_moments import GradientMoments
from neurms.core.unitwise.gradient_layers import Layer, vector

__all__ = ["Move", "Target", "apply_", "moves_of"]


class Target(NamedTuple):
    """What a scaled gradient enters: T <- decay T - rate U."""

    tensor: Tensor
    rate: float
    decay: float


@dataclass(slots=True, eq=False)
class Move:
    """One tensor's part: T <- decay T - rate left X right, X the gradient or its average.

    ``formed`` ones are stored in a way that the list kernel does not know as a matrix, or are cut
    otherwise than by rows.
    """

    view: View
    target: Tensor
    rows: bool
    left: Tensor
    right: Tensor | None
    rate: float
    decay: float
    matrix: Tensor
    gradient: Tensor
    velocity: Tensor | None
    formed: bool


def moves_of(
    layer: Layer,
    left: Tensor,
    right: Tensor,
    target_of: Callable[[View, float], Target],
    averages: bool,
) -> list[Move]:
    """Return the moves of a layer's matrix and bias.

    Args:
        layer: The matrix with its bias.
        left: Its rows' factors, shape (m,).
        right: Its columns' factors, shape (n,), or (n + 1,) with a bias.
        target_of: What a parameter's scaled gradient enters, from its view and decay.
        averages: Whether the gradient's average moves the weights.
    """
    weight, bias = layer.weight, layer.bias
    rows = weight.shard is not None
    moves = []
    if layer.moves:
        target = target_of(weight, weight.decay)
        moves.append(_move_of(weight, target, rows, left, right[: layer.columns], averages))
    if bias is not None:
        # Weight decay is for weights.
        target = target_of(bias, 1.0)
        moves.append(_move_of(bias, target, rows, left * right[-1], None, averages))
    return moves


def _move_of(
    view: View, into: Target, rows: bool, left: Tensor, right: Tensor | None, averages: bool
) -> Move:
    target, rate, decay = into
    velocity = local(view.state["momentum"]) if averages else None
    if view.sharded and not rows:
        return Move(
            view, target, rows, left, right, rate, decay, target, view.gradient, velocity, True
        )
    gradient = local(view.gradient)
    if right is None:
        gradient = gradient.to(view.dtype)
        return Move(view, target, rows, left, right, rate, decay, target, gradient, velocity, False)
    matrix, gradient = view.matrix(target), view.matrix(gradient)
    formed = matrix.data_ptr() != target.data_ptr()
    if velocity is not None:
        seen = view.matrix(velocity)
        formed = formed or seen.data_ptr() != velocity.data_ptr()
        velocity = velocity if formed else seen
    if formed:
        gradient = view.gradient
    return Move(view, target, rows, left, right, rate, decay, matrix, gradient, velocity, formed)


def apply_(moves: Sequence[Move], structure: GradientMoments, backend: str) -> None:
    """Take moves: those of stored matrices and biases in one call, the others one by one."""
    _apply_stored_([m for m in moves if not m.formed and m.matrix.numel()], structure, backend)
    for move in moves:
        if move.formed:
            _apply_formed_(move, structure)


def _apply_stored_(moves: Sequence[Move], structure: GradientMoments, backend: str) -> None:
    if not moves:
        return
    momentum = structure.momentum
    apply_updates_.on(backend)(
        [move.matrix for move in moves],
        [move.gradient for move in moves],
        [move.velocity for move in moves],
        [move.left for move in moves],
        [move.right for move in moves],
        [move.rate for move in moves],
        [move.decay for move in moves],
        momentum=momentum,
        fresh=1.0 - momentum,
        scale_gradient=not momentum,
        scale_velocity=bool(momentum),
        nesterov=structure.nesterov,
    )


def _apply_formed_(move: Move, structure: GradientMoments) -> None:
    view, x = move.view, move.gradient
    here = move.rows or not view.sharded
    if move.velocity is not None:
        own = (local(x) if here else own_part(x, view.parameter)).to(view.dtype)
        move.velocity.lerp_(own, 1.0 - structure.momentum)
        average = view.state["momentum"]
        if structure.nesterov:
            x = structure.moving(view.seen(x).to(view.dtype), view.seen(average))
        else:
            x = average
    if move.right is None:
        step = vector(view, x, move.rows) * move.left
    else:
        update = view.matrix(view.seen(x)) * move.left[:, None] * move.right
        step = view.layout.from_matrix(update)
    if move.decay != 1.0:
        move.target.mul_(move.decay)
    move.target.add_(step if here else own_part(step, view.parameter), alpha=-move.rate)
