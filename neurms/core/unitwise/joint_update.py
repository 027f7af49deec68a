"""How NeuRMS's factors reach many weights and biases in one call, where all of it is plain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from neurms.compiled.backends import PROMPT
from neurms.compiled.native import fits
from neurms.compiled.update import apply_updates_
from neurms.core.ground.spans import is_observed, span
from neurms.core.optimizers.work import Item

__all__ = ["Move", "moves_plainly", "write_updates_"]


class Move(NamedTuple):
    """A parameter's part in a step.

    Args:
        item: The parameter with its gradient and group.
        factors: s (m,), and c (n,) or None.
        state: Holds the velocity under ``"momentum"`` where the group has momentum.
    """

    item: Item
    factors: tuple[Tensor, Tensor | None]
    state: Mapping[str, Any]


def moves_plainly(
    item: Item, factors: tuple[Tensor, Tensor | None], state: Mapping[str, Any]
) -> bool:
    """Return whether a parameter moves as :func:`write_updates_` can move it.

    That is a bias or a weight of units by features, float32, whose group has neither clipping by
    rows nor what only :func:`~.layer_update.write_update_` knows.
    """
    group, target, gradient = item.group, item.parameter, item.gradient
    if target.ndim == 2:
        if item.route.layout.unit_axes != (0,) or group["agc"] is not None:
            return False
    elif target.ndim != 1:
        return False
    velocity = state["momentum"] if group["momentum"] else None
    if velocity is not None and group["variant"] == "B":
        return False
    s, c = factors
    return (
        gradient.shape == target.shape
        and s.shape == target.shape[:1]
        and fits(target, gradient, s, c, velocity)
    )


def write_updates_(moves: Sequence[Move]) -> None:
    """Move parameters by their scaled gradients, those of a group in one call.

    Args:
        moves: What :func:`moves_plainly` has found plain.
    """
    groups: dict[int, list[Move]] = {}
    for move in moves:
        groups.setdefault(id(move.item.group), []).append(move)
    for alike in groups.values():
        # Who measures wants each parameter's time.
        for part in [[one] for one in alike] if is_observed() else [alike]:
            with span("update", [move.item.parameter for move in part]):
                _write_(part, part[0].item.group)


def _write_(moves: Sequence[Move], group: Mapping[str, Any]) -> None:
    targets = [move.item.parameter for move in moves]
    # B's gradients came out of backward scaled.
    scaled = group["variant"] != "B"
    rate, momentum = float(group["lr"]), group["momentum"]
    decay = 1.0 - rate * group["weight_decay"]
    apply_updates_.on(PROMPT)(
        targets,
        [move.item.gradient for move in moves],
        [move.state["momentum"] if momentum else None for move in moves],
        [move.factors[0] if scaled else None for move in moves],
        [move.factors[1] if scaled else None for move in moves],
        [rate] * len(moves),
        [decay if target.ndim == 2 else 1.0 for target in targets],
        momentum,
        scale_velocity=group["momentum_coupling"] == "gradient+velocity",
    )
