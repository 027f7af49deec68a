"""Parameter groups beside a model: per-layer settings, where the model still routes."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from torch import Tensor, nn

from neurms.core.ground.errors import MissingParametersError, meant
from neurms.core.ground.wrappers import unwrapped
from neurms.core.optimizers.recipes import default_settings
from neurms.core.optimizers.rules import rule_class
from neurms.core.optimizers.settings import COMMON_DEFAULTS, GROUP_SETTINGS
from neurms.core.routing import ASKED, FALLBACK, Route, RoutedModel, route_model

__all__ = ["ModelGroups"]

Group = dict[str, Any]
Named = list[tuple[str, Tensor]]

_LIKE = 0.85
"""Likeness from which an unknown key is a misspelt setting, not a note of the user's."""


@dataclass(frozen=True)
class ModelGroups:
    """What is known of the groups beside a model.

    Args:
        model: The model.
        groups: As the user wrote them, each ``"params"`` a list of (name, parameter).
    """

    model: nn.Module
    groups: Sequence[Group]

    @classmethod
    def of(
        cls, model: nn.Module, groups: Any, known: Iterable[str] = (), rule: type[Any] | None = None
    ) -> Self:
        """Check groups against their model.

        Args:
            model: The model.
            groups: Dictionaries with ``"params"``, or None for none.
            known: Names of the settings that a group may have.
            rule: The optimizer's class; None, for torch's own, leaves settings to torch.

        Raises:
            TypeError: They are no dictionaries, a parameter is no tensor, or a setting is unknown
                or belongs to the optimizer as a whole.
            ValueError: A parameter is not the model's, or is in two groups.
        """
        if groups is None:
            return cls(model, ())
        loose = isinstance(groups, (Mapping, str, Tensor, nn.Module))
        if loose or not isinstance(groups, Iterable):
            raise TypeError(
                f"groups={type(groups).__name__} must be a list of dictionaries, such as "
                '[{"params": model.head.parameters(), "lr": 1e-3}]'
            )
        if isinstance(model, RoutedModel):
            raise TypeError("groups= goes with a torch model; leave it out for a routed one")
        names = {id(p): name for name, p in unwrapped(model).named_parameters()}
        seen: dict[int, int] = {}
        made = []
        for position, group in enumerate(groups):
            _check_form(group, position)
            own = {**group, "params": _named(group["params"], position, names, seen)}
            if rule is not None:
                _check_settings(group, position, tuple(known), rule)
                own = _with_decay(own)
            made.append(own)
        return cls(model, made)

    def apart(self, rule: str) -> tuple[str, ...]:
        """Return patterns of the parameters that groups give to another rule than ``rule``."""
        foreign = [group for group in self.groups if group.get("rule", rule) != rule]
        return tuple(glob.escape(name) for group in foreign for name, _ in group["params"])

    def routed(self, routes: Iterable[Route], rule: str) -> list[Route]:
        """Return routes as the groups' own rules have them."""
        asked = {
            id(p): group["rule"]
            for group in self.groups
            for _, p in group["params"]
            if group.get("rule", rule) != rule
        }
        others = {name: self._by(name) for name in {*asked.values()} - {FALLBACK}}
        found = []
        for route in routes:
            other = asked.get(id(route.parameter))
            if other == FALLBACK:
                route = replace(route, rule=FALLBACK, reason=ASKED)
            elif other is not None:
                route = others[other][id(route.parameter)]
            found.append(route)
        return found

    def _by(self, rule: str) -> dict[int, Route]:
        rule_class(rule)
        # Who names the head in a group of a rule wants it there.
        return {id(r.parameter): r for r in route_model(self.model, rule, head="rule")}

    def filled(self, routes: Iterable[Route]) -> list[Group] | Named:
        """Return the groups, and behind them one with all parameters that are in none."""
        taken = {id(p) for group in self.groups for _, p in group["params"]}
        rest = [(r.name, r.parameter) for r in routes if id(r.parameter) not in taken]
        if not self.groups:
            return rest
        return [*self.groups, {"params": rest}] if rest else list(self.groups)

    def on(self, other: nn.Module) -> list[Group]:
        """Return the groups for another model of the same names, such as a copy."""
        stand_ins = dict(unwrapped(other).named_parameters())
        return [
            {**group, "params": [(name, stand_ins[name]) for name, _ in group["params"]]}
            for group in self.groups
        ]


def _check_form(group: Any, position: int) -> None:
    if not isinstance(group, dict):
        raise TypeError(
            f"groups[{position}]={type(group).__name__} must be a dictionary with 'params'"
        )
    if "params" not in group:
        raise MissingParametersError(
            f"groups[{position}] has no 'params' (its keys are {sorted(group)}); write "
            '{"params": model.head.parameters(), ...}'
        )


def _check_settings(
    group: Mapping[str, Any], position: int, known: Sequence[str], rule: type[Any]
) -> None:
    """Raise for a setting that no group can have, and for one that is misspelt.

    Other keys are the user's own notes, as in torch.

    Raises:
        TypeError: There is one.
    """
    asked = group.get("rule", FALLBACK)
    own = {*known, *(default_settings(rule_class(asked)) if asked != FALLBACK else ())}
    whole = ({*COMMON_DEFAULTS, *default_settings(rule)} - {*known, *GROUP_SETTINGS}) | {"update"}
    for key in group:
        if key in whole:
            raise TypeError(
                f"groups[{position}] sets {key!r}, which holds for the whole optimizer; pass it to "
                "the constructor"
            )
        near = " (write lr)" if key == "learning_rate" else meant(key, own, _LIKE)
        if near and key not in {*own, "params", "param_names", "base_lr"}:
            raise TypeError(
                f"groups[{position}] has no setting {key!r}{near}; a group's settings are "
                f"{sorted(own)}"
            )


def _named(params: Any, position: int, names: Mapping[int, str], seen: dict[int, int]) -> Named:
    """Return a group's parameters with their names in the model."""
    if isinstance(params, nn.Module):
        params = params.parameters()
    if isinstance(params, set):
        raise TypeError(
            f"groups[{position}]['params'] must have an order that is the same in every run; pass "
            "a list"
        )
    found = []
    for item in [params] if isinstance(params, Tensor) else list(params):
        parameter = item[1] if isinstance(item, tuple) and len(item) == 2 else item
        if not isinstance(parameter, Tensor):
            raise TypeError(
                f"groups[{position}]['params'] holds a {type(parameter).__name__}; pass parameters "
                "of the model, such as model.head.parameters()"
            )
        name = names.get(id(parameter))
        if name is None:
            raise ValueError(
                f"groups[{position}]['params'] holds a tensor of shape {tuple(parameter.shape)} "
                "that is no parameter of the model; take it from the model that you pass"
            )
        if id(parameter) in seen:
            raise ValueError(
                f"parameter {name!r} is in groups[{seen[id(parameter)]}] and groups[{position}]; "
                "leave it in one of them"
            )
        seen[id(parameter)] = position
        found.append((name, parameter))
    return found


def _with_decay(group: Group) -> Group:
    """Have a group's weight decay hold for what AdamW takes of it, as in torch's own groups."""
    if "weight_decay" in group:
        group.setdefault("fallback_weight_decay", group["weight_decay"])
    return group
