"""What optimizers with ``update="backward"`` refuse, each in the same words."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from neurms.core.ground.errors import NonFiniteError, UnsupportedTrainingError

__all__ = [
    "UpdateMode",
    "check_model",
    "drop_outside_of_graphs",
    "is_asked_by_scaler",
    "refuse_copy",
    "refuse_scaler",
    "refuse_updated",
]

UpdateMode = Literal["step", "backward"]


def check_model(argument: str, given: Any, reader: str, otherwise: str) -> None:
    """Raise unless an optimizer that reads layers was given a model.

    Args:
        argument: The argument's name.
        given: Its value.
        reader: Who reads layers.
        otherwise: What can be done where nobody has the model.

    Raises:
        TypeError: It was not.
    """
    if isinstance(given, nn.Module):
        return
    raise TypeError(
        f"{argument}={type(given).__name__} must be an nn.Module: {reader} reads the error "
        "signals and inputs of layers, which parameters alone do not show; pass the model "
        f"itself, with parameter groups beside it as groups=[...], or{otherwise}"
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def drop_outside_of_graphs(optimizer: torch.optim.Optimizer, set_to_none: bool) -> None:
    """Have an optimizer drop gradients where a graph of torch.compile is being recorded.

    As torch's own does, outside of the graph: nothing in it is a tensor's operation. Only there:
    the wrapper takes thirty calls.
    """
    optimizer.zero_grad(set_to_none)


def is_asked_by_scaler() -> bool:
    """Return whether a GradScaler asks an optimizer's property, which calls this.

    ``_step_supports_amp_scaling`` is the one thing that torch.amp.GradScaler asks of an optimizer
    before its step; its unscaling writes gradients without autograd counting it, which a guard of
    gradients would miss. Lightning asks the same before it clips, with or without a scaler, and
    is told no.
    """
    asking: str = sys._getframe(2).f_globals.get("__name__", "")
    return asking.endswith("grad_scaler")


def refuse_scaler() -> NoReturn:
    """Raise because a GradScaler scales.

    Raises:
        UnsupportedTrainingError: Always.
    """
    raise UnsupportedTrainingError(
        "a GradScaler divides gradients by its scale, which cannot reach weights that "
        'update="backward" moved without a gradient; use update="step", or bfloat16 without a '
        "scaler"
    )


def refuse_updated(names: Sequence[str], updated: Sequence[str]) -> NoReturn:
    """Raise because a step is bad of which backward has taken a part.

    Args:
        names: What is NaN or infinite.
        updated: The layers that backward had updated.

    Raises:
        NonFiniteError: Always.
    """
    raise NonFiniteError(
        f"the gradient of {', '.join(map(repr, names[:5]))} is NaN or infinite and was not "
        'applied, but update="backward" had already updated in this pass: '
        f'{", ".join(updated)}. Lower lr, or use update="step", which checks everything '
        "before it changes anything"
    )


def refuse_copy(name: str) -> NoReturn:
    """Raise because taps would be on no model.

    Args:
        name: The optimizer's class.

    Raises:
        TypeError: Always.
    """
    raise TypeError(
        f"{name} cannot be copied or pickled: it is tied to its model by taps. Save "
        f"optimizer.state_dict(), build {name} on the copied model, and load it there"
    )
