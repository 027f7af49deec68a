"""Exact checkpoints: verify before anything changes, match by name, restore bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from neurms.core.errors import CheckpointError
from neurms.core.optimizers.plan import meta_like

if TYPE_CHECKING:
    from neurms.core.optimizers.base import PreconditionedOptimizer

__all__ = ["restore", "verified"]


def verified(optimizer: PreconditionedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return ``state_dict`` with groups and parameters in the optimizer's order.

    Raises:
        CheckpointError: It is no optimizer state, or belongs to another optimizer or model.
    """
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise CheckpointError(
            "state_dict must hold 'state' and 'param_groups'; pass what optimizer.state_dict() returned"
        )
    aligned = _aligned(optimizer, state_dict)
    _check_state(optimizer, aligned)
    return aligned


def restore(optimizer: PreconditionedOptimizer, state_dict: dict[str, Any]) -> None:
    """Give every state tensor its saved dtype back.

    ``torch.optim.Optimizer.load_state_dict`` casts state to the parameter's dtype, which would round
    float32 statistics of bfloat16 parameters.
    """
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for key, parameter in zip(saved["params"], group["params"], strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    own = value.detach().to(parameter.device, copy=True)
                    optimizer.state[parameter][name] = own


def _aligned(optimizer: PreconditionedOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    groups, saved = optimizer.param_groups, state_dict["param_groups"]
    if not all("param_names" in group for group in [*groups, *saved]):
        sizes, saved_sizes = ([len(g["params"]) for g in gs] for gs in (groups, saved))
        if sizes != saved_sizes:
            raise CheckpointError(
                f"the checkpoint has parameter groups of {saved_sizes} parameters, this optimizer of "
                f"{sizes}; build it from the same model, or pass named parameters to match by name"
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
        source = origin[own[0]][1] if own else group
        aligned.append({**source, "param_names": own, "params": [origin[name][0] for name in own]})
    return {**state_dict, "param_groups": aligned}


def _check_state(optimizer: PreconditionedOptimizer, state_dict: dict[str, Any]) -> None:
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        if saved.get("rule", group["rule"]) != group["rule"]:
            raise CheckpointError(
                f"the checkpoint was saved by {saved['rule']!r}, this group is {group['rule']!r}; "
                "load it into the optimizer that saved it"
            )
        if missing := sorted(group.keys() - saved.keys()):
            raise CheckpointError(
                f"the checkpoint's parameter group lacks {missing}; it was not saved by "
                f"neurms.{type(optimizer).__name__}"
            )
        for key, parameter in zip(saved["params"], group["params"], strict=True):
            _check_parameter(optimizer, saved, parameter, state_dict["state"].get(key) or {})


def _check_parameter(
    optimizer: PreconditionedOptimizer, group: dict[str, Any], parameter: Tensor, state: dict[str, Any]
) -> None:
    if not state:
        return
    name = optimizer._routes[parameter].name
    expected = optimizer.expected_state(meta_like(parameter), parameter, group, state)
    if odd := sorted(set(expected) ^ set(state)):
        raise CheckpointError(
            f"the checkpoint's state of {name!r} differs in {odd}; it was saved with other settings "
            "or by another optimizer"
        )
    for key, value in expected.items():
        shapes = tuple(getattr(state[key], "shape", ())), tuple(getattr(value, "shape", ()))
        if isinstance(value, Tensor) and shapes[0] != shapes[1]:
            raise CheckpointError(
                f"the checkpoint's {key!r} of {name!r} has shape {shapes[0]}, expected {shapes[1]}; "
                "it belongs to a model of other sizes"
            )
