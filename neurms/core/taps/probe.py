"""The probe engine: a tap's place in a graph that torch.compile has recorded.

A graph holds no hooks. What stands for one is an identity on the layer's output. Where D stays as
it is, the identity's backward sums D's squares by plain operations, which TorchInductor fuses with
their neighbours (as H's are in the forward), and hands the sums to an operator. Where the tap
rescales D (NeuRMS's variant B) the operator gets D itself and returns the new one. At run time, in
the backward pass itself, the operator finds the tap and has it do what its hook would have done.
So loss scales, accumulation and what counts are decided by the same code as in eager mode, and
nothing of the optimizer's is baked into a graph.

Compilers drop operators whose results nobody uses. The operator's result is therefore made the
gradient of a *probe*, a leaf of no axes, or the new D. The probe's value is the number by which the
tap is found, so that one graph serves every layer of a kind.
"""

from __future__ import annotations

import itertools
import math
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from neurms.compiled.reductions import channel_square_sum, column_square_sum

__all__ = ["Probe", "ServesGraphs"]

Axes = tuple[int, ...]


class ServesGraphs(Protocol):
    """A tap that graphs call back."""

    def serve(self, errors: Tensor, inputs: Tensor | None) -> Tensor | None:
        """Take D, and H if the tap observes it, of one backward firing, and perhaps rescale D.

        Args:
            errors: D in the shape of the layer's output; not to be written.
            inputs: H in the shape of the layer's input, or None; not to be written.

        Returns:
            What replaces D, in memory of its own, or None to leave it.
        """

    def take(
        self, errors: Tensor, unit_sums: Tensor, inputs: Tensor | None, feature_rows: int
    ) -> None:
        """Take the sums of one backward firing, whose D stays as it is.

        Args:
            errors: D as in :meth:`serve`.
            unit_sums: Sums of squares of D, shape (units,), no loss scale divided out; in memory
                that the graph uses again.
            inputs: Sums of squares of H, shape (features,), in such memory too; H itself where it
                holds token indices; or None.
            feature_rows: Rows of H that were summed.
        """


# Exact to 2^24 taps. A float64 scalar would be taken for a Python number and compiled twice.
_NUMBER = torch.float32
_keys = itertools.count()
# Graphs outlive taps, and must not keep them, their optimizer and its model alive.
_TAPS: weakref.WeakValueDictionary[int, ServesGraphs] = weakref.WeakValueDictionary()
# By where the leaf lies, which is faster to ask than its value: nothing else can lie there while
# the tap lives. A copy of the leaf, as hooks on saved tensors make, is known by its value.
_PLACES: weakref.WeakValueDictionary[int, ServesGraphs] = weakref.WeakValueDictionary()


class Probe:
    """The identity through which compiled graphs show a layer's D and H to a tap.

    Args:
        tap: Called in every backward pass of the graph; held weakly. A graph whose tap is gone
            leaves D alone.
        rescales: Whether the tap may replace D. Where it never does, no copy of D is made.
        unit_axes: Axes of D over units, counted from the end.
        feature_axes: Axes of H over features; None where H holds token indices.

    Reference:
        NeuRMS draft, statistics of backpropagation. Settled here: a training step compiled with
        ``fullgraph=True`` keeps its statistics. TorchInductor removes the identity's copy.

    Example:
        >>> import torch
        >>> class Printer:
        ...     def take(self, errors, unit_sums, inputs, feature_rows):
        ...         print(tuple(errors.shape), unit_sums.tolist(), inputs)
        >>> tap = Printer()
        >>> probe = Probe(tap, rescales=False)
        >>> doubled = 2 * torch.ones(4, 3, requires_grad=True)
        >>> probe.through(doubled, None).sum().backward()
        (4, 3) [4.0, 4.0, 4.0] None
    """

    def __init__(
        self,
        tap: ServesGraphs,
        *,
        rescales: bool,
        unit_axes: Axes = (-1,),
        feature_axes: Axes | None = (-1,),
    ) -> None:
        self.rescales = rescales
        self._axes = unit_axes
        self._feature_axes = feature_axes
        key = next(_keys)
        # On the CPU whatever the layer's device: reading it must not wait for an accelerator.
        self._leaf = torch.tensor(float(key), device="cpu", dtype=_NUMBER, requires_grad=True)
        _TAPS[key] = _PLACES[self._leaf.data_ptr()] = tap

    def through(self, outputs: Tensor, inputs: Tensor | None) -> Tensor:
        """Return ``outputs`` for the graph being recorded to go on with.

        Args:
            outputs: Z, any shape.
            inputs: H, any shape, or None where the tap leaves it alone.
        """
        if self.rescales:
            shown: Tensor = _Rescaled.apply(outputs, inputs, self._leaf)  # type: ignore[no-untyped-call]
            return shown
        rows = 0
        if inputs is not None and self._feature_axes is not None:
            # At once, while the operations that make H can take it along.
            inputs, rows = _square_sum(inputs.detach(), self._feature_axes)
        observed: Tensor = _Observed.apply(  # type: ignore[no-untyped-call]
            outputs, inputs, self._leaf, rows, self._axes
        )
        return observed


def _square_sum(x: Tensor, axes: Axes) -> tuple[Tensor, int]:
    """Return what ``axes_square_sum`` does, as operations that a graph can take apart."""
    channels = math.prod([x.shape[axis] for axis in axes])
    rows = x.numel() // channels if channels else 0
    if len(axes) == 1 and axes != (-1,):
        return channel_square_sum.eager(x, axes[0] + x.ndim, None), rows
    last = x if axes == (-1,) else x.movedim(axes, tuple(range(-len(axes), 0)))
    return column_square_sum.eager(last.reshape(rows, -1), None), rows


class _Observed(torch.autograd.Function):
    """An identity whose backward sums D's squares for the tap that a leaf names."""

    @staticmethod
    def forward(
        ctx: Any, outputs: Tensor, inputs: Tensor | None, leaf: Tensor, rows: int, axes: Axes
    ) -> Tensor:
        ctx.save_for_backward(*((leaf,) if inputs is None else (leaf, inputs)))
        ctx.rows, ctx.axes = rows, axes
        # A view would forbid the in-place activations that often follow.
        return outputs.clone()

    @staticmethod
    def backward(ctx: Any, errors: Tensor) -> tuple[Tensor | None, ...]:
        leaf, *saved = ctx.saved_tensors
        inputs = saved[0] if len(saved) else None
        shown = errors.detach()
        sums, _ = _square_sum(shown, ctx.axes)
        result = torch.ops.neurms.take_sums(
            shown, sums, inputs, ctx.rows, leaf.detach(), _new_mark()
        )
        return errors, None, result, None, None


class _Rescaled(torch.autograd.Function):
    """An identity whose backward shows D and H to the tap that a leaf names."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, inputs: Tensor | None, leaf: Tensor) -> Tensor:
        # Saved with the graph's other tensors: autograd holds H for the weight's gradient, too.
        ctx.save_for_backward(*((leaf,) if inputs is None else (leaf, inputs)))
        return outputs.clone()

    @staticmethod
    def backward(ctx: Any, errors: Tensor) -> tuple[Tensor | None, ...]:
        leaf, *saved = ctx.saved_tensors
        inputs = saved[0] if len(saved) else None
        return _rescale_errors(errors, inputs, leaf, _new_mark()), None, None


def _new_mark() -> Tensor:
    """Return what no other call has.

    A layer used twice may get the same D and H twice, and must be asked twice: no two calls are
    common subexpressions, for memory not yet written never is.
    """
    return torch.empty((), device="cpu", dtype=_NUMBER)


_AUTOGRAD = torch._C.DispatchKey.AutogradFunctionality


def _tags(*names: str) -> tuple[torch.Tag, ...]:
    """Return torch's tags of these names, as far as this release has them."""
    return tuple(getattr(torch.Tag, name) for name in names if hasattr(torch.Tag, name))


# A recorded CUDA graph would replay kernels and leave the tap uncalled.
_UNRECORDED = _tags("cudagraph_unsafe")


@torch.library.custom_op("neurms::rescale_errors", mutates_args=(), tags=_UNRECORDED)
def _rescale_errors(errors: Tensor, inputs: Tensor | None, leaf: Tensor, mark: Tensor) -> Tensor:
    tap, replaced = _TAPS.get(int(leaf)), None
    if tap is not None:
        # Operators run with autograd switched off, in which no questions about the running
        # backward pass can be asked; a hook, which this stands for, may ask them.
        with torch._C._SetExcludeDispatchKeyGuard(_AUTOGRAD, False):
            replaced = tap.serve(errors, inputs)
    return errors.clone() if replaced is None else replaced


@_rescale_errors.register_fake
def _(errors: Tensor, inputs: Tensor | None, leaf: Tensor, mark: Tensor) -> Tensor:
    return torch.empty_like(errors)


# Without the layers of custom_op, which cost more than the tap's own work. Any memory format will
# do: D must not be copied for the operator.
_LIBRARY = torch.library.Library("neurms", "FRAGMENT")
_LIBRARY.define(
    "take_sums(Tensor errors, Tensor unit_sums, Tensor? inputs, SymInt feature_rows, Tensor leaf, "
    "Tensor mark) -> Tensor",
    tags=(*_UNRECORDED, *_tags("pt2_compliant_tag", "flexible_layout")),
)


def _take_sums(
    errors: Tensor,
    unit_sums: Tensor,
    inputs: Tensor | None,
    feature_rows: int,
    leaf: Tensor,
    mark: Tensor,
) -> Tensor:
    tap = _PLACES.get(leaf.data_ptr()) or _TAPS.get(int(leaf))
    if tap is not None:
        tap.take(errors, unit_sums, inputs, feature_rows)
    return torch.zeros_like(mark)


_LIBRARY.impl("take_sums", _take_sums, "CompositeExplicitAutograd")
# Nothing of it is differentiated, and autograd stays switched on: see above.
_LIBRARY.impl("take_sums", torch.library.fallthrough_kernel, "Autograd")


@torch.library.register_fake("neurms::take_sums")
def _(
    errors: Tensor,
    unit_sums: Tensor,
    inputs: Tensor | None,
    feature_rows: int,
    leaf: Tensor,
    mark: Tensor,
) -> Tensor:
    return torch.empty_like(mark)
