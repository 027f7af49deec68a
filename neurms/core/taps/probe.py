"""The probe engine: a tap's place in a graph that torch.compile has recorded.

A graph holds no hooks. What stands for one is an identity on the layer's output whose backward
calls an operator with D and H: at run time, in the backward pass itself, the operator finds the
tap and has it do what its hook would have done. So sums, loss scales, accumulation and what counts
are decided by the same code as in eager mode, and nothing of the optimizer's is baked into a graph.

Compilers drop operators whose results nobody uses. The operator's result is therefore made the
gradient of a *probe*, a leaf of no axes. Where the tap rescales D (NeuRMS's variant B) the result
is the new D. The probe's value is the number by which the tap is found, so that one graph serves
every layer of a kind.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["Probe", "ServesGraphs"]


class ServesGraphs(Protocol):
    """A tap that graphs call back."""

    def serve(self, errors: Tensor, inputs: Tensor | None, rescales: bool) -> Tensor | None:
        """Take D, and H if the tap observes it, of one backward firing.

        Args:
            errors: D in the shape of the layer's output; not to be written.
            inputs: H in the shape of the layer's input, or None; not to be written.
            rescales: Whether what is returned will be used.

        Returns:
            What replaces D, in memory of its own, or None to leave it.
        """


# Exact to 2^24 taps. A float64 scalar would be taken for a Python number and compiled twice.
_NUMBER = torch.float32
_keys = itertools.count()
# Graphs outlive taps, and must not keep them, their optimizer and its model alive.
_TAPS: weakref.WeakValueDictionary[int, ServesGraphs] = weakref.WeakValueDictionary()


class Probe:
    """The identity through which compiled graphs show a layer's D and H to a tap.

    Args:
        tap: Called in every backward pass of the graph; held weakly. A graph whose tap is gone
            leaves D alone.
        rescales: Whether the tap may replace D. Where it never does, no copy of D is made.

    Reference:
        NeuRMS draft, statistics of backpropagation. Settled here: a training step compiled with
        ``fullgraph=True`` keeps its statistics. TorchInductor removes the identity's copy, so that
        the forward graph is the untapped one.

    Example:
        >>> import torch
        >>> class Printer:
        ...     def serve(self, errors, inputs, rescales):
        ...         print(tuple(errors.shape), inputs)
        >>> tap = Printer()
        >>> probe = Probe(tap, rescales=False)
        >>> doubled = 2 * torch.ones(4, 3, requires_grad=True)
        >>> probe.through(doubled, None).sum().backward()
        (4, 3) None
    """

    def __init__(self, tap: ServesGraphs, *, rescales: bool) -> None:
        self.rescales = rescales
        key = next(_keys)
        # On the CPU whatever the layer's device: reading it must not wait for an accelerator.
        self._leaf = torch.tensor(float(key), device="cpu", dtype=_NUMBER, requires_grad=True)
        _TAPS[key] = tap

    def through(self, outputs: Tensor, inputs: Tensor | None) -> Tensor:
        """Return ``outputs`` for the graph being recorded to go on with.

        Args:
            outputs: Z, any shape.
            inputs: H, any shape, or None where the tap leaves it alone.
        """
        shown: Tensor = _Through.apply(  # type: ignore[no-untyped-call]
            outputs, inputs, self._leaf, self.rescales
        )
        return shown


class _Through(torch.autograd.Function):
    """An identity whose backward shows D and H to the tap that a leaf names."""

    @staticmethod
    def forward(
        ctx: Any, outputs: Tensor, inputs: Tensor | None, leaf: Tensor, rescales: bool
    ) -> Tensor:
        # Saved with the graph's other tensors: autograd holds H for the weight's gradient, too.
        ctx.save_for_backward(*((leaf,) if inputs is None else (leaf, inputs)))
        ctx.rescales = rescales
        # A view would forbid the in-place activations that often follow.
        return outputs.clone()

    @staticmethod
    def backward(ctx: Any, errors: Tensor) -> tuple[Tensor | None, ...]:
        leaf, *saved = ctx.saved_tensors
        inputs = saved[0] if len(saved) else None
        # A layer used twice may get the same D and H twice, and must be asked twice: no two calls
        # are common subexpressions, for memory not yet written never is.
        mark = torch.empty((), device="cpu", dtype=_NUMBER)
        result = _show_errors(errors, inputs, leaf, mark, ctx.rescales)
        return (result, None, None, None) if ctx.rescales else (errors, None, result, None)


_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality
# A recorded CUDA graph would replay kernels and leave the tap uncalled.
_TAGS = tuple(t for t in [getattr(torch.Tag, "cudagraph_unsafe", None)] if t is not None)


@torch.library.custom_op("neurms::show_errors", mutates_args=(), tags=_TAGS)
def _show_errors(
    errors: Tensor, inputs: Tensor | None, leaf: Tensor, mark: Tensor, rescales: bool
) -> Tensor:
    tap, replaced = _TAPS.get(int(leaf)), None
    if tap is not None:
        # Operators run with autograd switched off, in which no questions about the running
        # backward pass can be asked; a hook, which this stands for, may ask them.
        with torch._C._SetExcludeDispatchKeyGuard(_AUTOGRAD, False):
            replaced = tap.serve(errors, inputs, rescales)
    if not rescales:
        return torch.zeros_like(mark)
    return errors.clone() if replaced is None else replaced


@_show_errors.register_fake
def _(errors: Tensor, inputs: Tensor | None, leaf: Tensor, mark: Tensor, rescales: bool) -> Tensor:
    return torch.empty_like(errors if rescales else mark)
