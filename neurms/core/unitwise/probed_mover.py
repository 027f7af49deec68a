"""The step of variant P with ``update="backward"``: commits what backward has foreseen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from neurms.compiled.probes import mean_squares
from neurms.compiled.update import apply_updates_
from neurms.core.ground.spans import is_observed, span
from neurms.core.optimizers.view import View
from neurms.core.structures.gradient_moments import GradientMoments
from neurms.core.unitwise.gradient_layers import Layer
from neurms.core.unitwise.gradient_mover import (
    Factors,
    GradientMover,
    Holder,
    scales,
)
from neurms.core.unitwise.gradient_rule import partner_of
from neurms.core.unitwise.probed import ProbedLayer, ProbedLayers

__all__ = ["ProbedMover"]


class ProbedMover(GradientMover):
    """Moves what has a gradient as :class:`GradientMover` does, and commits probed layers.

    Args:
        optimizer: Holds routes and state, and this; so it had better be a weak proxy.
        layers: The layers that have no gradient.
    """

    def __init__(self, optimizer: Holder, layers: ProbedLayers) -> None:
        super().__init__(optimizer)
        self._probed = layers

    def prepare(self, views: Sequence[View]) -> None:
        """Refuse what a step must not take."""
        super().prepare(views)
        self._probed.check_use(self._probed, {id(view.parameter) for view in views})

    def judges(self, views: Sequence[View]) -> bool:
        """Return False: layers without a gradient are committed in the same step."""
        return False

    def look_at(self) -> tuple[list[Tensor], list[float]]:
        """Return what makes any look fail where backward has left something out."""
        return ([torch.ones(1)], [0.0]) if self._probed.bad_names() else ([], [])

    def bad_names(self) -> list[str]:
        """Return the layers that backward has left out."""
        return self._probed.bad_names()

    def move(self, views: Sequence[View]) -> None:
        """Commit probed layers and move their biases, then all others."""
        own = {id(view.parameter): view for view in views}
        alike: dict[GradientMoments, list[tuple[Layer, ProbedLayer]]] = {}
        pairs: list[tuple[Layer, ProbedLayer]] = []
        last: GradientMoments | None = None
        for probed in self._probed:
            if probed.foreseen is None and probed.products is None:
                continue
            other = partner_of(probed.route, self._optimizer.routes)
            bias = None if other is None else own.pop(id(other.parameter), None)
            weight = self._optimizer.view_of(probed.weight)
            layer = self._layer(weight, bias, moves=False)
            if layer.structure is not last:
                last, pairs = layer.structure, alike.setdefault(layer.structure, [])
            pairs += ((layer, probed),)
        weights = [layer.weight for together in alike.values() for layer, _ in together]
        # Small ones beside large weights run natively, wherever those have moved.
        backend = self._backend([*views, *weights])
        for pairs in alike.values():
            # Who measures wants each layer's time.
            for part in [[one] for one in pairs] if is_observed() else [pairs]:
                layers = [layer for layer, _ in part]
                self.write(layers, self._committed(part, backend), backend)
        super().move(list(own.values()))

    def _committed(self, pairs: Sequence[tuple[Layer, ProbedLayer]], backend: str) -> list[Factors]:
        """Commit what backward has seen, and move the weights that have waited for it."""
        factors: list[Factors] = []
        kept: list[Tensor] = []
        fresh: list[Tensor] = []
        for layer, probed in pairs:
            state, ahead = layer.weight.state, probed.foreseen
            if ahead is not None:
                kept += state["q"], state["s"]
                fresh += ahead.q, ahead.s
                factors += ((ahead.left, ahead.right),)
                continue
            assert probed.products is not None
            rows, columns = map(mean_squares, probed.products)
            factors += scales([layer], [(rows, columns)], layer.structure, backend)
            _move_waiting(layer, factors[-1], backend)
        if kept:
            torch._foreach_copy_(kept, fresh)
        return factors


def _move_waiting(layer: Layer, factors: Factors, backend: str) -> None:
    """Move a weight by its average M, which backward has brought up to date."""
    weight, (left, right) = layer.weight, factors
    target, rate = weight.target(), float(weight.group["lr"])
    with span("update", [weight.parameter]):
        apply_updates_.on(backend)(
            [target],
            [weight.state["momentum"]],
            [None],
            [left],
            [right[: layer.columns]],
            [rate],
            [weight.decay],
        )
        weight.written(target)
