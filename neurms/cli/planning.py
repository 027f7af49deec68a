"""``neurms plan``: which rule each parameter of somebody's model would get."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from torch import nn

from neurms.cli.errors import UsageError
from neurms.core.ground.errors import meant
from neurms.core.optimizers.base import PreconditionedOptimizer
from neurms.core.optimizers.plan import Plan
from neurms.core.optimizers.registry import available, create

__all__ = ["as_json", "model_from", "plan_of"]


def plan_of(reference: str, optimizer: str) -> Plan:
    """Return an optimizer's plan for a model.

    Args:
        reference: ``module:function``.
        optimizer: A name of this library's own rules.

    Raises:
        UsageError: There is no such function, it returns no model, or the optimizer has no plan.
    """
    if optimizer not in available():
        near = meant(optimizer, available())
        raise UsageError(f"--optimizer {optimizer} is not known{near}; choose one of {available()}")
    made = create(optimizer, model_from(reference), lr=1e-3)
    if not isinstance(made, PreconditionedOptimizer):
        raise UsageError(
            f"--optimizer {optimizer} is torch's own, which treats every parameter alike: no plan; "
            "choose a rule of this library, such as neurms or racs"
        )
    return made.plan()


def as_json(plan: Plan) -> str:
    """Return a plan for machines: its rows, and the total of their bytes."""
    rows = [asdict(row) for row in plan]
    return json.dumps({"parameters": rows, "state_bytes": plan.state_bytes}, indent=1)


def model_from(reference: str) -> nn.Module:
    """Import ``module:function`` and return the model that the function makes."""
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise UsageError(
            f"{reference!r} does not say where the model is; write module:function, such as "
            "my_package.models:build"
        )
    # As python -m does: the user's code lies where the command is typed.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # An import that fails inside the user's module is theirs to see in full.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UsageError(
            f"module {module_name!r} was not found; run the command where it can be imported"
        ) from None
    found = getattr(module, attribute, None)
    if not callable(found):
        raise UsageError(f"{module_name} has no function {attribute!r}")
    model = found if isinstance(found, nn.Module) else found()
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{reference} returned {type(model).__name__}; it must return an nn.Module"
        )
    return model
