"""Forward and backward times of one layer, from hooks that change nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neurms.callbacks.profiler.clock import Stopwatch

__all__ = ["LayerTimer"]


class LayerTimer:
    """Spans around a module's forward and around the nodes that its forward put on the graph.

    A layer's backward is the autograd nodes recorded by its own forward: products for the input's
    and the weight's gradient, casts, views. They are found by autograd's sequence number, so that
    what hangs below the layer's input is not counted.

    Args:
        name: The layer's name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.stopwatch: Stopwatch | None = None
        self.batch = 0
        self._handles: list[Any] = []
        self._span: Any = None
        self._sequence = 0

    def attach(self, module: nn.Module) -> None:
        """Put the hooks around the module's forward: last before it, first after it."""
        if not self._handles:
            self._handles = [
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, prepend=True, always_call=True),
            ]

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.stopwatch is None or not torch.is_grad_enabled():
            return
        inputs = args[0] if args else kwargs.get("input")
        if isinstance(inputs, Tensor) and inputs.ndim:
            self.batch += inputs.shape[0]
        self._sequence = int(torch._C._autograd._get_sequence_nr())
        self._span = self.stopwatch.begin("forward", {self.name: 1.0}, self.name)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        span, self._span = self._span, None
        if self.stopwatch is None or span is None:
            return
        self.stopwatch.end(span)
        if isinstance(output, Tensor) and output.grad_fn is not None:
            with self.stopwatch.own():
                for node in _own_nodes(output.grad_fn, self._sequence):
                    self._time(node, self.stopwatch)

    def _time(self, node: Any, stopwatch: Stopwatch) -> None:
        spans: list[Any] = []

        def begin(gradients: Any) -> None:
            spans.append(stopwatch.begin("backward", {self.name: 1.0}, self.name))

        def end(inputs: Any, outputs: Any) -> None:
            if spans:
                stopwatch.end(spans.pop())

        node.register_prehook(begin)
        node.register_hook(end)

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerTimer:
        return LayerTimer(self.name)

    def __reduce__(self) -> tuple[Callable[[str], LayerTimer], tuple[str]]:
        return LayerTimer, (self.name,)


def _own_nodes(root: Any, sequence: int) -> list[Any]:
    """Return the nodes at and below ``root`` that were recorded since ``sequence``."""
    found, queue = [], [root]
    while queue:
        node = queue.pop()
        # The accumulator of a leaf has the greatest sequence number there is, whatever its age.
        if node in found or node.name().endswith("AccumulateGrad"):
            continue
        if node._sequence_nr() >= sequence:
            found.append(node)
            queue += [below for below, _ in node.next_functions if below is not None]
    return found
