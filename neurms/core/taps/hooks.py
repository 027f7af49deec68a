"""The hook engine: column sums of squares of D and H, read beside an unchanged layer.

A forward hook sees the layer's input and output; it reduces H at once, so that H itself is never
kept alive, and registers a hook on the output tensor, through which D will pass. Both sums are
delivered from there, together: a forward that no backward reaches, or that a checkpoint runs
twice, counts once or not at all. Tensor hooks stand where they were registered, before any later
in-place activation, which is where D = dL/dZ is (module backward hooks refuse in-place
activations).

In a graph of torch.compile the probe engine stands for the hook on the output.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from neurms.compiled.backends import PROMPT, validate_backend
from neurms.compiled.reductions import axes_square_sum
from neurms.core.ground.errors import UnsupportedTrainingError, check_choice
from neurms.core.ground.spans import is_observed, span
from neurms.core.taps.accumulation import destination, is_ordinary
from neurms.core.taps.activity import Activity, activity_of
from neurms.core.taps.copies import leave_out, own_again
from neurms.core.taps.probe import Probe
from neurms.core.taps.protocol import Sink, Sums
from neurms.core.taps.weights import held_weight, is_remade

__all__ = ["HookTap", "InertTap", "forget_compiled_graphs", "removed_taps"]

_NO_SCRIPT = (
    "torch.jit.script cannot compile the taps that NeuRMS has on a model; script a copy "
    "(copy.deepcopy(model)), which has none, or call optimizer.detach() first"
)
_PARALLEL = (
    "a tapped weight is a DTensor while its layer multiplies (tensor parallelism), so that a rank "
    'sees parts of D and H; use NeuRMS(variant="P"), which reads gradients alone, or name the '
    "weight in exclude"
)
_BREAKS = "a neurms tap reads real tensors; detach it, or drop fullgraph=True"


class InertTap:
    """What a copy of a tap is: it observes nothing, and copies of a model need none."""

    private = True
    attached = False
    fired = False

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Leave the forward pass alone."""

    def attach(self) -> None:
        """Do nothing: a copy belongs to no optimizer."""

    def detach(self) -> None:
        """Do nothing."""


class HookTap:
    """Delivers the sums of one layer's D and H to a sink, once for each backward that counts.

    A firing counts if this very backward pass adds to the weight's ``.grad``. So statistics follow
    gradients: two backward passes over a retained graph count twice (their gradients add up too),
    ``torch.autograd.grad`` counts nothing and is never rescaled, a module used twice delivers
    twice. In a double backward (a gradient penalty), the D counted is the whole derivative of the
    loss with respect to the layer's output, through the penalty too; the part of the weight's
    gradient that comes from differentiating the first backward's own product D W is not of the
    form D^T H, and no sum stands for it.

    Nothing is observed where the weight gets no ordinary gradient: under ``no_grad`` and
    ``inference_mode``, for a frozen weight, when the module runs with another tensor as its weight
    (``functional_call``, ``DataParallel`` replicas), inside torch.func transforms, on meta and fake
    tensors. Forwards that bypass the module's ``__call__`` are not seen either (``fired`` stays
    False: the ``out_proj`` of ``nn.MultiheadAttention``).

    The tap holds the module and the sink weakly: it keeps neither an optimizer nor a model alive,
    and takes its hook off at the first forward after its sink is gone. Whoever makes the tap keeps
    the sink. Copies and pickles of the model hold nothing of it.

    The weight is followed where pruning or a parametrization moves it (``weight_orig``,
    ``parametrizations.weight.original``): D and H are those of the layer's product all the same.

    Graphs of torch.compile hold a :class:`~neurms.core.taps.probe.Probe` where ``in_graph`` says
    so, and break at the layer where it does not; functions compiled before :meth:`attach` see
    neither until :func:`forget_compiled_graphs`. FSDP2 is seen through the unsharded parameter that
    the module holds during its forward.

    Args:
        module: The layer.
        weight: The parameter that the layer multiplies H with; must be the module's own.
        sink: Receives the sums.
        activity: Axes of H and D; None takes :func:`~neurms.core.taps.activity.activity_of`.
        features: Whether H is reduced too.
        backend: How the reductions run.
        in_graph: What compiled graphs do: ``"observe"`` for a sink that never rescales,
            ``"rescale"`` for one that may, or None to break the graph and run the hook.

    Raises:
        TypeError: ``sink`` is no :class:`~neurms.core.taps.protocol.Sink`.
        ValueError: ``weight`` is not a parameter of ``module`` itself, the activity of ``module``
            is not known, or ``backend`` is not.

    Reference:
        NeuRMS draft, statistics of backpropagation. Settled here: sums and rows, not means, leave
        the tap, so that micro-batches and ranks can be added exactly; the loss scale is divided
        out in float32 before squaring.

    Example:
        >>> import torch
        >>> class Printer:
        ...     def add(self, sums):
        ...         print(sums.unit_square_sum.tolist(), sums.rows)
        ...
        ...     def rescale(self, sums):
        ...         return None
        ...
        ...     def loss_scale(self):
        ...         return None
        >>> layer, sink = torch.nn.Linear(3, 2), Printer()
        >>> tap = HookTap(layer, layer.weight, sink)
        >>> tap.attach()
        >>> (2 * layer(torch.ones(4, 3))).sum().backward()
        [16.0, 16.0] 4
        >>> tap.detach()
    """

    private = True
    """Whether copies of the module leave this hook out."""
    leaves_gradient: ClassVar[bool] = True
    """Whether the weight has a gradient all the same."""
    used: ClassVar[bool] = False
    """Whether :meth:`rearm` has something to do."""

    def __init__(
        self,
        module: nn.Module,
        weight: Tensor,
        sink: Sink,
        *,
        activity: Activity | None = None,
        features: bool = False,
        backend: str = "auto",
        in_graph: str | None = None,
    ) -> None:
        if not isinstance(sink, Sink):
            raise TypeError(f"sink={sink!r} must have the methods add, rescale and loss_scale")
        activity = activity if activity is not None else activity_of(module)
        if activity is None:
            raise ValueError(
                f"module={type(module).__name__} has no known activity; pass activity=Activity(...)"
            )
        self.weight = weight
        self.activity = activity
        self.features = features
        self.backend = backend if backend == PROMPT else validate_backend(backend)
        self.fired = False
        self.changed = ""
        """What has become of the module's weight since, in words; empty if nothing has."""
        self._name = _own_name(module, weight)
        self._kind = None if _is_sharded(weight) else type(weight)
        self._trailing = -min(activity.unit_axes)
        self._module = weakref.ref(module)
        self._sink = weakref.ref(sink)
        self._handle: RemovableHandle | None = None
        self._accumulator: Any = None
        self._lock = threading.Lock()
        if in_graph is not None:
            check_choice("in_graph", in_graph, ("observe", "rescale"))
        self._probe = None if in_graph is None else self._new_probe(in_graph == "rescale")

    @property
    def attached(self) -> bool:
        """Whether the hook is in place."""
        return self._handle is not None and not self.removed

    @property
    def removed(self) -> bool:
        """Whether somebody else has taken the hook off the module."""
        module = self._module()
        if self._handle is None or module is None:
            return False
        return module._forward_hooks.get(self._handle.id) is not self

    def attach(self) -> None:
        """Put the hook in place, before the module's other forward hooks; again does nothing.

        Raises:
            ReferenceError: The module no longer exists.
            ValueError: The weight is tapped in another module too: its gradient is a sum over both,
                which one layer's statistics must not scale.
        """
        module = self._module()
        if module is None:
            raise ReferenceError("the tapped module no longer exists; make a new tap")
        if self.attached:
            return
        _refuse_tied(module, self.weight)
        # First in line: a hook of the user's may replace the output, whose gradient is not D.
        self._handle = module.register_forward_hook(self, prepend=True, with_kwargs=True)
        leave_out(module)
        _TAPPED[self.weight] = weakref.ref(module)

    def detach(self) -> None:
        """Take the hook off; graphs that are recorded already still deliver."""
        module = self._module()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
            if module is not None:
                own_again(module)

    def rearm(self) -> None:
        """Do nothing: a hook counts no backward passes."""

    def _move_to(self, module: nn.Module) -> None:
        """Tap another module, which has the weight now."""
        for key in [k for k, hook in module._forward_hooks.items() if hook is self]:
            del module._forward_hooks[key]
        if self._sink() is None or held_weight(module, self._name) is not self.weight:
            return
        self.detach()
        self._module = weakref.ref(module)
        self.attach()

    @property
    def __name__(self) -> str:
        """The class's name, but for torch.jit.script, which cannot compile a tap.

        Raises:
            UnsupportedTrainingError: torch.jit.script asks.
        """
        # The first thing that it wants to know of a hook, and no other sign tells that it is there.
        if sys._getframe(1).f_globals.get("__name__", "").startswith("torch.jit"):
            raise UnsupportedTrainingError(_NO_SCRIPT)
        name: str = HookTap.__qualname__
        return name

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None
    ) -> Any:
        """Observe one forward of the module (torch's forward hook); never touches the output.

        Returns:
            None, save in a graph that is being recorded: the output as the graph goes on with it.

        Raises:
            UnsupportedTrainingError: The module multiplies by parts of the weight.
        """
        if type(kwargs) is not dict and not isinstance(kwargs, dict):
            # Somebody put another module in this one's place and took its hooks along, but not
            # how they are called, as torch.ao.quantization.prepare_qat does.
            self._move_to(module)
            kwargs, output = {}, kwargs
        inputs = args[0] if args else kwargs.get("input")
        if torch.compiler.is_dynamo_compiling():
            if self._joins_graph(module):
                return self._in_graph(module, inputs, output)
            return _break_graph(self, module, args, kwargs, output)
        if self._sink() is None:
            self.detach()
            return None
        own, weight = module._parameters, self.weight
        # As nearly always: what the module holds is the weight, and of the kind that it was.
        if self._name not in own or own[self._name] is not weight or type(weight) is not self._kind:
            in_use = self._weight_in_use(module)
            if in_use is None:
                return None
            weight = in_use
        self.observe(inputs, output, weight)
        return None

    def observe(self, inputs: Any, outputs: Any, weight: Tensor | None = None) -> None:
        """Observe one product of ``inputs`` with the weight: reduce H now and D when it passes.

        Adapters whose layers show Z elsewhere than in a forward hook call this themselves.

        Args:
            inputs: H.
            outputs: Z = H W^T + b, before anything changes it in place.
            weight: The tensor that autograd sees as the weight; None is the tapped one.
        """
        weight = self.weight if weight is None else weight
        if not (torch.is_grad_enabled() and weight.requires_grad and is_ordinary(outputs)):
            return
        if not outputs.requires_grad:
            return
        feature_sums, feature_rows = self._reduce_inputs(inputs) if self.features else (None, 0)
        signal = outputs if outputs._base is None else _in_place_safe(outputs, self._trailing)
        signal.register_hook(self._on_errors(weight, feature_sums, feature_rows))

    def _joins_graph(self, module: nn.Module) -> bool:
        """Return whether the graph being recorded can hold this tap. Traced by Dynamo."""
        if self._probe is None or _is_sharded(self.weight):
            return False
        # Hooks of others on the output would see D before it is rescaled instead of after.
        return not self._probe.rescales or len(module._forward_hooks) == 1

    def _in_graph(self, module: nn.Module, inputs: Any, outputs: Any) -> Tensor | None:
        """Return the output shown to the probe, None where nothing counts. Traced by Dynamo."""
        weight = held_weight(module, self._name)
        trained = torch.is_grad_enabled() and self.weight.requires_grad and outputs.requires_grad
        if self._probe is None or weight is not self.weight or not trained:
            return None
        return self._probe.through(outputs, inputs.detach() if self.features else None)

    def _new_probe(self, rescales: bool) -> Probe:
        seen = self.activity
        features = seen.feature_axes if seen.tokens is None else None
        return Probe(self, rescales=rescales, unit_axes=seen.unit_axes, feature_axes=features)

    def serve(self, errors: Tensor, inputs: Tensor | None) -> Tensor | None:
        """Take D and H from a compiled graph's backward; see :class:`ServesGraphs`."""
        if self._sink() is None:
            return None
        return self._on_errors(self.weight, *self._reduce_inputs(inputs))(errors)

    def take(
        self, errors: Tensor, unit_sums: Tensor, inputs: Tensor | None, feature_rows: int
    ) -> None:
        """Take sums from a compiled graph's backward; see :class:`ServesGraphs`.

        Raises:
            UnsupportedTrainingError: The sink rescales D, which the graph does not expect.
        """
        sink, weight = self._sink(), self.weight
        if sink is None or destination(weight, self._accumulator_of(weight)) != "grad":
            return
        if inputs is not None:
            own = self.activity.tokens is None
            inputs, feature_rows = (
                (inputs.clone(), feature_rows) if own else self._reduce_inputs(inputs)
            )
        with span("bookkeeping", [weight]):
            scale, units = _as_tensor(sink.loss_scale(), errors), len(unit_sums)
            if scale is None:
                unit_sums = unit_sums.clone()
            else:
                # Divided out before squaring: what the scale leaves finite may have no square.
                with span("reduce"):
                    unit_sums, _ = axes_square_sum(
                        errors, self.activity.unit_axes, scale, self.backend
                    )
            rows = errors.numel() // units if units else 0
            sums = Sums(unit_sums, rows, inputs, feature_rows)
            with self._lock:
                if rows and sink.rescale(sums) is not None:
                    raise UnsupportedTrainingError(
                        f"the tap of a {type(self._module()).__name__} began to rescale its error "
                        "signal after the model was compiled for one that does not (was variant "
                        'changed in a parameter group?); build the optimizer anew with variant="B"'
                    )
                sink.add(sums)
                self.fired = True

    def _reduce_inputs(self, inputs: Any) -> tuple[Tensor | None, int]:
        if not self.features:
            return None, 0
        if type(inputs) is not Tensor and not isinstance(inputs, Tensor):
            raise TypeError(
                f"the input of a tapped {type(self._module()).__name__} must be its first "
                f"positional argument or named 'input', not {type(inputs).__name__}"
            )
        activity = self.activity
        if not is_observed():
            if activity.tokens is None:
                return axes_square_sum(inputs, activity.feature_axes, None, self.backend)
            return activity.feature_square_sum(inputs, self.backend)
        with span("bookkeeping", [self.weight]), span("reduce"):
            return activity.feature_square_sum(inputs, self.backend)

    def _on_errors(
        self, weight: Tensor, feature_sums: Tensor | None, feature_rows: int
    ) -> Callable[[Tensor], Tensor | None]:
        """Return the hook for D, which keeps H's sums alive but not H."""

        def deliver(errors: Tensor) -> Tensor | None:
            sink = self._sink()
            if sink is None:
                return None
            accumulator = self._accumulator if weight is self.weight else None
            if accumulator is None:
                accumulator = self._accumulator_of(weight)
            if destination(weight, accumulator) != "grad":
                return None
            features = feature_sums, feature_rows
            if not is_observed():
                factors = self._take(sink, self._reduced(sink, errors), features)
            else:
                with span("bookkeeping", [self.weight]):
                    with span("reduce"):
                        units = self._reduced(sink, errors)
                    factors = self._take(sink, units, features)
            if factors is None:
                return None
            with span("scale", [self.weight]):
                return self.activity.scale_units(errors, factors)

        return deliver

    def _reduced(self, sink: Sink, errors: Tensor) -> tuple[Tensor, int]:
        """Return the sums of squares of D and its rows."""
        scale = sink.loss_scale()
        if scale is not None:
            scale = _as_tensor(scale, errors)
        return axes_square_sum(errors, self.activity.unit_axes, scale, self.backend)

    def _take(
        self, sink: Sink, units: tuple[Tensor, int], features: tuple[Tensor | None, int]
    ) -> Tensor | None:
        """Deliver sums; return what D is multiplied by, if it is."""
        sums = Sums(*units, *features)
        with self._lock:
            factors = sink.rescale(sums) if sums.rows else None
            sink.add(sums)
            self.fired = True
        return factors

    def _accumulator_of(self, weight: Tensor) -> Any:
        """Return the node that accumulates the tapped weight's gradient; finding it takes long."""
        if weight is not self.weight:
            return None
        if self._accumulator is None and weight.is_leaf and weight.requires_grad:
            self._accumulator = get_gradient_edge(weight).node
        return self._accumulator

    def _weight_in_use(self, module: nn.Module) -> Tensor | None:
        """Return what the module multiplies with if its gradient is the tapped weight's."""
        current: Tensor | None = module._parameters.get(self._name)
        if current is None:
            current = self._moved_weight(module)
        if current is self.weight:
            if _is_sharded(current):
                raise UnsupportedTrainingError(_PARALLEL)
            return current
        # FSDP2 lends the module an unsharded parameter for the length of a forward.
        return current if _is_sharded(self.weight) and type(current) is nn.Parameter else None

    def _moved_weight(self, module: nn.Module) -> Tensor | None:
        """Return the weight of a module that was changed, and note what has become of it."""
        moved = held_weight(module, self._name)
        if moved is None:
            self.changed = "no longer holds the weight that its optimizer has"
        elif is_remade(module, self._name):
            self.changed = "was parametrized"
        return moved

    def __deepcopy__(self, memo: dict[int, Any]) -> InertTap:
        return InertTap()

    def __reduce__(self) -> tuple[type[InertTap], tuple[()]]:
        return InertTap, ()


@torch.compiler.disable(reason=_BREAKS)  # type: ignore[untyped-decorator]
def _break_graph(
    tap: HookTap,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
) -> None:
    # Only under torch.compile: the wrapper costs something in every call.
    tap(module, args, kwargs, output)


def _never_compile_alone(function: Any) -> None:
    """Have Dynamo take a function into graphs of its callers, but make no graph of it by itself.

    Behind a graph break it would compile the hook of each layer anew, up to its limit.
    """
    frames = torch._C._dynamo.eval_frame
    # Private to torch, and not in all its releases; without it only compilation takes longer.
    if action := getattr(frames, "_FrameAction", None):
        strategy = frames._FrameExecStrategy(action.SKIP, action.SKIP)
        frames.set_code_exec_strategy(function.__code__, strategy)


_never_compile_alone(HookTap.__call__)


def removed_taps(taps: Iterable[Any]) -> list[HookTap]:
    """Return those that somebody else has taken off their modules, without a call for each."""
    return [
        tap
        for tap in taps
        if tap is not None
        and tap.leaves_gradient
        and (handle := tap._handle) is not None
        and (module := tap._module()) is not None
        and (handle.id not in module._forward_hooks or module._forward_hooks[handle.id] is not tap)
    ]


def forget_compiled_graphs() -> None:
    """Make torch.compile trace anew: graphs recorded before a hook was attached ignore the hook.

    Call it once after attaching the taps of a model. It does nothing where torch.compile was not
    used.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


_TAPPED: torch.utils.weak.WeakTensorKeyDictionary = torch.utils.weak.WeakTensorKeyDictionary()


def _refuse_tied(module: nn.Module, weight: Tensor) -> None:
    owner = _TAPPED[weight]() if weight in _TAPPED else None
    if owner is None or owner is module:
        return
    hooks = owner._forward_hooks.values()
    if any(isinstance(hook, HookTap) and hook.weight is weight for hook in hooks):
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} is tied: it is tapped in a "
            f"{type(owner).__name__} and a {type(module).__name__}; "
            "leave tied weights to the fallback"
        )


def _own_name(module: nn.Module, weight: Tensor) -> str:
    for name, parameter in module._parameters.items():
        if parameter is weight:
            # A pruned layer's weight is followed back to where it comes from.
            base = name.removesuffix("_orig")
            return name if base in module._parameters else base
    raise ValueError(
        f"weight of shape {tuple(weight.shape)} is not a parameter of this {type(module).__name__} "
        "itself; pass module.weight, and leave parametrized weights to the fallback"
    )


def _is_sharded(weight: Tensor) -> bool:
    # Looked up, not imported: slow to load, and no such tensor exists before it is.
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(weight, distributed.DTensor)


def _in_place_safe(outputs: Tensor, trailing: int) -> Tensor:
    """Return the tensor whose hook still sees D when ``outputs`` is changed in place later.

    A Linear on tokens and unbatched calls return a view. An in-place activation rewrites a view's
    history, which drops hooks of the view, but keeps those of its base. The base serves if it holds
    the same numbers with the same ``trailing`` axes, so that only axes of rows differ.
    """
    base = outputs._base
    if base is None or base.grad_fn is None or base.numel() != outputs.numel():
        return outputs
    axes = range(-trailing, 0)
    if base.ndim < trailing or any(base.shape[a] != outputs.shape[a] for a in axes):
        return outputs
    moved = any(base.stride(a) != outputs.stride(a) and base.shape[a] > 1 for a in axes)
    return outputs if moved else base


def _as_tensor(scale: Tensor | float | None, like: Tensor) -> Tensor | None:
    if scale is None or isinstance(scale, Tensor):
        return scale
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.tensor(scale, dtype=dtype, device=like.device)
