"""Which Keras variable gets which rule, and why: :mod:`neurms.core.routing` for Keras layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import keras
import torch
from torch import Tensor

from neurms.core.ground.layout import Layout, default_layout
from neurms.core.routing import FALLBACK, Head, Route
from neurms.integrations.keras.layout import (
    RECURRENT,
    SEPARABLE,
    bias_follows_units,
    kernel_activity,
    kernel_layout,
    outputs_last,
)
from neurms.integrations.keras.owners import Surroundings

__all__ = ["VariableRoute", "lasting", "parameter_of", "route_variables"]


@dataclass(frozen=True)
class VariableRoute:
    """A variable and its route; the route's parameter is, or shares storage with, its value."""

    variable: Any
    route: Route


def route_variables(
    variables: Sequence[Any],
    around: Surroundings,
    rule: str,
    *,
    head: Head,
    exclude: Sequence[str] = (),
    taps: bool = False,
    biases: bool = False,
) -> list[VariableRoute]:
    """Route the variables that a Keras optimizer is built on.

    Args:
        variables: What the optimizer moves.
        around: Their layers and models.
        rule: Name of the rule for matrices.
        head: What the output head (the last Dense or EinsumDense outside of attention) gets.
        exclude: Patterns (``fnmatch``) of variable paths, or of their last parts; a layer's name
            covers all its variables.
        taps: Whether the rule needs D and H.
        biases: Whether it takes the biases of its layers.

    Returns:
        One route for each variable, in order.

    Raises:
        ValueError: A pattern of ``exclude`` matches no variable.
    """
    head_kernel = _head_kernel(around.variables(variables), around)
    routes = []
    for variable in variables:
        chosen, reason, layout = _choose(variable, around, rule)
        if variable is head_kernel and chosen == rule:
            chosen, reason = (rule if head == "rule" else FALLBACK), "output head"
        routes.append(_routed(variable, around, chosen, reason, layout))
    if taps:
        routes = [_tappable(entry) for entry in routes]
    routes = _excluded(routes, exclude)
    if biases:
        routes = _excluded(_with_biases(routes, rule), exclude)
    return routes


def _choose(variable: Any, around: Surroundings, rule: str) -> tuple[str, str, Layout]:
    owners = around.owners_of(variable)
    shape = tuple(variable.shape)
    plain = outputs_last(shape)
    if len(shape) < 2 or variable.name == "bias":
        kind = "bias" if variable.name == "bias" else f"{len(shape)}-D variable: no matrix"
        return FALLBACK, kind, plain
    if not owners:
        return rule, f"{len(shape)} axes, outputs last", plain
    if len(owners) > 1:
        return FALLBACK, f"tied: shared by {len(owners)} layers", plain
    owner = owners[0]
    if "lora" in variable.name:
        return FALLBACK, "LoRA factor", plain
    layout = kernel_layout(owner, variable)
    if isinstance(owner, keras.layers.Embedding):
        return FALLBACK, "embedding", layout or plain
    if layout is None:
        name = f"{type(owner).__name__}.{variable.name}"
        return FALLBACK, f"{name}: not a dense, convolution, recurrent or attention kernel", plain
    if isinstance(owner, RECURRENT):
        return rule, "recurrent weight", layout
    if id(owner) in around.attention:
        return rule, "attention projection", layout
    dense = isinstance(owner, (keras.layers.Dense, keras.layers.EinsumDense))
    return rule, "hidden dense layer" if dense else "convolution", layout


def _head_kernel(variables: Iterable[Any], around: Surroundings) -> Any:
    last = None
    for variable in variables:
        owners = around.owners_of(variable)
        if (
            len(owners) == 1
            and variable.name == "kernel"
            and isinstance(owners[0], (keras.layers.Dense, keras.layers.EinsumDense))
            and id(owners[0]) not in around.attention
        ):
            last = variable
    return last


def _routed(
    variable: Any, around: Surroundings, rule: str, reason: str, layout: Layout
) -> VariableRoute:
    owners = around.owners_of(variable)
    module = owners[0] if owners else None
    kind = type(module).__name__ if owners else "variable"
    value = parameter_of(variable)
    route = Route(around.name_of(variable), value, kind, rule, reason, layout, module)
    return VariableRoute(variable, route)


def parameter_of(variable: Any) -> Tensor:
    """Return the tensor that holds a variable, untouched by autocast scopes."""
    value: Tensor = variable._value
    return value


# -------------------------------------------------------------------- rules that need D and H


def _tappable(entry: VariableRoute) -> VariableRoute:
    route = entry.route
    if route.is_fallback:
        return entry
    reason = ""
    if route.module is None:
        reason = "belongs to no layer that could be tapped"
    elif isinstance(route.module, SEPARABLE):
        reason = "one call multiplies with two kernels: no error signal of its own"
    elif kernel_activity(route.module) is None or not hasattr(route.module, "activation"):
        reason = f"{route.kind} shows no error signal to tap"
    return replace(entry, route=replace(route, rule=FALLBACK, reason=reason)) if reason else entry


def _with_biases(routes: list[VariableRoute], rule: str) -> list[VariableRoute]:
    kernels = {id(e.route.module): e.route for e in routes if not e.route.is_fallback}
    return [_with_kernel(entry, kernels.get(id(entry.route.module)), rule) for entry in routes]


def _with_kernel(entry: VariableRoute, kernel: Route | None, rule: str) -> VariableRoute:
    """Return a bias's route as its layer's rule has it."""
    route = entry.route
    if kernel is None or route.reason != "bias" or not bias_follows_units(route.module):
        return entry
    parameter = route.parameter
    if parameter.ndim > 1:
        # One axis of units, in the same storage.
        parameter = torch.nn.Parameter(parameter.detach().view(-1))
    reason = f"bias of {kernel.name}: scaled by its s"
    layout = default_layout(parameter)
    own = replace(route, rule=rule, reason=reason, parameter=parameter, layout=layout)
    return replace(entry, route=own)


# -------------------------------------------------------------------- exclusion


def _excluded(routes: list[VariableRoute], patterns: Sequence[str]) -> list[VariableRoute]:
    for pattern in patterns:
        if not any(_named(entry, pattern) for entry in routes):
            paths = ", ".join(entry.route.name for entry in routes[:5])
            raise ValueError(f"exclude={pattern!r} matches no variable; paths look like: {paths}")
    return [next((_sent_away(e, p) for p in patterns if _named(e, p)), e) for e in routes]


def _sent_away(entry: VariableRoute, pattern: str) -> VariableRoute:
    value = parameter_of(entry.variable)
    reason = f"excluded by {pattern!r}"
    layout = outputs_last(tuple(value.shape))
    own = replace(entry.route, rule=FALLBACK, reason=reason, parameter=value, layout=layout)
    return replace(entry, route=own)


def _named(entry: VariableRoute, pattern: str) -> bool:
    return matches(entry.route.name, pattern) or matches(entry.variable.path, pattern)


def lasting(routes: Iterable[VariableRoute], pattern: str) -> list[str]:
    """Return patterns that name the same variables in a model loaded from a file."""
    named = [entry.route.name for entry in routes if _named(entry, pattern)]
    return [pattern] if all(matches(name, pattern) for name in named) else named


def matches(path: str, pattern: str) -> bool:
    """Return whether a pattern names a path, its last parts, or a layer around it."""
    parts = path.split("/")
    tails = ["/".join(parts[start:]) for start in range(len(parts))]
    return any(fnmatchcase(t, pattern) or fnmatchcase(t, f"{pattern}/*") for t in tails)
