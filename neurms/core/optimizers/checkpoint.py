"""Exact checkpoints: verify before anything changes, match by name, restore bit for bit."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from neurms.core.ground.errors import CheckpointError, check_real
from neurms.core.ground.shards import is_sharded, placed_like
from neurms.core.optimizers.plan import meta_like
from neurms.core.optimizers.recipe import Recipe
from neurms.core.optimizers.settings import check_group
from neurms.core.optimizers.sharing import Sharing
from neurms.core.routing import FALLBACK, Route

__all__ = ["check_entries", "restore", "verified"]

Group = dict[str, Any]

_LATER: Group = {
    "maximize": False,
    "fit": "power",
    "probes": 4,
    "seed": 0,
    "normalize": None,
    "switching": "complement",
    "residual": "optimal",
    "oversampling": 0,
    "iterations": 1,
    "norm_iterations": 8,
    "precision": "float32",
    "moments": "gradient",
    "damping": None,
}
"""Settings that checkpoints of earlier releases do not have, and what held then."""

_LATER_OF: dict[str, Group] = {"neurms": {"nesterov": False}}
"""The same of one rule, where others have always had a setting of that name."""


class HasState(Protocol):
    """What a checkpoint is of: an optimizer."""

    defaults: dict[str, Any]
    routes: dict[Tensor, Route]
    param_groups: list[Group]
    sharing: Sharing
    state: Any

    def checked_recipe(self, group: Group) -> Recipe:
        """Return the recipe that a group's settings make, or raise."""

    def expected_state(
        self, like: Tensor, parameter: Tensor, group: Group, saved: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return state with the keys and shapes that a parameter must have."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take groups and state over."""


def verified(optimizer: HasState, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return ``state_dict`` with groups and parameters in the optimizer's order.

    Raises:
        CheckpointError: It is no optimizer state, or belongs to another optimizer or model.
    """
    _check_form(state_dict)
    aligned = _completed(optimizer, _aligned(optimizer.param_groups, state_dict))
    _check_state(optimizer, aligned)
    return aligned


def restore(optimizer: HasState, state_dict: dict[str, Any]) -> None:
    """Take a verified state dict over: every tensor in its saved dtype, sharded as parameters are.

    ``torch.optim.Optimizer.load_state_dict`` casts state to the parameter's dtype, which would
    round float32 statistics of bfloat16 parameters.
    """
    groups, states = [], defaultdict[Tensor, dict[str, Any]](dict)
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        settings = copy.deepcopy({k: v for k, v in saved.items() if k != "params"})
        groups.append({**settings, "params": group["params"]})
        for key, parameter in zip(saved["params"], group["params"], strict=True):
            if state := state_dict["state"].get(key, {}):
                states[parameter] = _own(optimizer, parameter, groups[-1], state)
    optimizer.__setstate__({"state": states, "param_groups": groups})


def _own(
    optimizer: HasState, parameter: Tensor, group: Group, state: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a parameter's saved state on its device, in memory of its own."""
    expected: Mapping[str, Any] = {}
    if any(map(is_sharded, (parameter, *state.values()))):
        expected = optimizer.expected_state(meta_like(parameter), parameter, group, state)
    placed = {
        name: placed_like(value.detach(), expected.get(name))
        if isinstance(value, Tensor)
        else copy.deepcopy(value)
        for name, value in state.items()
    }
    return {
        name: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
        for name, value in optimizer.sharing.kept(parameter, placed).items()
    }


def _check_form(state_dict: Any) -> None:
    """Raise unless the nesting is that of ``Optimizer.state_dict``."""
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise CheckpointError(
            "state_dict must hold 'state' and 'param_groups'; pass what optimizer.state_dict() "
            "returned"
        )
    groups, state = state_dict["param_groups"], state_dict["state"]
    whole = (
        isinstance(groups, (list, tuple))
        and isinstance(state, dict)
        and all(isinstance(g, dict) and _is_listed(g.get("params"), (int, str)) for g in groups)
        and all(isinstance(own, dict) for own in state.values())
        and all(_is_listed(g["param_names"], (str,)) for g in groups if "param_names" in g)
        and all(len(g.get("param_names", g["params"])) == len(g["params"]) for g in groups)
    )
    if not whole:
        raise CheckpointError(
            "state_dict is damaged: 'param_groups' must be a list of groups with 'params', and "
            "'state' must hold a dictionary for each parameter"
        )
    if strays := sorted(state.keys() - {key for g in groups for key in g["params"]}, key=str):
        raise CheckpointError(
            f"state_dict holds state of {strays[:5]}, which no parameter group lists; it was "
            "cut or put together from several"
        )


def _is_listed(values: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(values, (list, tuple)) and all(type(value) in kinds for value in values)


def _aligned(groups: Sequence[Group], state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return ``state_dict`` with its groups rearranged to hold what ``groups`` hold, by name."""
    saved: Sequence[Group] = state_dict["param_groups"]
    if not (_has_names(groups) and _has_names(saved)):
        sizes, saved_sizes = ([len(g["params"]) for g in gs] for gs in (groups, saved))
        if sizes != saved_sizes:
            raise CheckpointError(
                f"the checkpoint has parameter groups of {saved_sizes} parameters, this optimizer "
                f"of {sizes}; build it from the same model, or pass named parameters to match "
                "by name"
            )
        return state_dict
    origin = {
        name: (key, group)
        for group in saved
        for name, key in zip(group["param_names"], group["params"], strict=True)
    }
    names = [name for group in groups for name in group["param_names"]]
    if set(names) != set(origin):
        odd = sorted(set(names) ^ set(origin))
        raise CheckpointError(
            f"the checkpoint belongs to another model: {odd[:5]} are only on one side; "
            "load it into an optimizer of the model that it was saved with"
        )
    aligned = []
    for group in groups:
        own = group["param_names"]
        sources = [_settings(origin[name][1]) for name in own] or [group]
        if any(source != sources[0] for source in sources):
            raise CheckpointError(
                f"the checkpoint has different settings for parameters that one group holds here "
                f"({own[:5]}); build the optimizer with the groups that were saved"
            )
        aligned.append(
            {**sources[0], "param_names": own, "params": [origin[name][0] for name in own]}
        )
    return {**state_dict, "param_groups": aligned}


def _completed(optimizer: HasState, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return ``state_dict`` with the settings that its release did not have yet."""
    own = zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    # A group under another rule than its optimizer's has settings of that rule.
    groups = [
        {**{k: v for k, v in _LATER.items() if k in now}, **_LATER_OF.get(now["rule"], {}), **saved}
        for now, saved in own
    ]
    return {**state_dict, "param_groups": groups}


def _has_names(groups: Sequence[Group]) -> bool:
    """Whether every parameter has a name of its own; those of two models may coincide."""
    if not all("param_names" in group for group in groups):
        return False
    names = [name for group in groups for name in group["param_names"]]
    return len(set(names)) == len(names)


def _settings(group: Group) -> Group:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _check_state(optimizer: HasState, state_dict: dict[str, Any]) -> None:
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        rule = saved.get("rule", group["rule"])
        if not isinstance(rule, str) or rule != group["rule"]:
            raise CheckpointError(
                f"the checkpoint was saved by {rule!r}, this group is {group['rule']!r}; "
                "load it into the optimizer that saved it"
            )
        # A scheduler adds keys of its own, on one side only; so does torch to the defaults, when it
        # loads.
        needed = optimizer.defaults.keys() - {"differentiable"} | {"base_lr"}
        if missing := sorted(needed - saved.keys(), key=str):
            raise CheckpointError(
                f"the checkpoint's parameter group lacks {missing}; it was not saved by "
                f"neurms.{type(optimizer).__name__}"
            )
        _check_settings(optimizer, saved)
        for key, parameter in zip(saved["params"], group["params"], strict=True):
            _check_parameter(optimizer, saved, parameter, state_dict["state"].get(key) or {})


def _check_settings(optimizer: HasState, group: Group) -> None:
    """Raise unless the settings would be accepted by the constructor."""
    try:
        check_real("lr", group["lr"])
        check_real("base_lr", group["base_lr"], strict=True)
        check_group(group)
        if group["rule"] != FALLBACK:
            optimizer.checked_recipe(group)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's settings make no optimizer: {error}") from error


def _check_parameter(
    optimizer: HasState,
    group: Group,
    parameter: Tensor,
    state: Mapping[str, Any],
) -> None:
    if not state:
        return
    name = optimizer.routes[parameter].name
    try:
        expected = optimizer.expected_state(meta_like(parameter), parameter, group, state)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's settings make no optimizer: {error}") from error
    check_entries(name, state, expected, parameter)


def check_entries(name: str, saved: Any, expected: Mapping[str, Any], parameter: Tensor) -> None:
    """Raise unless a parameter's saved state has the form that is expected, and is finite.

    Args:
        name: The parameter's name.
        saved: Its state in the checkpoint.
        expected: State with the keys, shapes, dtypes and types that it should have.
        parameter: The parameter.

    Raises:
        CheckpointError: It has another form, or was damaged.
    """
    if not isinstance(saved, Mapping):
        raise CheckpointError(
            f"the checkpoint's state of {name!r} is {_form(saved)}, no dictionary; load an earlier "
            "checkpoint"
        )
    if odd := sorted(set(expected) ^ set(saved), key=str):
        raise CheckpointError(
            f"the checkpoint's state of {name!r} differs in {odd}; it was saved with other "
            "settings or by another optimizer"
        )
    for key, value in expected.items():
        found, wanted = _form(saved[key]), _form(value)
        if found != wanted:
            raise CheckpointError(
                f"the checkpoint's {key!r} of {name!r} is {found}, expected {wanted}; it belongs "
                "to a model of other sizes or dtypes"
            )
        if problem := _damage(saved[key], parameter):
            raise CheckpointError(
                f"the checkpoint's {key!r} of {name!r} {problem}; load an earlier checkpoint"
            )


def _damage(value: Any, parameter: Tensor) -> str:
    """Return what is wrong with the contents of a saved value, "" if nothing is."""
    if not isinstance(value, Tensor):
        return f"is {value}, which no run has reached" if not 0 <= value < math.inf else ""
    if value.layout is not torch.strided:
        return f"has layout {value.layout}"
    if value.is_meta:
        return "" if parameter.is_meta else "holds no data (it is on the meta device)"
    if is_sharded(value) or not value.is_floating_point():
        return ""
    return "" if bool(torch.isfinite(value).all()) else "holds a NaN or an infinity"


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"of type {type(value).__name__}"
