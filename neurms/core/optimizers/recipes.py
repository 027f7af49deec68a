"""The recipes that parameter groups make of their settings."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Protocol

from neurms.core.ground.errors import check_kinds
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.rules import rule_class

__all__ = ["MakesRecipes", "Recipes", "default_settings"]


class MakesRecipes(Protocol):
    """A class whose settings make a recipe: every optimizer of the library."""

    rule: ClassVar[str]
    needs_modules: ClassVar[bool]

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a parameter group's settings make; raises on a bad setting."""


class Recipes:
    """Makes each group's recipe once, and anew only when a setting of it has changed.

    Args:
        maker: The optimizer's class, which makes the recipes of its own rule.
        by_rows: Whether ranks may work on the rows of a sharded matrix that they hold.
    """

    def __init__(self, maker: type[MakesRecipes], *, by_rows: bool = True) -> None:
        self._maker = maker
        self._by_rows = by_rows
        self._made: dict[Any, Recipe] = {}
        self._last: tuple[Any, Any, Any, Any] = (None, None, None, None)

    def of(self, group: Mapping[str, Any]) -> Recipe:
        """Return the recipe of a parameter group under a rule."""
        # Asked again and again of one group: by each layer whose backward writes its update.
        last, params, settings, recipe = self._last
        own = group["params"] if "params" in group else None
        # Lists of other parameters are not compared: a tensor's == is no truth value.
        if last is group and own is params and settings == group:
            known: Recipe = recipe
            return known
        known = self._found(group)
        self._last = group, own, dict(group), known
        return known

    def _found(self, group: Mapping[str, Any]) -> Recipe:
        maker = self.maker(group["rule"])
        try:
            key = (maker, *_settings_getter(maker)(group))
            made = self._made.get(key)
        except (KeyError, TypeError):
            # One that is not there, or a list.
            values = [group.get(name) for name in _setting_names(maker)]
            key = (maker, *[tuple(v) if isinstance(v, list) else v for v in values])
            made = _known(self._made, key)
        if made is None:
            made = self.checked(group)
            if len(self._made) > 64:
                self._made.clear()
            self._made[key] = made
        return made

    def checked(self, group: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a group's settings make; raises as the constructor would."""
        maker = self.maker(group["rule"])
        defaults, optional = _setting_kinds(maker)
        check_kinds(defaults, group, optional)
        recipe = maker.recipe(group)
        return recipe if self._by_rows or maker.needs_modules else replace(recipe, by_rows=False)

    def settings_of(self, rule: str) -> dict[str, Any]:
        """Return the defaults of a rule's own settings."""
        return default_settings(self.maker(rule))

    def maker(self, rule: str) -> type[MakesRecipes]:
        """Return the class that makes a rule's recipes.

        Raises:
            ValueError: The rule is not known, or needs modules, which a group does not show.
        """
        if rule == self._maker.rule:
            return self._maker
        maker: type[MakesRecipes] = rule_class(rule)
        if maker.needs_modules:
            raise ValueError(
                f"rule={rule!r} reads what modules compute, which a parameter group does not show; "
                f"use neurms.{maker.__name__}(model)"
            )
        return maker


def default_settings(maker: Callable[..., Any]) -> dict[str, Any]:
    """Return the defaults of a rule's own settings, from its constructor's signature."""
    return _defaults(maker)


@functools.cache
def _defaults(maker: Any) -> dict[str, Any]:
    parameters = inspect.signature(maker).parameters.values()
    return {p.name: _default(p) for p in parameters if p.default is not p.empty}


def _default(parameter: inspect.Parameter) -> Any:
    """Return a default, as a float where torch's habit of writing ``momentum: float = 0`` is."""
    value = parameter.default
    return float(value) if type(value) is int and "float" in str(parameter.annotation) else value


@functools.cache
def _setting_names(maker: Any) -> tuple[str, ...]:
    # A schedule changes lr at every step, and no recipe depends on it.
    return (*[name for name in default_settings(maker) if name != "lr"], "weight_decay")


@functools.cache
def _settings_getter(maker: Any) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
    # In one call: a step asks for the recipe of every group.
    return operator.itemgetter(*_setting_names(maker))


def _known(made: Mapping[Any, Recipe], key: Any) -> Recipe | None:
    try:
        return made.get(key)
    except TypeError:
        return None


@functools.cache
def _setting_kinds(maker: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the defaults of a rule's own settings, and the names of those that may be None."""
    parameters = inspect.signature(maker).parameters.values()
    optional = frozenset(p.name for p in parameters if "None" in str(p.annotation))
    return default_settings(maker), optional
