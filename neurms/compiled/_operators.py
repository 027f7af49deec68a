"""Kernels as operators of ``torch.library``, which graphs of torch.compile can hold.

A traced call of a kernel that has a native form becomes ``torch.ops.neurms.NAME``; when the graph
runs, it does what a plain call does under ``backend="auto"``. Outside of graphs nothing goes
through the dispatcher, which costs more than a small kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["operator", "returns_tensors"]


def returns_tensors(definition: Callable[..., Any]) -> bool:
    """Return whether a graph can hold a kernel's result, as its annotation says."""
    return "Tensor" in str(inspect.signature(definition).return_annotation)


def operator(
    definition: Callable[..., Any],
    run: Callable[..., Any],
    mutates: tuple[str, ...],
    returns: str | None,
    name: str | None = None,
    schema: str | None = None,
) -> Callable[..., Any] | None:
    """Register a kernel and return the operator, called as the kernel is.

    Args:
        definition: The eager definition; it also says what comes out of which shapes.
        run: What the operator does.
        mutates: Names of the arguments that are written into.
        returns: Name of the argument that the kernel returns, None for a fresh result.
        name: The operator's, None for the definition's.
        schema: The operator's, None for what the definition's annotations say.

    Returns:
        None for what a graph cannot hold: a kernel whose result is no tensor.
    """
    if not returns_tensors(definition):
        return None
    schema = schema or torch.library.infer_schema(definition, mutates_args=mutates)
    if returns:  # which an operator may not do
        schema = schema.rpartition("->")[0] + "-> ()"

    def apply(*args: Any) -> Any:
        result = run(*args)
        return None if returns else result

    def shapes(*args: Any) -> Any:
        return None if returns else definition(*args)

    name = name or definition.__name__
    made = torch.library.custom_op(f"neurms::{name}", apply, mutates_args=mutates, schema=schema)
    made.register_fake(shapes)
    call = getattr(torch.ops.neurms, name).default
    if not returns:
        return call  # type: ignore[no-any-return]
    place = list(inspect.signature(definition).parameters).index(returns)

    def in_place(*args: Any) -> Any:
        call(*args)
        return args[place]

    return in_place
