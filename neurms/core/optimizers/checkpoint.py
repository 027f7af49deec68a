"""Exact checkpoints: verify before anything changes, match by name, restore bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from neurms.core.errors import CheckpointError
from neurms.core.optimizers.plan import meta_like

if TYPE_CHECKING:
    from neurms.core.optimizers.base import PreconditionedOptimizer

__all__ = ["restore", "verified"]

Group = dict[str, Any]


def verified(optimizer: PreconditionedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return ``state_dict`` with groups and parameters in the optimizer's order.

    Raises:
        CheckpointError: It is no optimizer state, or belongs to another optimizer or model.
    """
    _check_form(state_dict)
    aligned = _aligned(optimizer.param_groups, state_dict)
    _check_state(optimizer, aligned)
    return aligned


def restore(optimizer: PreconditionedOptimizer, state_dict: dict[str, Any]) -> None:
    """Give every state tensor its saved dtype back.

    ``torch.optim.Optimizer.load_state_dict`` casts state to the parameter's dtype, which would
    round float32 statistics of bfloat16 parameters.
    """
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for key, parameter in zip(saved["params"], group["params"], strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    own = value.detach().to(parameter.device, copy=True)
                    optimizer.state[parameter][name] = own


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
        and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
        and all(isinstance(own, dict) for own in state.values())
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


def _has_names(groups: Sequence[Group]) -> bool:
    """Whether every parameter has a name of its own; those of two models may coincide."""
    if not all("param_names" in group for group in groups):
        return False
    names = [name for group in groups for name in group["param_names"]]
    return len(set(names)) == len(names)


def _settings(group: Group) -> Group:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _check_state(optimizer: PreconditionedOptimizer, state_dict: dict[str, Any]) -> None:
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        if saved.get("rule", group["rule"]) != group["rule"]:
            raise CheckpointError(
                f"the checkpoint was saved by {saved['rule']!r}, this group is {group['rule']!r}; "
                "load it into the optimizer that saved it"
            )
        # A scheduler adds keys of its own, on one side only.
        if missing := sorted((optimizer.defaults.keys() | {"base_lr"}) - saved.keys()):
            raise CheckpointError(
                f"the checkpoint's parameter group lacks {missing}; it was not saved by "
                f"neurms.{type(optimizer).__name__}"
            )
        for key, parameter in zip(saved["params"], group["params"], strict=True):
            _check_parameter(optimizer, saved, parameter, state_dict["state"].get(key) or {})


def _check_parameter(
    optimizer: PreconditionedOptimizer,
    group: Group,
    parameter: Tensor,
    state: Mapping[str, Any],
) -> None:
    if not state:
        return
    name = optimizer._routes[parameter].name
    try:
        expected = optimizer.expected_state(meta_like(parameter), parameter, group, state)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's settings make no optimizer: {error}") from error
    if odd := sorted(set(expected) ^ set(state)):
        raise CheckpointError(
            f"the checkpoint's state of {name!r} differs in {odd}; it was saved with other "
            "settings or by another optimizer"
        )
    for key, value in expected.items():
        found, wanted = _form(state[key]), _form(value)
        if found != wanted:
            raise CheckpointError(
                f"the checkpoint's {key!r} of {name!r} is {found}, expected {wanted}; it belongs "
                "to a model of other sizes or dtypes"
            )


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"of type {type(value).__name__}"
