"""Which parameters there are: their groups, their routes, the recipes that settings make."""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from neurms.core.ground.errors import check_kinds, check_real
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.rules import rule_class
from neurms.core.optimizers.settings import GROUP_SETTINGS, CommonSettings, check_group
from neurms.core.routing import (
    FALLBACK,
    Head,
    Route,
    check_patterns,
    excluded,
    route_model,
    route_tensors,
)

__all__ = ["GroupedParameters", "Params"]

Params: TypeAlias = (
    "nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]"
)


class GroupedParameters(torch.optim.Optimizer):
    """The parameters of an optimizer, checked and routed; it moves none of them yet.

    Args:
        params: A model (routed by module kind), parameters, named parameters or parameter groups.
        settings: The rule's own settings, ``lr`` among them.
        common: Settings that every optimizer has, complete and checked.
    """

    rule: ClassVar[str]
    default_head: ClassVar[Head] = "fallback"
    needs_modules: ClassVar[bool] = False
    """Whether the rule needs more than gradients, so that no group can ask for it by name."""

    def __init__(self, params: Params, settings: Mapping[str, Any], common: CommonSettings) -> None:
        self.low_precision = common["low_precision"]
        self._routes: dict[Tensor, Route] = {}
        self._exclude = common["exclude"]
        self._recipes: dict[Any, Recipe] = {}
        defaults: dict[str, Any] = {"rule": self.rule, **settings}
        defaults |= {key: value for key, value in common.items() if key in GROUP_SETTINGS}
        if isinstance(params, nn.Module):
            for route in self._route(params, common["head"] or self.default_head):
                self._routes[route.parameter] = route
            params = [(route.name, p) for p, route in self._routes.items()]
        super().__init__(params, defaults)
        check_patterns(self._routes.values(), self._exclude)

    # ---------------------------------------------------------------- parameters and groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, with settings of its own and possibly another rule.

        Args:
            param_group: As in ``torch.optim``; ``"rule"`` may name another rule of the library or
                ``"fallback"``.

        Raises:
            ValueError: A setting is out of its range, or a parameter comes twice; nothing was added
                in either case.
            TypeError: A parameter is no tensor, or complex, or integer.
        """
        group = self._completed(param_group)
        if group["rule"] != FALLBACK:
            self._recipe(group)
        tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                raise TypeError(f"params holds {tensor!r}, a {type(tensor).__name__}; pass tensors")
        if len({id(tensor) for tensor in tensors}) < len(tensors):
            raise ValueError("params holds a parameter twice; pass each parameter once")
        routes = self._routes_of(group)
        for route in routes:
            self._check_dtype(route)
        super().add_param_group(group)
        self._routes.update({route.parameter: route for route in routes})

    def _check_dtype(self, route: Route) -> None:
        dtype = route.parameter.dtype
        if not dtype.is_floating_point:
            raise TypeError(
                f"parameter {route.name!r} has dtype {dtype}; only real floating dtypes can be "
                "preconditioned, give complex or integer ones to another optimizer"
            )
        if dtype == torch.float16 and self.low_precision == "stochastic":
            raise ValueError(
                f"low_precision='stochastic' rounds to bfloat16, and parameter {route.name!r} is "
                "float16; choose 'master' or 'nearest'"
            )

    def _completed(self, param_group: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(param_group, dict) or "params" not in param_group:
            raise TypeError(f"param_group={param_group!r} must be a dictionary with 'params'")
        group = dict(param_group)
        if isinstance(group["params"], Tensor):
            group["params"] = [group["params"]]
        elif isinstance(group["params"], set):
            raise TypeError("params must have an order that is the same in every run; pass a list")
        else:
            group["params"] = list(group["params"])
        group.setdefault("rule", self.rule)
        if group["rule"] not in (self.rule, FALLBACK):
            for key, value in rule_class(group["rule"]).default_settings().items():
                group.setdefault(key, value)
        for key, value in self.defaults.items():
            group.setdefault(key, value)
        check_real("lr", group["lr"])
        check_group(group)
        group.setdefault("base_lr", float(group["lr"]))
        return group

    def _route(self, model: nn.Module, head: Head) -> list[Route]:
        return route_model(model, self.rule, head=head, exclude=self._exclude)

    def _routes_of(self, group: dict[str, Any]) -> list[Route]:
        named = [p if isinstance(p, tuple) else (None, p) for p in group["params"]]
        known = [self._routes[p] for _, p in named if isinstance(p, Tensor) and p in self._routes]
        if len(known) == len(named):
            return known
        if self._exclude and any(name is None for name, _ in named):
            raise ValueError(
                f"exclude={self._exclude!r} needs names; pass the model or model.named_parameters()"
            )
        start = len(self._routes)
        routes = route_tensors(
            ((name or f"param_{start + i}", p) for i, (name, p) in enumerate(named)), group["rule"]
        )
        # A pattern may be meant for another group; __init__ checks that each one matches somewhere.
        return excluded(routes, self._exclude, every=False)

    # ---------------------------------------------------------------- recipes

    @classmethod
    @abstractmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a parameter group's settings make; raises on a bad setting."""

    @classmethod
    def default_settings(cls) -> dict[str, Any]:
        """Return the defaults of the rule's own settings, from its constructor's signature."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    def _recipe(self, group: Mapping[str, Any]) -> Recipe:
        """Return the group's recipe, made anew only when a setting has changed."""
        maker = self._maker(group["rule"])
        names = self.defaults if maker is type(self) else _setting_names(group["rule"])
        values = [group.get(name) for name in names if name != "lr"]
        key = (maker, *(tuple(v) if isinstance(v, list) else v for v in values))
        try:
            made = self._recipes.get(key)
        except TypeError:
            made = None
        if made is None:
            made = self.checked_recipe(group)
            if len(self._recipes) > 64:
                self._recipes.clear()
            self._recipes[key] = made
        return made

    def checked_recipe(self, group: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a group's settings make; raises as the constructor would."""
        maker: Any = self._maker(group["rule"])
        defaults, optional = _setting_kinds(maker)
        check_kinds(defaults, group, optional)
        recipe: Recipe = maker.recipe(group)
        return recipe

    def _maker(self, rule: str) -> type[GroupedParameters]:
        if rule == self.rule:
            return type(self)
        maker = rule_class(rule)
        if maker.needs_modules:
            raise ValueError(
                f"rule={rule!r} reads what modules compute, which a parameter group does not show; "
                f"use neurms.{maker.__name__}(model)"
            )
        return maker


@functools.cache
def _setting_names(rule: str) -> tuple[str, ...]:
    return (*rule_class(rule).default_settings(), "weight_decay")


@functools.cache
def _setting_kinds(
    maker: type[GroupedParameters],
) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the defaults of a rule's own settings, and the names of those that may be None."""
    parameters = inspect.signature(maker.__init__).parameters.values()
    optional = frozenset(p.name for p in parameters if "None" in str(p.annotation))
    return maker.default_settings(), optional
