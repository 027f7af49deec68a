"""What variant P's settings say, and which bias goes with which matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from neurms.core.ground.errors import check_positive_int
from neurms.core.optimizers.recipe import Recipe
from neurms.core.routing import Head, Route, RoutedModel, route_model
from neurms.core.structures.gradient_moments import GradientMoments
from neurms.core.unitwise.rule import beta_of

__all__ = ["bias_of", "check_probed", "gradient_recipe", "gradient_routes"]

_FOREIGN = (
    "normalize",
    "eps",
    "v_min",
    "s_min",
    "s_max",
    "c_min",
    "c_max",
    "bias_correction",
    "momentum_coupling",
    "agc",
    "clip",
)
"""Settings of U, B and F that mean nothing here."""

_WEIGHTS = {"bias": "weight", "in_proj_bias": "in_proj_weight"}
"""A bias's name in its module -> the name of the matrix whose column it is."""


def gradient_recipe(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> Recipe:
    """Return the recipe of variant P.

    Args:
        settings: A parameter group's.
        defaults: NeuRMS's.

    Raises:
        ValueError: One is out of its range, or has no meaning for this variant.
    """
    check_probed(settings, defaults, _FOREIGN)
    check_positive_int("probes", settings["probes"])
    check_positive_int("seed", settings["seed"], low=0)
    structure = GradientMoments(beta_of(settings), settings["kappa"], settings["momentum"])
    return Recipe((structure,), batched=False)


def check_probed(
    settings: Mapping[str, Any], defaults: Mapping[str, Any], names: Sequence[str]
) -> None:
    """Raise if a setting that means nothing for variant P is not its default.

    Raises:
        ValueError: One is not.
    """
    for name in names:
        if name in settings and settings[name] != defaults[name]:
            raise ValueError(
                f'{name}={settings[name]!r} has no part in variant="P", which scales by the '
                f"gradient's own moments; leave it at {defaults[name]!r}, or choose another variant"
            )


def gradient_routes(model: nn.Module, rule: str, head: Head, exclude: Sequence[str]) -> list[Route]:
    """Route a model as every rule does, and the biases of what it takes with it."""
    if isinstance(model, RoutedModel):
        return model.routes
    routes = route_model(model, rule, head=head, exclude=exclude)
    taken = {route.parameter: route for route in routes if not route.is_fallback}
    return [_with_weight(route, taken) for route in routes]


def _with_weight(route: Route, taken: Mapping[Tensor, Route]) -> Route:
    """Return a bias's route as its layer's rule has it."""
    name = route.name.rpartition(".")[2]
    if name not in _WEIGHTS or route.module is None or not _is_free(route):
        return route
    weight = taken.get(route.module._parameters.get(_WEIGHTS[name]))  # type: ignore[arg-type]
    if weight is None:
        return route
    if route.parameter.requires_grad and not weight.parameter.requires_grad:
        return replace(route, reason="bias of a frozen weight")
    return replace(route, rule=weight.rule, reason=f"bias of {weight.name}: one more column of it")


def _is_free(route: Route) -> bool:
    """Return whether nobody has asked for the fallback, and no other module holds it."""
    return route.is_fallback and route.reason in ("bias", "1-D tensor: no matrix")


def bias_of(route: Route, routes: Mapping[Tensor, Route]) -> Route | None:
    """Return the route of the bias that is a column of a matrix, None where there is none."""
    name, module = route.name.rpartition(".")[2], route.module
    if module is None:
        return None
    for bias, weight in _WEIGHTS.items():
        found = routes.get(module._parameters.get(bias)) if weight == name else None  # type: ignore[arg-type]
        if found is not None and found.rule == route.rule:
            return found
    return None
