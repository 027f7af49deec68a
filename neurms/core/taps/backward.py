"""The backward engine: a Linear whose backward writes its own update and never forms a gradient.

While attached, the module's class is a subclass of ``nn.Linear`` that finds its tap in a table of
this file. Nothing is stored on the module, so that a copy or a pickle of it is a plain
``nn.Linear``.
"""

from __future__ import annotations

import weakref
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.taps.accumulation import OUTSIDE_BACKWARD, destination, is_ordinary
from neurms.core.taps.protocol import UpdateSink

__all__ = ["BackwardUpdateTap", "is_tapped_linear"]

_HAS_RANKS = torch.distributed.is_available()
_BREAKS = "a neurms tap reads and writes real tensors; detach it, or drop fullgraph=True"


class _Use:
    """One recorded forward of a tapped layer; lives as long as its graph."""

    # Defaults of the class: a constructor would be one more call in every forward.
    task = OUTSIDE_BACKWARD
    done = False
    left = False
    """Whether the optimizer has begun anew while it waited for its backward."""
    given_up = False
    """Whether another forward has taken its place since."""
    cast: torch.dtype | None = None
    """What autocast multiplies in; None where it casts nothing."""
    in_autocast = False
    """Whether autocast has to be switched off around the product."""


class BackwardUpdateTap:
    """Hands D and H of an ``nn.Linear`` to a sink that updates the weight inside backward.

    The backward computes, in this order: ``D`` (rescaled by the sink if it wishes), the upstream
    gradient ``D W``, the bias gradient ``D^T 1`` (an ordinary ``.grad``), then
    ``sink.update(D, H)``, which writes the weight. ``weight.grad`` is never formed, which is what
    saves the time, and why anything that needs it is refused:

    * a layer used again while an earlier forward of it still waits for its backward: the first
      backward to arrive would change the weight under the other (a forward whose graph is gone is
      fine, a checkpoint's recomputation is told apart by running inside backward);
    * a second backward before :meth:`rearm` (accumulation, a retained graph);
    * ``create_graph=True`` and ``torch.autograd.grad`` with respect to the weight;
    * more than one rank in ``torch.distributed``: each rank would apply its own update.

    A backward that adds to no weight (``torch.autograd.grad(loss, inputs)``) updates nothing. The
    layer is a plain linear one under ``no_grad``, with a frozen weight, in torch.func transforms
    and when called with another tensor as its weight; under torch.compile its forward breaks the
    graph. The sink is held weakly: once it is gone the layer returns to what it was.

    Args:
        module: The layer, of class ``nn.Linear`` exactly.
        sink: Receives D and H, already flattened to rows; whoever makes the tap keeps it.
        name: The layer's name for error messages.
        writes: Whether the sink changes the weight. One that only gathers what the weight will move
            by at the step may be handed D and H any number of times, so that uses and backwards
            are not counted.
        once: Whether uses and backwards are counted all the same: a sink that only gathers, but
            needs all of the gradient at once. None follows ``writes``.
        rescales: Whether the sink may replace D; False saves the question.

    Raises:
        TypeError: ``module`` is not exactly an ``nn.Linear`` or ``sink`` no
            :class:`~neurms.core.taps.protocol.UpdateSink`.

    Reference:
        NeuRMS draft, buffer scaling. Settled here: ``update="backward"`` applies
        ``W.addmm_((D S)^T, H C)`` after the upstream product has read W.

    Example:
        >>> import torch
        >>> class Descent:
        ...     def __init__(self, weight):
        ...         self.weight = weight
        ...
        ...     def rescale_errors(self, errors):
        ...         return None
        ...
        ...     def update(self, errors, activations):
        ...         self.weight.addmm_(errors.T, activations, alpha=-0.1)
        >>> layer = torch.nn.Linear(3, 2, bias=False)
        >>> before = layer.weight.detach().clone()
        >>> sink = Descent(layer.weight)
        >>> tap = BackwardUpdateTap(layer, sink)
        >>> tap.attach()
        >>> layer(torch.ones(4, 3)).sum().backward()
        >>> layer.weight.grad is None, torch.allclose(layer.weight, before - 0.4)
        (True, True)
        >>> tap.detach()
    """

    leaves_gradient: ClassVar[bool] = False
    """Whether the weight has a gradient all the same."""
    changed: ClassVar[str] = ""
    """What has become of the module's weight, in words: what changes it is refused."""

    def __init__(
        self,
        module: nn.Linear,
        sink: UpdateSink,
        *,
        name: str = "",
        writes: bool = True,
        once: bool | None = None,
        rescales: bool = True,
    ) -> None:
        if type(module) not in (nn.Linear, _TappedLinear):
            raise TypeError(
                f"module={name or type(module).__name__!r} must be exactly an nn.Linear, not a "
                f'{type(module).__name__}; use update="step" for it'
            )
        if not isinstance(sink, UpdateSink):
            raise TypeError(f"sink={sink!r} must have the methods rescale_errors and update")
        self.name = name or f"Linear({module.in_features}, {module.out_features})"
        self.fired = False
        self.spent = False
        self.used = False
        """Whether :meth:`rearm` has something to do."""
        self._writes = writes
        self._once = writes if once is None else once
        self._rescales = rescales
        self._in_place = False
        self.weight = module.weight
        self._module = weakref.ref(module)
        self._sink = weakref.ref(sink)
        self._waiting: weakref.ref[_Use] | None = None

    @property
    def attached(self) -> bool:
        """Whether the layer's forward goes through this tap."""
        return self._in_place and self._module() is not None

    def attach(self) -> None:
        """Put the tap in place; again does nothing.

        Raises:
            ReferenceError: The module no longer exists.
            ValueError: Another tap whose sink is alive holds the module.
            UnsupportedTrainingError: Several ranks train.
        """
        module = self._module()
        if module is None:
            raise ReferenceError(f"layer {self.name} no longer exists; make a new tap")
        if self.attached:
            return
        other = _TAPS.get(module)
        if other is not None and other._sink() is not None:
            raise ValueError(f"layer {self.name} is tapped already; detach its other optimizer")
        self._refuse_ranks()
        if other is not None:
            other._in_place = False
        _TAPS[module] = self
        self._in_place = True
        module.__class__ = _TappedLinear

    def detach(self) -> None:
        """Make the layer a plain ``nn.Linear`` again.

        A graph recorded before still gives the exact upstream and bias gradients, and no update.
        """
        module = self._module()
        if module is not None and self._in_place:
            del _TAPS[module]
            self._in_place = False
            # A parametrization puts a class of its own on top of this one.
            if is_tapped_linear(module):
                module.__class__ = nn.Linear

    def rearm(self) -> None:
        """Allow the next backward; the optimizer calls it at a step's end and in zero_grad.

        A forward that still waits (it may have been broken off, with an exception that keeps its
        graph alive) gives way to the next one.
        """
        self.spent = self.used = False
        waiting = self._waiting() if self._waiting is not None else None
        if waiting is not None:
            waiting.left = True

    def abandon(self) -> None:
        """Forget a forward whose backward was broken off, though its graph may still be alive."""
        self.rearm()
        self._waiting = None

    def forward(self, module: nn.Linear, inputs: Tensor) -> Tensor:
        """Return ``inputs W^T + b``, recorded so that backward updates W if a gradient is due."""
        own = module._parameters
        weight = own["weight"] if "weight" in own else None
        if self._sink() is None:
            self.detach()
            return F.linear(inputs, module.weight, module.bias)
        if weight is None and torch.is_grad_enabled() and self.weight.requires_grad:
            raise self._refused(
                "was pruned or parametrized after its optimizer was built, and multiplies with "
                "another tensor than its weight; build the optimizer after the change"
            )
        if weight is None or weight is not self.weight or not _is_trained(inputs, weight):
            return F.linear(inputs, module.weight, module.bias)
        use = self._record()
        device = inputs.device.type
        if torch.is_autocast_enabled(device):
            use.in_autocast = True
            if inputs.dtype != torch.float64:
                use.cast = torch.get_autocast_dtype(device)
                inputs = inputs.to(use.cast)
        # Shaped out here, as nn.Linear does: a Function that returns a view forbids the in-place
        # activations that often follow.
        flat = inputs if inputs.ndim == 2 else inputs.reshape(-1, inputs.shape[-1])
        # Function.apply takes twenty calls to look for what torch.func may have left behind.
        active = torch._C._are_functorch_transforms_active()
        apply: Any = _UpdateInBackward.apply if active else _apply
        bias = own["bias"] if "bias" in own else module.bias
        rows: Tensor = apply(flat, weight, bias, self, use)
        return rows if inputs.ndim == 2 else rows.view(*inputs.shape[:-1], rows.shape[-1])

    def _record(self) -> _Use:
        if _HAS_RANKS and torch.distributed.is_initialized():
            self._refuse_ranks()
        use = _Use()
        use.task = task = torch._C._current_graph_task_id()
        if not self._once:
            return use
        if self.spent and task != OUTSIDE_BACKWARD:
            raise self._refused("is recomputed by a checkpoint after its weight was updated")
        waiting = self._waiting() if self._waiting is not None else None
        pending = waiting is not None and not waiting.done
        if waiting is not None and pending and not waiting.left and waiting.task == task:
            raise self._refused(
                "is used a second time before the backward of its first use (run forwards that "
                "need no gradient under torch.no_grad(), and drop outputs that are not needed, or "
                "call optimizer.zero_grad() to begin anew)"
            )
        if waiting is not None and waiting.left:
            waiting.given_up, pending = True, False
        # A recomputation stands in for the use that waits, which must stay on record.
        if not pending:
            self._waiting = weakref.ref(use)
            self.used = True
        return use

    def _refuse_ranks(self) -> None:
        distributed = torch.distributed
        if not (_HAS_RANKS and distributed.is_initialized()):
            return
        if distributed.get_world_size() > 1:
            raise self._refused(f"trains on {distributed.get_world_size()} ranks")

    def _refused(self, what: str) -> UnsupportedTrainingError:
        changes = "changes during backward and " if self._writes else ""
        return UnsupportedTrainingError(
            f'layer {self.name} {what}, which update="backward" cannot do: its weight {changes}'
            'has no gradient; use update="step"'
        )

    def _check_backward(self, accumulator: Any) -> bool:
        """Return whether this backward updates the weight; raise first if it may not."""
        if torch.is_grad_enabled():
            raise self._refused("is differentiated with create_graph=True")
        if self._sink() is None or not self._in_place or self._module() is None:
            return False
        goes = destination(self.weight, accumulator)
        if goes == "captured":
            raise self._refused("has its weight's gradient asked for by torch.autograd.grad")
        if goes == "nowhere":
            return False
        if self.spent and self._once:
            raise self._refused(
                "is reached by a second backward before optimizer.step() (gradient accumulation "
                "or a retained graph)"
            )
        return True

    def _deliver(self, errors: Tensor, activations: Tensor) -> Tensor | None:
        """Have the sink write the update; return D's column sums if it has them."""
        sink, sums = self._sink(), None
        # No rows are no step; but an average takes their gradient, which is zero.
        if sink is not None and (errors.shape[0] or not self._writes):
            sums = sink.update(errors, activations)
        self.spent = self.fired = self.used = True
        return sums

    def _rescaled(self, errors: Tensor) -> Tensor:
        sink = self._sink()
        replaced = sink.rescale_errors(errors) if sink is not None and errors.shape[0] else None
        return errors if replaced is None else replaced


class _TappedLinear(nn.Linear):
    """What an ``nn.Linear`` is while a tap holds it."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output through its tap."""
        if torch.compiler.is_dynamo_compiling():
            broken: Tensor = _break_graph(self, input)
            return broken
        try:
            tap = _TAPS[self]
        except KeyError:
            return F.linear(input, self.weight, self.bias)
        return tap.forward(self, input)

    def _get_name(self) -> str:
        return "Linear"

    def __prepare_scriptable__(self) -> NoReturn:
        raise UnsupportedTrainingError(
            "torch.jit.script cannot compile a layer that NeuRMS updates in backward; script a "
            "copy (copy.deepcopy(model)), which is a plain one, or call optimizer.detach() first"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Protocol 1's form for every protocol: later ones insist on the object's own class.
        reduced: Any = super().__reduce_ex__(1)
        rebuild, args, *rest = reduced
        plain = tuple(nn.Linear if arg is _TappedLinear else arg for arg in args)
        return (rebuild, plain, *rest)


@torch.compiler.disable(reason=_BREAKS)  # type: ignore[untyped-decorator]
def _break_graph(module: _TappedLinear, inputs: Tensor) -> Tensor:
    # Only under torch.compile: the wrapper costs something in every call.
    return module.forward(inputs)


def is_tapped_linear(module: nn.Module) -> bool:
    """Return whether ``module`` is an ``nn.Linear`` that a tap holds, or held until its end."""
    return type(module) is _TappedLinear


class _UpdateInBackward(torch.autograd.Function):
    """A product on rows whose backward hands D and H to the tap instead of multiplying them."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tap: BackwardUpdateTap,
        use: _Use,
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.tap, ctx.use = tap, use
        ctx.set_materialize_grads(False)
        if not use.in_autocast:
            return F.linear(inputs, weight, bias)
        with torch.autocast(inputs.device.type, enabled=False):
            if use.cast is None:
                return F.linear(inputs, weight, bias)
            bias = None if bias is None else bias.to(use.cast)
            return F.linear(inputs, weight.to(use.cast), bias)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        if output_gradient is None:
            return None, None, None, None, None
        device = output_gradient.device.type
        if not torch.is_autocast_enabled(device):
            return _backward(ctx, output_gradient)
        with torch.autocast(device, enabled=False):
            return _backward(ctx, output_gradient)


# What Function.apply calls where no transform of torch.func is active.
_apply: Any = super(torch.autograd.Function, _UpdateInBackward).apply


def _backward(ctx: Any, errors: Tensor) -> tuple[Tensor | None, ...]:
    tap: BackwardUpdateTap = ctx.tap
    use: _Use = ctx.use
    upstream = bias_gradient = None
    # Before the saved tensors: an updated weight would make autograd raise a less helpful error.
    # The weight is the second tensor that the function was applied to.
    updates = tap._check_backward(ctx.next_functions[1][0])
    if updates and use.given_up:
        raise tap._refused("is reached by the backward of a forward that another has replaced")
    inputs, weight = ctx.saved_tensors
    needs_upstream, _, needs_bias, _, _ = ctx.needs_input_grad
    if updates and tap._rescales:
        errors = tap._rescaled(errors)
    if needs_upstream:
        upstream = errors @ (weight if weight.dtype is errors.dtype else weight.to(errors.dtype))
    if updates:
        bias_gradient = tap._deliver(errors, inputs)
    if not needs_bias:
        bias_gradient = None
    elif bias_gradient is None:
        bias_gradient = errors.sum(0)
    use.done = True
    return upstream, None, bias_gradient, None, None


def _is_trained(inputs: Tensor, weight: Tensor) -> bool:
    """Return whether this forward gives the weight an ordinary gradient."""
    if not (torch.is_grad_enabled() and weight.requires_grad and is_ordinary(inputs)):
        return False
    # The optimizer's own parameter: no transform or trace has wrapped it.
    return (type(weight) is nn.Parameter and not weight.is_meta) or is_ordinary(weight)


_TAPS: weakref.WeakKeyDictionary[nn.Module, BackwardUpdateTap] = weakref.WeakKeyDictionary()
