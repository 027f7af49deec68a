"""What a gradient preconditioner accepts: settings, optimizers beside it, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from neurms.core.ground.errors import CheckpointError, meant
from neurms.core.ground.precision import compute_dtype
from neurms.core.ground.warn import warn_user
from neurms.core.optimizers.checkpoint import check_entries
from neurms.core.optimizers.settings import COMMON_DEFAULTS, check_common
from neurms.core.unitwise.gradient_rule import check_probed, gradient_recipe
from neurms.core.unitwise.neurms import NeuRMS
from neurms.core.unitwise.rule import UnitwiseRule, check_modes

__all__ = [
    "backward_problem",
    "checked_settings",
    "default_settings",
    "verified_state",
    "warn_of_long_steps",
]

_COMMON = ("weight_decay", "exclude", "head", "backend", "nonfinite", "process_group")


def default_settings() -> dict[str, Any]:
    """Return a preconditioner's settings with their defaults.

    They are NeuRMS's without ``lr`` and without what concerns its AdamW and the writing of weights:
    those are the business of the optimizer beside it.
    """
    common: Mapping[str, Any] = COMMON_DEFAULTS
    own = {name: value for name, value in NeuRMS.default_settings().items() if name != "lr"}
    return {**own, **{name: common[name] for name in _COMMON}}


def checked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings completed by their defaults.

    Raises:
        TypeError: A setting is unknown or of the wrong type.
        ValueError: A setting is out of its range.
    """
    defaults = default_settings()
    if unknown := sorted(settings.keys() - defaults.keys()):
        near = meant(unknown[0], defaults)
        raise TypeError(
            f"a NeuRMS preconditioner has no setting {unknown[0]!r}{near}; its settings are "
            f"{list(defaults)} (the learning rate and what embeddings or norms get belong to the "
            "optimizer beside it)"
        )
    chosen = {**defaults, **settings}
    UnitwiseRule.of(chosen)
    if chosen["variant"] == "P":
        gradient_recipe(chosen, defaults)
        check_probed(chosen, defaults, ("heads",))
        if chosen["update"] == "backward":
            raise ValueError(
                'update="backward" cannot go with variant="P" beside another optimizer, whose '
                'gradients it would scale; use variant="U", or neurms.NeuRMS(model, '
                'update="backward") as the optimizer itself'
            )
    modes = ("loss_reduction", "update", "gemm", "loss_scale", "agc")
    check_modes(**{name: chosen[name] for name in modes})
    check_common("a NeuRMS preconditioner", {name: chosen[name] for name in _COMMON})
    if isinstance(chosen["exclude"], str):
        raise TypeError(
            f"exclude={chosen['exclude']!r} must be a sequence of patterns; write "
            f"({chosen['exclude']!r},)"
        )
    return chosen


def backward_problem(holder: Optimizer | None, weight: Tensor, momentum: float) -> str:
    """Return why ``update="backward"`` cannot move a weight beside its optimizer, "" if it can.

    Args:
        holder: The optimizer that has the weight.
        weight: A linear layer's weight.
        momentum: The preconditioner's own momentum.
    """
    if holder is None:
        return "none of the optimizers given holds it"
    if weight.dtype != compute_dtype(weight):
        return f"it is {weight.dtype}, too coarse to add small updates to"
    if type(holder) is not torch.optim.SGD:
        return f"its optimizer is {type(holder).__name__}, and only plain SGD's rule is known here"
    group = next(g for g in holder.param_groups if any(p is weight for p in g["params"]))
    for name in ("nesterov", "dampening", "weight_decay", "maximize"):
        if group[name]:
            return f"its SGD has {name}={group[name]!r}"
    if momentum and group["momentum"]:
        return (
            f"its SGD (momentum={group['momentum']!r}) and the preconditioner "
            f"(momentum={momentum!r}) both keep a velocity"
        )
    return ""


LONG = 0.05
"""An lr on AdamW's scale that no training here or in the papers has wanted."""


def warn_of_long_steps(optimizers: Iterable[Optimizer], scaled: Collection[Tensor]) -> None:
    """Warn of an SGD whose lr is meant for gradients, where updates have an RMS of about 1.

    Args:
        optimizers: What moves the parameters.
        scaled: The parameters whose gradients variant P scales.
    """
    own = {id(parameter) for parameter in scaled}
    for optimizer in optimizers:
        if type(optimizer) is not torch.optim.SGD:
            continue
        for group in optimizer.param_groups:
            # A schedule may begin far below the rate that it is made from.
            lr, momentum = float(group.get("initial_lr", group["lr"])), group["momentum"]
            length = lr * (1 - group["dampening"]) / (1 - momentum) if momentum else lr
            if length > LONG and any(id(p) in own for p in group["params"]):
                warn_user(
                    f"SGD(lr={lr:g}, momentum={momentum:g}) would move every weight by about "
                    f'{length:g} in each step: variant="P" makes gradients of an RMS of 1, so that '
                    "lr is on AdamW's scale (1e-3 to 1e-2) and SGD's momentum lengthens steps; "
                    'lower lr, and give NeuRMS the momentum, or use variant="U", whose lr is '
                    "nearer to SGD's"
                )
                return


def verified_state(
    state_dict: Mapping[str, Any],
    parameters: Mapping[str, Tensor],
    variant: str,
    expected: Callable[[Tensor], Mapping[str, Any]],
) -> dict[Tensor, dict[str, Any]]:
    """Return a state dict's entries by parameter, on the parameters' devices.

    Args:
        state_dict: What ``GradientPreconditioner.state_dict`` returned.
        parameters: Parameters by name.
        variant: NeuRMS's variant; the same numbers mean something else in another.
        expected: Returns the state that a parameter should have, with its shapes.

    Raises:
        CheckpointError: It belongs to another model or to other settings.
    """
    keys = {"layers", "variant", "skipped_steps"}
    if not isinstance(state_dict, Mapping) or not keys <= state_dict.keys():
        raise CheckpointError("state_dict must be what GradientPreconditioner.state_dict returned")
    skipped = state_dict["skipped_steps"]
    if not isinstance(state_dict["layers"], Mapping) or type(skipped) is not int or skipped < 0:
        raise CheckpointError(
            "state_dict is damaged: 'layers' must hold the state of each parameter, and "
            "'skipped_steps' a count"
        )
    if not isinstance(state_dict["variant"], str) or state_dict["variant"] != variant:
        raise CheckpointError(
            f"the checkpoint was saved with variant={state_dict['variant']!r}, now it is "
            f"{variant!r}, whose statistics mean something else; resume with the variant saved"
        )
    loaded = {}
    for name, saved in state_dict["layers"].items():
        if not isinstance(name, str) or name not in parameters:
            raise CheckpointError(
                f"the checkpoint holds statistics of {name!r}, which is not tapped in this model; "
                "load it into the model, and with the exclude, that it was saved with"
            )
        parameter = parameters[name]
        check_entries(name, saved, expected(parameter), parameter)
        loaded[parameter] = {
            key: value.detach().to(parameter.device, copy=True)
            if isinstance(value, Tensor)
            else value
            for key, value in saved.items()
        }
    return loaded
