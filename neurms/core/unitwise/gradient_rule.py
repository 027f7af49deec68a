"""What variant P's settings say, and which bias goes with which matrix."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from neurms.core.ground.errors import check_positive_int
from neurms.core.optimizers.recipe import Recipe
from neurms.core.routing import Head, Route, RoutedModel, route_model
from neurms.core.structures.gradient_moments import OF_AVERAGES, GradientMoments
from neurms.core.unitwise.rule import STRUCTURE_SETTINGS, beta_of, damping_of

__all__ = ["check_average", "check_probed", "gradient_recipe", "gradient_routes", "partner_of"]

_FOREIGN = (
    *("normalize", "momentum_coupling", "agc"),
    *(name for name in STRUCTURE_SETTINGS if name != "kappa"),
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
    structure = GradientMoments(
        beta_of(settings),
        settings["kappa"],
        settings["momentum"],
        settings["nesterov"],
        settings["moments"],
        damping_of(settings),
    )
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
                f'{name}={settings[name]!r} has no part in variant="P", the default, which scales '
                f"by the gradient's own moments; leave it at {defaults[name]!r}, or choose "
                'another variant, such as "U"'
            )


def check_average(settings: Mapping[str, Any]) -> None:
    """Raise if a gradient is wanted twice where none is formed.

    Raises:
        ValueError: One is.
    """
    for name, plain in OF_AVERAGES.items():
        if settings[name] != plain:
            raise ValueError(
                f'{name}={settings[name]!r} cannot go with update="backward", which never forms '
                f'the gradient that would enter once more; use update="step" or {name}={plain!r}'
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
    name = _own_name(route)
    if name not in _WEIGHTS or route.module is None or not _is_free(route):
        return route
    own = (r for r in taken.values() if r.module is route.module)
    weight = next((r for r in own if _own_name(r) == _WEIGHTS[name]), None)
    if weight is None:
        return route
    if route.parameter.requires_grad and not weight.parameter.requires_grad:
        return replace(route, reason="bias of a frozen weight")
    return replace(route, rule=weight.rule, reason=f"bias of {weight.name}: one more column of it")


def _is_free(route: Route) -> bool:
    """Return whether nobody has asked for the fallback, and no other module holds it."""
    return route.is_fallback and route.reason in ("bias", "1-D tensor: no matrix")


# Held weakly on both sides: a pair in here would keep itself, and its parameters, alive.
_PARTNERS: weakref.WeakKeyDictionary[Route, weakref.ref[Route] | None]
_PARTNERS = weakref.WeakKeyDictionary()


def partner_of(route: Route, routes: Mapping[Tensor, Route]) -> Route | None:
    """Return the bias that is a column of a matrix, or the matrix of a bias; None without one.

    By names and not by what the module holds now: pruning or a parametrization may have moved the
    weight elsewhere since, and the two belong together all the same.
    """
    if route.module is None:
        return None
    known = _PARTNERS.get(route)
    if known is not None:
        found = known()
        if found is not None and routes.get(found.parameter) is found:
            return found
    elif route in _PARTNERS:
        return None
    alike = [r for r in routes.values() if r.module is route.module and r.rule == route.rule]
    found = _by_name(route, alike) or _foreign(route, alike)
    _PARTNERS[route] = None if found is None else weakref.ref(found)
    return found


def _by_name(route: Route, alike: Sequence[Route]) -> Route | None:
    name = _own_name(route)
    wanted = (_WEIGHTS.get(name), next((b for b, w in _WEIGHTS.items() if w == name), None))
    return next((r for r in alike if r is not route and _own_name(r) in wanted), None)


def _own_name(route: Route) -> str:
    """Return a parameter's name in its module, before pruning."""
    return route.name.rpartition(".")[2].removesuffix("_orig")


def _foreign(route: Route, alike: Sequence[Route]) -> Route | None:
    """Return a matrix's bias, or a bias's matrix, in a layer of another framework.

    Of several kernels the last has the bias: it is the one that makes the outputs.
    """
    if route.module is None or _holds(route.module, route.parameter):
        return None
    kernels = [r for r in alike if r.parameter.ndim >= 2]
    pair = kernels[-1:] + [r for r in alike if r.parameter.ndim < 2]
    if len(pair) != 2 or not kernels or route not in pair:
        return None
    return pair[pair[0] is route]


def _holds(module: nn.Module, parameter: Tensor) -> bool:
    """Return whether a module has a parameter under a name of its own, as torch's layers do."""
    return any(own is parameter for own in module._parameters.values())
