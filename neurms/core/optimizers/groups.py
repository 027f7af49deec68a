"""Parameter groups: what users pass, checked and completed; the rate that the fallback goes by."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from neurms.core.ground.errors import MissingParametersError, check_real
from neurms.core.ground.precision import LowPrecision
from neurms.core.optimizers.recipes import default_settings
from neurms.core.optimizers.rules import rule_class
from neurms.core.optimizers.settings import check_group
from neurms.core.routing import FALLBACK, Route, refuse_placeholder

__all__ = ["Params", "check_parameters", "completed", "parameters_of", "refuse_dtype"]

Params: TypeAlias = (
    "nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]"
)
Group = dict[str, Any]


def completed(param_group: Any, rule: str, defaults: Mapping[str, Any], rate: float) -> Group:
    """Return a new group with everything that a step reads; raises before anything is changed.

    Args:
        param_group: As in ``torch.optim``; ``"rule"`` may name another rule or ``"fallback"``.
        rule: The optimizer's own rule.
        defaults: The optimizer's settings.
        rate: The learning rate that :func:`base_rate` of the optimizer's own groups is.

    Raises:
        MissingParametersError: ``"params"`` is missing.
        ValueError: A setting is out of its range.
        TypeError: It is no dictionary, ``"params"`` has no order, or a setting holds for the whole
            optimizer.
    """
    needed = f"param_group={param_group!r} must be a dictionary with 'params'"
    if not isinstance(param_group, dict):
        raise TypeError(needed)
    if "params" not in param_group:
        raise MissingParametersError(needed)
    group = dict(param_group)
    if isinstance(group["params"], Tensor):
        group["params"] = [group["params"]]
    elif isinstance(group["params"], set):
        raise TypeError("params must have an order that is the same in every run; pass a list")
    else:
        group["params"] = list(group["params"])
    group.setdefault("rule", rule)
    if group.get("update", "step") != "step":
        raise TypeError(
            f"a parameter group sets update={group['update']!r}, which holds for the whole "
            "optimizer; pass it to the constructor"
        )
    if group["rule"] not in (rule, FALLBACK):
        for key, value in default_settings(rule_class(group["rule"])).items():
            if key != "update":
                group.setdefault(key, value)
    for key, value in defaults.items():
        # torch adds it to the defaults when it unpickles.
        if key != "differentiable":
            group.setdefault(key, value)
    check_real("lr", group["lr"])
    check_group(group)
    group.setdefault("base_lr", base_rate(group, param_group, rule, rate))
    check_real("base_lr", group["base_lr"], strict=True)
    return group


def base_rate(group: Group, given: Mapping[str, Any], rule: str, rate: float) -> float:
    """Return the ``lr`` at which the fallback's parameters of a group move by ``fallback_lr``.

    Args:
        group: The group, complete.
        given: The group as its user wrote it.
        rule: The optimizer's own rule.
        rate: The optimizer's ``lr``, or its rule's default where that is 0.
    """
    if group["rule"] == rule:
        return rate
    if group["rule"] == FALLBACK:
        # Its lr is AdamW's own, unless fallback_lr says what that is.
        own = "lr" in given and "fallback_lr" not in given
        return float(group["fallback_lr"]) or 1.0 if own else rate
    default = float(default_settings(rule_class(group["rule"]))["lr"])
    return float(group["lr"]) or default


def parameters_of(group: Mapping[str, Any]) -> list[tuple[str | None, Tensor]]:
    """Return a group's parameters with the names that they come with, None for none.

    Raises:
        TypeError: One is no tensor.
        ValueError: One comes twice, or there are not as many names as parameters.
    """
    named = [p if isinstance(p, tuple) else (None, p) for p in group["params"]]
    for _, tensor in named:
        if not isinstance(tensor, Tensor):
            kind = type(tensor)
            cure = "pass tensors"
            if kind.__module__.startswith("keras."):
                cure += ", or compile the Keras model with neurms.integrations.keras"
            raise TypeError(f"params holds {reprlib.repr(tensor)}, a {kind.__name__}; {cure}")
    if len({id(tensor) for _, tensor in named}) < len(named):
        raise ValueError("params holds a parameter twice; pass each parameter once")
    if "param_names" in group and all(name is None for name, _ in named):
        names: Sequence[str] = group["param_names"]
        if len(names) != len(named):
            raise ValueError(
                f"param_names holds {len(names)} names for {len(named)} parameters; give a name to "
                "each, or leave param_names out, as for a ZeroRedundancyOptimizer, which divides "
                "parameters but not their names"
            )
        return [(name, tensor) for name, (_, tensor) in zip(names, named, strict=True)]
    return named


def check_parameters(routes: Iterable[Route], low_precision: LowPrecision) -> None:
    """Raise unless parameters are what can be preconditioned: their dtypes, and their shapes."""
    for route in routes:
        refuse_placeholder(route.name, route.parameter)
        refuse_dtype(route, low_precision)


def refuse_dtype(route: Route, low_precision: LowPrecision) -> None:
    """Raise for a parameter that can be trained and whose dtype no rule can work on.

    Raises:
        TypeError: It is complex or integer.
        ValueError: It is float16, and results are to be rounded stochastically.
    """
    dtype = route.parameter.dtype
    if not route.parameter.requires_grad and not dtype.is_floating_point:
        # A quantised base beside trained adapters: it never has a gradient.
        return
    if not dtype.is_floating_point:
        raise TypeError(
            f"parameter {route.name!r} has dtype {dtype}; only real floating dtypes can be "
            "preconditioned, give complex or integer ones to another optimizer"
        )
    if dtype == torch.float16 and low_precision == "stochastic":
        raise ValueError(
            f"low_precision='stochastic' rounds to bfloat16, and parameter {route.name!r} is "
            "float16; choose 'master' or 'nearest'"
        )
