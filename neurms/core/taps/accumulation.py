"""Questions to autograd that decide whether a statistic counts."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import Parameter

__all__ = ["OUTSIDE_BACKWARD", "destination", "graph_task", "is_ordinary"]

OUTSIDE_BACKWARD = -1


def graph_task() -> int:
    """Return the number of the backward pass that runs in this thread, -1 outside of one."""
    return int(torch._C._current_graph_task_id())


def destination(weight: Tensor, accumulator: Any = None) -> Literal["grad", "captured", "nowhere"]:
    """Return where the running backward pass puts the gradient of ``weight``.

    Args:
        weight: A leaf that the graph multiplies with.
        accumulator: The node that accumulates its gradient, where it is at hand; it is only
            believed where it says yes.

    Returns:
        ``"grad"`` if it is added to ``weight.grad``; ``"captured"`` if ``torch.autograd.grad``
        hands it to its caller; ``"nowhere"`` if the pass leaves the weight out
        (``torch.autograd.grad`` with respect to something else, as adversarial examples and
        gradient penalties do, ``backward(inputs=...)``, a weight frozen since). Outside of
        autograd's engine, where compiled autograd runs hooks, nobody can tell and the answer is
        ``"grad"``.
    """
    if not weight.requires_grad:
        return "nowhere"
    try:
        # A node that is no longer the weight's own is executed by no pass that matters.
        if accumulator is not None and torch._C._will_engine_execute_node(accumulator):
            return "grad"
    except RuntimeError:
        # Captured, or no backward pass runs: asked below.
        pass
    if graph_task() == OUTSIDE_BACKWARD:
        return "grad"
    try:
        executed = torch._C._will_engine_execute_node(get_gradient_edge(weight).node)
    except RuntimeError:
        # The engine's answer for a leaf whose gradient is captured.
        return "captured"
    return "grad" if executed else "nowhere"


def is_ordinary(tensor: Any) -> bool:
    """Return whether ``tensor`` holds numbers: not meta, fake, traced or wrapped by torch.func."""
    # Neither a call nor a question about fake tensors for what is of torch's own classes.
    known = type(tensor) is Tensor or type(tensor) is Parameter
    return (
        (known or (isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor)))
        and not tensor.is_meta
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and torch._C._get_tracing_state() is None
    )
