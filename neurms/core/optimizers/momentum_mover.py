"""The step of rules whose momentum has taken the gradient during backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neurms.core.optimizers.by_recipe import RecipeMover
from neurms.core.optimizers.momentum_layers import MomentumLayers
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.view import View

__all__ = ["MomentumMover"]


class MomentumMover(RecipeMover):
    """Moves what has a gradient by its recipe, and what has none by what follows the momentum.

    There M takes the gradient's place: nothing else tells the two kinds of matrices apart.

    Args:
        recipe_of: Returns a group's recipe.
        layers: The layers that have no gradient.
    """

    def __init__(
        self, recipe_of: Callable[[Mapping[str, Any]], Recipe], layers: MomentumLayers
    ) -> None:
        super().__init__(recipe_of)
        self._layers = layers

    def prepare(self, views: Sequence[View]) -> None:
        """Find recipes, and refuse what a step must not take."""
        super().prepare(views)
        self._layers.check_use(self._layers, {id(view.parameter) for view in views})

    def look_at(self) -> tuple[list[Tensor], list[float]]:
        """Return what makes any look fail where backward has left something out."""
        return ([torch.ones(1, device="cpu")], [0.0]) if self._layers.bad_names() else ([], [])

    def bad_names(self) -> list[str]:
        """Return the layers that backward has left out."""
        return self._layers.bad_names()

    def move(self, views: Sequence[View]) -> None:
        """Move all that has a gradient or a momentum that holds one."""
        owner, waiting = self._layers.owner, []
        for layer in self._layers:
            if layer.begun:
                assert layer.recipe is not None
                view, recipe = owner.view_of(layer.weight), layer.recipe
                # The step lets go of it as of any gradient.
                view.recipe, view.gradient = recipe.tail, recipe.momentum.velocity(view.state)
                waiting.append(view)
        super().move([*views, *waiting])
