"""Functions of the user's that a command line names: ``module:function``."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from neurms.cli.errors import UsageError
from neurms.core.ground.errors import meant

__all__ = ["called", "model_from"]


def called(reference: str, what: str = "model") -> Any:
    """Import ``module:function`` and return what the function makes, or an object that is there.

    Args:
        reference: ``module:function``; the current folder is searched too.
        what: What it is to make, for messages.

    Raises:
        UsageError: There is no such function, or it needs arguments. What the function itself
            raises is let through: it is its author's to see in full.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise UsageError(
            f"{reference!r} does not say where the {what} is; write module:function, such as "
            "my_package.models:build"
        )
    module = _imported(module_name, attribute)
    found = getattr(module, attribute, None)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        near = meant(attribute, [name for name, value in vars(module).items() if callable(value)])
        raise UsageError(
            f"{module_name} has no function {attribute!r}{near}; write {module_name}:FUNCTION with "
            "one that it has"
        )
    if needed := _needed(found):
        raise UsageError(
            f"{reference} needs {', '.join(needed)}, and nothing can be passed on a command line; "
            f"write a function without arguments, such as def build(): return {attribute}(...)"
        )
    return found()


def model_from(reference: str) -> nn.Module:
    """Import ``module:function`` and return the model that the function makes.

    Raises:
        UsageError: There is no such function, or it makes no model.
    """
    model = called(reference)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{reference} returned {type(model).__name__}; it must return an nn.Module"
        )
    return model


def _imported(name: str, attribute: str) -> ModuleType:
    # As python -m does: the user's code lies where the command is typed.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if name.endswith(".py") or "/" in name:
        dotted = name.removesuffix(".py").strip("./").replace("/", ".")
        raise UsageError(f"{name!r} is a file, not a module; write {dotted}:{attribute}")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # An import that fails inside the user's module is theirs to see in full.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        files = [path.stem for path in Path.cwd().glob("*.py")]
        raise UsageError(
            f"module {name!r} was not found{meant(name, files)}; run the command where it can be "
            "imported"
        ) from None


def _needed(function: Any) -> list[str]:
    """Return the names of the arguments without which a function cannot be called."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in loose]
