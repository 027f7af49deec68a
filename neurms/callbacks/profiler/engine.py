"""The profiler's engine: which steps are looked at, and what is put together for each of them."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neurms.callbacks.profiler.clock import OWN, Clock, Shares, Stopwatch
from neurms.callbacks.profiler.optimizer_view import OptimizerView
from neurms.callbacks.profiler.probe import LayerProbe, Values
from neurms.callbacks.profiler.process import process_memory
from neurms.callbacks.profiler.report import ProfilerReport
from neurms.callbacks.profiler.runs import Run, RunWriter
from neurms.callbacks.profiler.subjects import Subject, subjects_of
from neurms.core.diagnostics.spans import SpanKind, observed_by
from neurms.core.errors import check_choice, check_fraction, check_positive_int
from neurms.core.taps.hooks import forget_compiled_graphs
from neurms.core.unitwise.statistics import LossReduction, synchronize, world_size
from neurms.core.unitwise.tapped import TappedLayer

__all__ = ["Profiler", "profile"]

_FORECAST = ("neurms", "rmnp", "racs", "alice", "shared_basis", "muon", "soap", "adamw")
_SPANS = ("forward", "backward", "reduce", "scale", "update")


class Profiler:
    """Measures, at some steps of a training, what each layer costs and whether its statistics hold.

    A step is looked at from the end of the optimizer step before it to its own end: all
    micro-batches are in it. Hooks are in place during those steps only, so that the others cost
    nothing; what a looked-at step does cost is measured too (``profiler_ms``). Numbers are read,
    never written: weights come out bit for bit as without the profiler.

    Statistics are those of every ``every_n_steps``-th step, times those of the step before it: what
    gathers statistics empties the processor's caches, which would show. With ``every_n_steps=1``
    both come from the same steps, and times are up to half as long again.

    Times are exclusive: a layer's ``backward_us`` does not hold the ``reduce_us`` within it. On an
    accelerator they come from events on its stream. ``gemm_us`` is D^T H, run once more by itself,
    because autograd computes it in one node with D W. For an optimizer of another library
    ``update_us`` is the whole step's time shared out by number of elements.

    On several ranks every one of them must profile; statistics are summed over all of them.

    Args:
        model: The model.
        optimizer: Its optimizer, or several; a step ends with the step of the first.
        every_n_steps: Distance between two steps that are looked at.
        warmup_steps: Steps before the first of them.
        layers: Name patterns of the layers to profile; None takes all.
        beta: Decay of the averages of v and u for each step, where the optimizer keeps none.
        loss_reduction: Whether the loss is a ``"mean"`` or a ``"sum"`` over rows.
        loss_scale: Callable that returns a GradScaler's current scale, or None.
        output: Folder for the run file, which grows as training goes on; None keeps all in memory.
        max_elements: Entries of a weight beyond which E[d^2 h^2] is formed for a part of its units.
        preconditioner: The
            :class:`~neurms.core.unitwise.preconditioner.GradientPreconditioner` beside a foreign
            optimizer.

    Raises:
        ValueError: A setting is out of its range, or a pattern matches no layer.
        TypeError: ``model`` or ``optimizer`` is of another type.
        ImportError: psutil is not installed.
        OSError: ``output`` cannot be written.

    Reference:
        NeuRMS draft, section 8.1(2): rho across layers and epochs, overhead split by kind of work.

    Example:
        >>> import torch, neurms
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)
        ... )
        >>> optimizer = neurms.NeuRMS(model, variant="F")
        >>> with Profiler(model, optimizer, every_n_steps=2, warmup_steps=1) as profiler:
        ...     for _ in range(6):
        ...         model(torch.randn(16, 8)).square().mean().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> report = profiler.report()
        >>> [(row.layer, row.shape, row.rows) for row in report]
        [('0', (4, 8), 16), ('2', (2, 4), 16)]
        >>> report.steps
        [1, 3, 5]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        every_n_steps: int = 50,
        warmup_steps: int = 10,
        layers: Sequence[str] | None = None,
        beta: float = 0.99,
        loss_reduction: LossReduction = "mean",
        loss_scale: Callable[[], Tensor | float | None] | None = None,
        output: str | Path | None = None,
        max_elements: int = 2**22,
        preconditioner: Iterable[TappedLayer] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={type(model).__name__} must be an nn.Module, which has layers")
        self.every_n_steps = check_positive_int("every_n_steps", every_n_steps)
        self.warmup_steps = check_positive_int("warmup_steps", warmup_steps, low=0)
        check_positive_int("max_elements", max_elements)
        check_fraction("beta", beta)
        check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        if not optimizers or not all(isinstance(o, Optimizer) for o in optimizers):
            raise TypeError(f"optimizer={optimizer!r} must be a torch optimizer or several of them")
        self._begin_with(
            model,
            subjects_of(model, layers),
            OptimizerView(optimizers, preconditioner),
            beta=beta,
            loss_reduction=loss_reduction,
            loss_scale=loss_scale or (lambda: None),
            max_elements=max_elements,
        )
        self._writer = RunWriter.opened(output, self._header()) if output is not None else None

    def _begin_with(
        self, model: nn.Module, subjects: Sequence[Subject], view: OptimizerView, **settings: Any
    ) -> None:
        self.model = model
        self.view = view
        self.device = subjects[0].weight.device
        process_memory(self.device)
        self.probes = [LayerProbe(subject, **settings) for subject in subjects]
        self.samples: list[Values] = []
        self.step = 0
        self._owners = {
            p: probe.subject.name for probe in self.probes for p in probe.subject.parameters
        }
        self._static: dict[str, Values] = {}
        self._handles: list[Any] = []
        self._stopwatch: Stopwatch | None = None
        self._observing = ExitStack()
        self._measured: dict[str, Values] | None = None
        self._norms: dict[str, float | None] = {}
        self._plain: deque[float] = deque(maxlen=1000)
        self._since = 0.0
        self._due_at = self._wake_at = 0
        self._timing = False
        self._ahead: tuple[dict[tuple[str, Any], float], float] | None = None
        self._open: Any = None
        self._preparing = 0.0
        self._stay = False
        self._finished = False
        self._forecast: dict[str, int] | None = None

    # ---------------------------------------------------------------- begin and end

    def attach(self) -> Self:
        """Begin to count steps, and look at the next one if it is due; again does nothing."""
        if self._handles:
            return self
        for optimizer in self.view.optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        # Compiled code keeps the hooks that it was traced with, so there they stay.
        self._stay = _is_compiled(self.model)
        if self._stay:
            self._hook()
            forget_compiled_graphs()
        self._due_at = self._due_after(self.step)
        self._wake_at = self._due_at - (self.every_n_steps > 1 and self.step < self._due_at)
        self._next()
        return self

    def detach(self) -> None:
        """Look no more: take every hook off and close the run file. A step under way is dropped."""
        self._stop_looking()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for probe in self.probes:
            probe.detach()
        if self._writer is not None and not self._finished:
            self._finished = True
            self._writer.close(self._totals())

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def report(self) -> ProfilerReport:
        """Return what was found so far: rows, tables, files, advice."""
        return ProfilerReport(Run(self._header(), list(self.samples), self._totals()))

    @property
    def looking(self) -> bool:
        """Whether the current step is looked at."""
        return self._stopwatch is not None

    @property
    def timing(self) -> bool:
        """Whether the current step is looked at for its times alone."""
        return self.looking and self._timing

    def _hook(self) -> None:
        for probe in self.probes:
            probe.attach()

    # ---------------------------------------------------------------- one step

    def _due_after(self, step: int) -> int:
        """Return the first step from ``step`` on that is to be looked at."""
        rounds = math.ceil(max(step - self.warmup_steps, 0) / self.every_n_steps)
        return self.warmup_steps + rounds * self.every_n_steps

    def _next(self) -> None:
        """Begin the step that comes now."""
        begun = time.perf_counter()
        if self.step >= self._due_at:
            self._due_at = self._due_after(self.step + 1)
            self._start_looking(statistics=True)
        elif self.step == self._wake_at:
            self._start_looking(statistics=False)
        # Statistics empty the caches, so that times are taken in the step before, if there is one.
        ahead = self.every_n_steps > 1 and self.step + 1 < self._due_at
        self._wake_at = self._due_at - ahead
        self._since = time.perf_counter()
        self._preparing = self._since - begun

    def _start_looking(self, *, statistics: bool) -> None:
        self._stopwatch = Stopwatch(Clock(self.device))
        self._measured = None if statistics else {}
        self._timing = not statistics
        in_backward = any(
            layer is not None and layer.updated_in_backward
            for layer in (self.view.tapped(p.subject.weight) for p in self.probes)
        )
        for probe in self.probes:
            probe.keep_gradient = in_backward
            probe.begin(self._stopwatch, statistics=statistics)
        self._hook()
        self._norms = {
            p.subject.name: self.view.limiter_norm(p.subject.weight) for p in self.probes
        }
        self._observing.enter_context(observed_by(self))
        for optimizer in self.view.optimizers:
            handle = optimizer.register_step_pre_hook(self._before_step)
            self._observing.callback(handle.remove)

    def _stop_looking(self) -> None:
        self._observing.close()
        self._stopwatch = None
        for probe in self.probes:
            probe.end()
            if not self._stay:
                probe.detach()

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Open the step's span; with a closure, everything happens inside the step."""
        if self._stopwatch is None:
            return None
        positional = len(args) > 1 and callable(args[1])
        closure = args[1] if positional else kwargs.get("closure")
        if closure is None:
            self.gradients_ready()
        self._open = self._stopwatch.begin("step", self._step_shares(optimizer))
        if closure is None:
            return None
        stopwatch = self._stopwatch

        def timed(*values: Any, **named: Any) -> Any:
            with stopwatch.span("closure", {None: 1.0}):
                result = closure(*values, **named)
            self.gradients_ready()
            return result

        if positional:
            return (args[0], timed, *args[2:]), kwargs
        return args, {**kwargs, "closure": timed}

    def _after_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._stopwatch is not None:
            self._stopwatch.end(self._open)
        if optimizer is not self.view.optimizers[0]:
            return
        # All that a step costs that is not looked at.
        if self._stopwatch is None and self.step + 1 < self._wake_at:
            now = time.perf_counter()
            self._plain.append(now - self._since)
            self.step += 1
            self._since = now
            return
        self.end_step()

    def end_step(self) -> None:
        """Count a step that has ended and begin the next; torch optimizers call it by a hook."""
        spent = time.perf_counter() - self._since
        if self._stopwatch is not None:
            self._finish(spent * 1e3)
        else:
            self._plain.append(spent)
        self.step += 1
        self._next()

    def _step_shares(self, optimizer: Optimizer) -> Shares:
        """Return whom a foreign optimizer's step is charged to; our own tell by themselves."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if parameters and self.view.is_ours(parameters[0]):
            return {None: 1.0}
        return self._shares([p for p in parameters if p.grad is not None] or parameters)

    def _shares(self, parameters: Sequence[Tensor]) -> Shares:
        total = sum(p.numel() for p in parameters) or 1
        shares: dict[Any, float] = {}
        for parameter in parameters:
            name = self._owners.get(parameter)
            shares[name] = shares.get(name, 0.0) + parameter.numel() / total
        return shares

    # ---------------------------------------------------------------- what core tells

    def span(
        self, kind: SpanKind, parameters: Sequence[Tensor] | None
    ) -> AbstractContextManager[None]:
        """Time a piece of an optimizer's work (an ``Observer`` of spans)."""
        stopwatch = self._stopwatch
        if stopwatch is None:
            return nullcontext()
        shares = stopwatch.innermost if parameters is None else self._shares(parameters)
        label = next(iter(shares), None)
        return stopwatch.span(kind, shares, "" if label is None else str(label))

    def gradients_ready(self) -> None:
        """Measure what needs the gradients, before anything is done to them; once for each step."""
        if self._stopwatch is None or self._measured is not None:
            return
        with self._stopwatch.own(), torch.no_grad():
            self._synchronize()
            self._measured = {}
            for probe in self.probes:
                own = self.view.foreseen_moments(probe.subject.weight, probe.pending)
                self._measured[probe.subject.name] = probe.measured(self.step, own)

    def _synchronize(self) -> None:
        ranks = world_size()
        if ranks == 1:
            return
        layouts = [probe.subject.layout for probe in self.probes]
        sizes = [(layout.units, layout.features) for layout in layouts]
        reduction = self.probes[0].loss_reduction
        weight = self.probes[0].subject.weight
        synchronize([p.pending for p in self.probes], sizes, reduction, weight)
        for probe in self.probes:
            self._add_products(probe, ranks)

    def _add_products(self, probe: LayerProbe, ranks: int) -> None:
        # A rank whose batch left the layer out must still take part.
        held = torch.tensor(float(probe.products is not None), device=self.device)
        torch.distributed.all_reduce(held)
        if not float(held):
            return
        if probe.products is None:
            probe.products = probe.empty_products()
        torch.distributed.all_reduce(probe.products)
        if probe.loss_reduction == "mean":
            probe.products /= float(ranks * ranks)

    # ---------------------------------------------------------------- putting together

    def _finish(self, spent: float) -> None:
        assert self._stopwatch is not None
        begun = time.perf_counter()
        self.gradients_ready()
        totals = self._stopwatch.totals()
        own = totals.get((OWN, None), 0.0) / 1e3 + self._preparing * 1e3
        if self._timing:
            self._stop_looking()
            self._ahead = totals, own + (time.perf_counter() - begun) * 1e3
            return
        # Times of the step before, which no statistics disturbed, or else this step's own.
        totals, before = self._ahead or (totals, 0.0)
        self._ahead = None
        layers = {p.subject.name: self._layer(p, totals) for p in self.probes}
        batch = next((p.timer.batch for p in self.probes if p.timer.batch), 0)
        # Within the step and after it: what not looking would have saved.
        own += before + (time.perf_counter() - begun) * 1e3
        sample: Values = {"step": self.step, "layers": layers, "batch": batch}
        sample |= {"step_ms": spent, "profiler_ms": own, **process_memory(self.device)}
        sample["state_bytes"] = self.view.total_bytes()
        self._stop_looking()
        self.samples.append(sample)
        if self._writer is not None:
            self._describe()
            self._writer.add(sample, self._header())

    def _layer(self, probe: LayerProbe, totals: dict[tuple[str, Any], float]) -> Values:
        name, subject = probe.subject.name, probe.subject
        values: Values = {f"{kind}_us": totals.get((kind, name), 0.0) for kind in _SPANS}
        # A foreign optimizer's step has no parts.
        values["update_us"] += totals.get(("step", name), 0.0)
        values["gemm_us"] = probe.gemm_us()
        values |= (self._measured or {}).get(name, {})
        gradient = subject.weight.grad if probe.gradient is None else probe.gradient
        found = self.view.dominance(subject, gradient)
        if found is not None:
            values["dominance"], values["dominance_of"] = list(found[0]), found[1]
        values["clipped_units"] = self.view.clipped_units(subject.weight)
        values["subspace_energy"] = self.view.kept_energy(subject, gradient)
        values["limiter_hit"] = self.view.limiter_hit(subject.weight, self._norms.get(name))
        values["state_bytes"] = self.view.state_bytes(subject.parameters)
        return values

    def _describe(self) -> None:
        for probe in self.probes:
            subject, layout = probe.subject, probe.subject.layout
            self._static[subject.name] = {
                "kind": subject.kind,
                "shape": list(subject.weight.shape),
                "units": layout.units,
                "features": layout.features,
                "matrix_shape": list(layout.matrix_shape),
                "taps": layout.taps,
                "rule": self.view.rule_of(subject.weight),
                "variant": self.view.variant_of(subject.weight),
                "predicted_state_bytes": self.view.predicted_bytes(subject.parameters),
            }

    def _header(self) -> Values:
        if not self._static or self.samples:
            self._describe()
        return {
            "model": type(self.model).__name__,
            "optimizer": self.view.name,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "ranks": world_size(),
            "torch": torch.__version__,
            "every_n_steps": self.every_n_steps,
            "warmup_steps": self.warmup_steps,
            "layers": self._static,
        }

    def _totals(self) -> Values:
        plain = statistics.median(self._plain) * 1e3 if self._plain else None
        return {"steps": self.step, "step_ms": plain, "memory": self._memory()}

    def _memory(self) -> dict[str, int]:
        """Return the state bytes that other optimizers would take for this model."""
        from neurms.core.optimizers.memory import memory_report

        if self._forecast is None:
            self._forecast = {}
            for name in _FORECAST:
                # A rule that has nothing to do in this model has no forecast.
                with suppress(TypeError, ValueError):
                    self._forecast[name] = memory_report(self.model, name).state_bytes
        return self._forecast


def _is_compiled(model: nn.Module) -> bool:
    return any(
        getattr(m, "_compiled_call_impl", None) is not None or type(m).__name__ == "OptimizedModule"
        for m in model.modules()
    )


def profile(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], **settings: Any
) -> Profiler:
    """Profile a plain training loop: ``with neurms.profile(model, optimizer) as profiler:``.

    Args:
        model: The model.
        optimizer: Its optimizer, this library's or another's, or several.
        **settings: As for :class:`Profiler`: ``every_n_steps``, ``warmup_steps``, ``layers``,
            ``beta``, ``loss_reduction``, ``loss_scale``, ``output``, ``max_elements``.

    Returns:
        A context manager; ``profiler.report()`` works inside and after it.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with profile(model, optimizer, every_n_steps=1, warmup_steps=0) as profiler:
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(torch.randn(8, 4)).square().mean().backward()
        ...         optimizer.step()
        >>> print([row.layer for row in profiler.report()])
        ['Linear']
    """
    return Profiler(model, optimizer, **settings)
