"""One step that is looked at: its stopwatch, whom spans are charged to, the optimizers' steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from neurms.callbacks.profiler.clock import Clock, Shares, Stopwatch
from neurms.callbacks.profiler.optimizer_view import OptimizerView
from neurms.core.ground.spans import SpanKind

__all__ = ["OPTIMIZER", "Window", "shared_out"]

OPTIMIZER = ("optimizer",)
"""Whom our own optimizers' steps are charged to, as far as they belong to no layer."""


class Window:
    """Times one step; the observer that core tells of its spans meanwhile.

    Args:
        device: Where the model computes.
        view: The optimizers.
        owners: Layer names by parameter.
        on_gradients: Called before an optimizer changes anything.
    """

    def __init__(
        self,
        device: torch.device,
        view: OptimizerView,
        owners: Mapping[Tensor, str],
        on_gradients: Callable[[], None],
    ) -> None:
        self.stopwatch = Stopwatch(Clock(device))
        self._view = view
        self._owners = owners
        self._on_gradients = on_gradients
        self._open: Any = None

    # ---------------------------------------------------------------- what core tells

    def span(
        self, kind: SpanKind, parameters: Sequence[Tensor] | None
    ) -> AbstractContextManager[None]:
        """Time a piece of an optimizer's work (an ``Observer`` of spans)."""
        inner = parameters is None
        shares = self.stopwatch.innermost if inner else shared_out(parameters or (), self._owners)
        label = next(iter(shares), None)
        return self.stopwatch.span(kind, shares, label if isinstance(label, str) else "")

    def gradients_ready(self) -> None:
        """Pass on that gradients are complete and nothing has scaled them yet."""
        self._on_gradients()

    # ---------------------------------------------------------------- the optimizers' steps

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Open the step's span; with a closure, everything happens inside the step."""
        positional = len(args) > 1 and callable(args[1])
        closure = args[1] if positional else kwargs.get("closure")
        if closure is None:
            self._on_gradients()
        self._open = self.stopwatch.begin("step", self._step_shares(optimizer))
        if closure is None:
            return None

        def timed(*values: Any, **named: Any) -> Any:
            with self.stopwatch.span("closure", {None: 1.0}):
                result = closure(*values, **named)
            self._on_gradients()
            return result

        if positional:
            return (args[0], timed, *args[2:]), kwargs
        return args, {**kwargs, "closure": timed}

    def after_step(self) -> None:
        """Close the step's span."""
        self.stopwatch.end(self._open)

    def _step_shares(self, optimizer: Optimizer) -> Shares:
        """Return whom a foreign optimizer's step is charged to; our own tell by themselves."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if parameters and self._view.is_ours(parameters[0]):
            return {OPTIMIZER: 1.0}
        return shared_out([p for p in parameters if p.grad is not None] or parameters, self._owners)


def shared_out(parameters: Sequence[Tensor], owners: Mapping[Tensor, str]) -> Shares:
    """Return the parts of a piece of work on ``parameters`` by layer, None for those of no layer.

    Args:
        parameters: What was worked on; a part is a share of the number of elements.
        owners: Layer names by parameter.
    """
    total = sum(p.numel() for p in parameters) or 1
    shares: dict[Any, float] = {}
    for parameter in parameters:
        name = owners.get(parameter)
        shares[name] = shares.get(name, 0.0) + parameter.numel() / total
    return shares
