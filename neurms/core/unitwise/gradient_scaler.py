"""Variant P beside somebody else's optimizer: gradients are scaled in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from neurms.core.ground.shards import local
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.view import View
from neurms.core.routing import FALLBACK, Route
from neurms.core.structures.gradient_moments import GradientMoments
from neurms.core.unitwise.gradient_mover import GradientMover, structure_of
from neurms.core.unitwise.gradient_moves import Target
from neurms.core.unitwise.gradient_rule import gradient_recipe
from neurms.core.unitwise.mover import velocity_like

__all__ = ["GradientScaler"]

State = dict[str, Any]


class GradientScaler:
    """Overwrites gradients of matrices and their biases by what variant P would move them by.

    Args:
        routes: Of all parameters.
        settings: A preconditioner's.
        defaults: Their defaults.
        state: Parameter -> state, shared with the preconditioner.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        settings: Mapping[str, Any],
        defaults: Mapping[str, Any],
        state: dict[Tensor, State],
    ) -> None:
        self.backend: str = settings["backend"]
        self.routes = {route.parameter: route for route in routes}
        self.state = state
        self._group = dict(settings, lr=0.0)
        self._recipe = gradient_recipe(settings, defaults)
        self._mover = _ScalingMover(self)
        self._views = {
            route.parameter: View(index, route, self._group, {}, route.parameter)
            for index, route in enumerate(routes)
            if not route.is_fallback
        }

    def scale(self, moving: Mapping[Tensor, Any]) -> list[Tensor]:
        """Scale the gradients of what the rule takes among ``moving``, and return those."""
        due = [
            view
            for parameter, view in self._views.items()
            if parameter in moving and parameter.grad is not None and not view.empty
        ]
        for view in due:
            assert view.parameter.grad is not None
            view.gradient = view.parameter.grad
            view.state = self.state.get(view.parameter, {})
        self._mover.prepare(due)
        self._mover.move(due)
        for view in due:
            view.gradient = view.parameter
        return [view.parameter for view in due]

    def new_state(self, parameter: Tensor, like: Tensor) -> State:
        """Return fresh state for a parameter, on the device of ``like``."""
        route = self.routes[parameter]
        return {} if route.rule == FALLBACK else self._mover.state_for(like, route, self._group)

    @property
    def structure(self) -> GradientMoments:
        """The settings of all matrices."""
        return structure_of(self._recipe)

    # ---------------------------------------------------------------- what the mover asks for

    def recipe_of(self, group: Mapping[str, Any]) -> Recipe:
        """Return the recipe of the settings."""
        return self._recipe

    def view_of(self, parameter: Tensor) -> View:
        """Return a parameter's view."""
        return self._views[parameter]

    def opened_state(self, parameter: Tensor) -> State:
        """Return a parameter's state, made if it is not there."""
        state = self.state.setdefault(parameter, {})
        if not state:
            state.update(self.new_state(parameter, parameter))
        if self._group["momentum"] and "momentum" not in state:
            state["momentum"] = velocity_like(parameter)
        return state


class _ScalingMover(GradientMover):
    """Moves gradients to what would have moved the parameters."""

    def _target(self, view: View, decay: float) -> Target:
        gradient = view.parameter.grad
        assert gradient is not None
        return Target(local(gradient), -1.0, 0.0)

    def _targets(
        self, weights: Sequence[View], biases: Sequence[View]
    ) -> tuple[list[Tensor], list[float], list[float]]:
        views = [*weights, *biases]
        # Stored as their rule sees them, and so is what they are.
        return [view.gradient for view in views], [-1.0] * len(views), [0.0] * len(views)

    def _written(self, view: View, target: Tensor) -> None:
        """Leave the parameter as it is."""
