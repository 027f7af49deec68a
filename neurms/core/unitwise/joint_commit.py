"""The commit of many layers in one call, where all that it reads and writes is plain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from neurms.compiled.backends import PROMPT
from neurms.compiled.moments import move_moments
from neurms.core.ground.spans import is_observed, span
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.core.unitwise.tapped import TappedLayer

__all__ = ["commit_each"]

Ready = tuple[TappedLayer, dict[str, Any]]


def commit_each(layers: Iterable[TappedLayer]) -> None:
    """Commit every layer, as :meth:`~.tapped.TappedLayer.commit` does, those that can together.

    Args:
        layers: Layers whose state is there.
    """
    alike: dict[int, tuple[UnitFeatureDiagonal, list[Ready]]] = {}
    for layer in layers:
        structure, state = layer.owner.structure_of(layer), layer.owner.state_of(layer)
        if layer.commits_plainly(structure, state):
            alike.setdefault(id(structure), (structure, []))[1].append((layer, state))
        else:
            layer.commit()
    for structure, ready in alike.values():
        for part in _parts(ready):
            _commit(structure, part)


def _parts(ready: list[Ready]) -> Iterator[Sequence[Ready]]:
    # Who measures wants each layer's time.
    return iter([[one] for one in ready] if is_observed() else [ready])


def _commit(structure: UnitFeatureDiagonal, ready: Sequence[Ready]) -> None:
    for _, state in ready:
        state["step"] += 1
    observed = [layer.observed for layer, _ in ready]
    reduction = ready[0][0].owner.loss_reduction
    root = structure.beta, structure.eps, structure.v_min
    corrections = [structure.divisor(state["step"]) for _, state in ready]
    with span("scale", [layer.weight for layer, _ in ready]):
        move = move_moments.on(PROMPT)
        moments = [state["v"] for _, state in ready]
        squares = [pending.units for pending in observed if pending.units is not None]
        weights = [pending.unit_weight(reduction) for pending in observed]
        bounds = structure.s_min, structure.s_max
        moved, units = move(moments, squares, weights, corrections, *root, *bounds)
        features: Sequence[Any] = [None] * len(ready)
        if structure.factored:
            other = [state["u"] for _, state in ready]
            squares = [pending.features for pending in observed if pending.features is not None]
            weights = [1.0 / pending.feature_rows for pending in observed]
            bounds = structure.c_min, structure.c_max
            more, features = move(other, squares, weights, corrections, *root, *bounds)
            moments, moved = moments + other, moved + more
        torch._foreach_copy_(moments, moved)
    for (layer, state), s, c in zip(ready, units, features, strict=True):
        layer.settle(structure, state, (s, c))
