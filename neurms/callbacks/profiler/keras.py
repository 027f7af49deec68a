"""The profiler for Keras models on the torch backend."""

from __future__ import annotations

import statistics
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import torch
from torch import Tensor

from neurms.callbacks.profiler.callback import ProfilesTraining
from neurms.callbacks.profiler.clock import Shares, Stopwatch
from neurms.callbacks.profiler.optimizer_view import OptimizerView
from neurms.callbacks.profiler.samples import FORECAST
from neurms.callbacks.profiler.sampling import Sampler
from neurms.callbacks.profiler.schedule import Schedule
from neurms.callbacks.profiler.subjects import Subject, chosen_subjects
from neurms.callbacks.profiler.window import OPTIMIZER, shared_out
from neurms.core.optimizers.plan import tensor_bytes
from neurms.core.taps.signals import ShowsSignals, SignalSink
from neurms.integrations.keras.forecast import memory_forecast
from neurms.integrations.keras.layout import kernel_activity, kernel_layout
from neurms.integrations.keras.optimizer import NeurmsOptimizer
from neurms.integrations.keras.owners import innermost
from neurms.integrations.keras.routing import parameter_of
from neurms.integrations.keras.taps import ActivationTap
from neurms.integrations.keras.training import loss_scale_of
from neurms.report.curves import TRAIN_LOSS
from neurms.report.scalars import MEANS, layer_scalars

__all__ = ["PreconditionerProfiler"]


class PreconditionerProfiler(ProfilesTraining, keras.callbacks.Callback):
    """Shows what each layer pays for its preconditioner, and whether the factorisation holds.

    Every ``every_n_steps`` batches of ``fit`` one is looked at; see
    :class:`~neurms.callbacks.profiler.engine.Profiler` for what is measured. The mean rho and the
    share of overhead enter the logs of those batches and of the epochs, where the progress bar,
    CSVLogger and TensorBoard find them, and each layer's, as ``neurms/<layer>/rho`` and
    ``neurms/<layer>/overhead``, the History that ``fit`` returns. When training ends a table is
    printed and, with ``output``, ``report.html`` written: a recommendation, curves, plots, layers.
    The losses and metrics of ``fit`` are in its curves. It works with every optimizer, this
    library's or Keras's own.

    A layer's forward and backward hold its activation, which is part of a Keras layer's call. For
    convolutions the factorisation's error is not measured, everything else is. With gradient
    accumulation a step is one batch.

    Args:
        every_n_steps: Distance between two batches that are looked at.
        warmup_steps: Batches before the first of them.
        layers: Name patterns of the layers to profile; None takes all.
        beta: Decay of the averages of v and u for each step, where the optimizer keeps none.
        output: Folder for the run file that ``neurms report`` reads, and for ``report.html`` at the
            end; None writes none. A fit that goes on, with an optimizer that has taken steps
            before, appends to the run there; another one gets a folder of its own, ``output-2``.
        overwrite: Whether a new run replaces the one in ``output`` instead.
        max_elements: Entries of a kernel beyond which a part of its units is looked at.
        log: Called with all numbers of a batch that was looked at, ``neurms/<layer>/<what>``; None
            leaves it at the logs and the History.
        print_table: Whether a table is printed when training ends.

    Raises:
        ValueError: A setting is out of its range.

    Example:
        >>> import numpy
        >>> model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2, "relu")])
        >>> model.compile(optimizer="adam", loss="mse")
        >>> profiler = PreconditionerProfiler(every_n_steps=1, warmup_steps=0, print_table=False)
        >>> x, y = numpy.ones((8, 3)), numpy.ones((8, 2))
        >>> history = model.fit(x, y, batch_size=4, verbose=0, callbacks=[profiler])
        >>> [(row.layer.partition("_")[0], row.shape, row.rows) for row in profiler.report()]
        [('dense', (3, 2), 4)]
    """

    profiler: _KerasProfiler | None

    def __init__(
        self,
        every_n_steps: int = 50,
        warmup_steps: int = 10,
        layers: Sequence[str] | None = None,
        beta: float = 0.99,
        output: str | Path | None = None,
        overwrite: bool = False,
        max_elements: int = 2**22,
        log: Callable[[dict[str, float]], object] | None = None,
        print_table: bool = True,
    ) -> None:
        given = dict(locals())
        keras.callbacks.Callback.__init__(self)
        super().__init__("call model.fit", given)
        self.log = log
        self._loss = _BatchLoss()

    def on_train_begin(self, logs: Any = None) -> None:
        """Take the hooks of a fit that ended badly off; Keras has no callback for errors."""
        self._stop()
        self.profiler, self._logged = None, 0
        self._loss = _BatchLoss()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Find the loss that Keras keeps."""
        self._loss.begin_epoch(self.model)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Begin with the first batch, when layers and optimizer are built; look when it is due."""
        if self.profiler is None:
            rest = {} if _is_first_rank() else {"output": None}
            self.profiler = _KerasProfiler(self.model, **self.settings | rest)
        self.profiler.begin_batch()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """End the batch, keep its loss, and log it if it was looked at."""
        if self.profiler is None:
            return
        before = len(self.profiler.samples)
        self.profiler.keep(TRAIN_LOSS, self._loss.of_batch())
        self.profiler.end_step()
        if len(self.profiler.samples) > before:
            found = layer_scalars(self.profiler.samples[-1])
            if logs is not None:
                logs.update({k: found[k] for k in sorted(MEANS & found.keys())})
            if self.log is not None:
                self.log(found)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Keep the epoch's metrics, and log the means over its batches that were looked at."""
        if logs is None:
            return
        # A training's own loss is kept batch by batch, if Keras shows it.
        own = {} if self._loss.seen else {TRAIN_LOSS: logs.get("loss")}
        self._keep(own | {name: value for name, value in logs.items() if name != "loss"})
        found = self._new_scalars()
        names = {k for scalars in found for k in scalars if k.endswith(("/rho", "/overhead"))}
        means = {k: statistics.fmean(s[k] for s in found if k in s) for k in sorted(names)}
        logs.update({k: v for k, v in means.items() if k in MEANS})
        # Not into the logs, all of which a progress bar shows.
        history: dict[str, list[float]] = getattr(self.model.history, "history", {})
        for name in sorted(means.keys() - MEANS):
            history.setdefault(name, []).append(means[name])

    def on_train_end(self, logs: Any = None) -> None:
        """Close the run, print the table and say where the report is."""
        self._finish(speaks=_is_first_rank())


class _BatchLoss:
    """The loss of single batches, out of Keras's running mean of an epoch's."""

    def __init__(self) -> None:
        self.seen = False
        self._tracker: Any = None
        self._before = 0.0, 0.0

    def begin_epoch(self, model: Any) -> None:
        """Find the running mean, which has just been reset."""
        found = next((m for m in model.metrics if m.name == "loss"), None)
        self._tracker = found if isinstance(found, keras.metrics.Mean) else None
        self._before = 0.0, 0.0

    def of_batch(self) -> float | None:
        """Return the loss of the batch that has ended, or None for a model that keeps none."""
        if self._tracker is None:
            return None
        total, rows = (float(parameter_of(v)) for v in (self._tracker.total, self._tracker.count))
        (total_before, rows_before), self._before = self._before, (total, rows)
        if rows == rows_before:
            # A train_step of the user's own that does not tell.
            return None
        self.seen = True
        return (total - total_before) / (rows - rows_before)


def _is_first_rank() -> bool:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not ready or torch.distributed.get_rank() == 0


class _KerasProfiler(Sampler):
    """The sampler, driven by a callback: a step is a batch."""

    def __init__(self, model: Any, **settings: Any) -> None:
        schedule = Schedule(settings.pop("every_n_steps"), settings.pop("warmup_steps"))
        subjects = chosen_subjects(_subjects(model), settings.pop("layers"), type(model).__name__)
        # The engine of our own exists from the first batch on; taps must not wait for it.
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        scale = weakref.proxy(model.optimizer)
        self._keras_optimizer = model.optimizer
        # Batches of the fits before: a loaded model goes on where it was saved.
        steps = int(model.optimizer.iterations)
        steps *= getattr(model.optimizer, "gradient_accumulation_steps", None) or 1
        super().__init__(
            model,
            subjects,
            _view(model, subjects),
            schedule,
            settings.pop("output"),
            first_step=steps,
            loss_reduction="mean",
            loss_scale=lambda: loss_scale_of(scale),
            **settings,
        )
        schedule.start(steps)

    def begin_batch(self) -> None:
        """Look at this batch if it is due."""
        self.begin_step()
        if self._window is not None:
            self._time_apply(self._window.stopwatch)

    def _time_apply(self, stopwatch: Stopwatch) -> None:
        optimizer = self._keras_optimizer
        # Our own optimizers tell what they do for which layer themselves.
        shares: Shares = {OPTIMIZER: 1.0}
        if not self.view.optimizers:
            variables = [parameter_of(v) for v in self.model.trainable_variables]
            shares = shared_out(variables, self._owners)
        original = optimizer.apply

        def apply(*arguments: Any, **named: Any) -> Any:
            with stopwatch.span("step", shares):
                return original(*arguments, **named)

        # Not setattr, which would have Keras track what is only lent.
        vars(optimizer)["apply"] = apply

    def _stop_looking(self) -> None:
        vars(self._keras_optimizer).pop("apply", None)
        super()._stop_looking()

    def _memory(self) -> dict[str, int]:
        return memory_forecast(self.model.trainable_variables, self._keras_optimizer, FORECAST)


@dataclass(frozen=True, eq=False)
class _KerasSubject(Subject):
    def tap(self, sink: SignalSink) -> ShowsSignals:
        return _ActivationSignalTap(self, sink)


class _ActivationSignalTap(ShowsSignals, ActivationTap):
    """Shows D and H of a Keras layer, whose Z passes where it is activated."""

    def __init__(self, subject: Subject, sink: SignalSink) -> None:
        ActivationTap.__init__(self, subject.module, subject.weight, sink, features=True)


def _subjects(model: Any) -> list[Subject]:
    found: dict[int, Subject] = {}
    for layer in model._flatten_layers(include_self=True):
        kernel = getattr(layer, "_kernel", getattr(layer, "kernel", None))
        if not isinstance(kernel, keras.Variable) or not kernel.trainable:
            continue
        if getattr(layer, "lora_enabled", False) or not hasattr(layer, "activation"):
            continue
        layout, activity = kernel_layout(layer, kernel), kernel_activity(layer)
        if layout is None or activity is None:
            continue
        own = (v for v in layer._trainable_variables if v is not kernel)
        biases = tuple(parameter_of(v) for v in own)
        subject = _KerasSubject(layer.name, layer, parameter_of(kernel), biases, layout, activity)
        found.setdefault(id(kernel), subject)
    names = [subject.name for subject in found.values()]
    if len(set(names)) == len(names):
        return list(found.values())
    # Layers of nested models may share their names; their paths differ.
    return [_renamed(subject) for subject in found.values()]


def _renamed(subject: Subject) -> Subject:
    layer: Any = subject.module
    return _KerasSubject(
        layer.path, layer, subject.weight, subject.biases, subject.layout, subject.activity
    )


def _view(model: Any, subjects: Sequence[Subject]) -> OptimizerView:
    optimizer = innermost(model.optimizer)
    if isinstance(optimizer, NeurmsOptimizer):
        return _OurView(optimizer)
    return _ForeignView(optimizer, model)


class _OurView(OptimizerView):
    """The torch engine inside one of this library's Keras optimizers."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__([optimizer.engine.optimizer])
        self._keras = optimizer

    @property
    def name(self) -> str:
        """Class name of the Keras optimizer."""
        return type(self._keras).__name__


class _ForeignView(OptimizerView):
    """One of Keras's own optimizers: lists of variables, one entry for each trainable variable."""

    def __init__(self, optimizer: Any, model: Any) -> None:
        super().__init__([])
        self._keras = optimizer
        variables = model.trainable_variables
        self._index = {parameter_of(v): i for i, v in enumerate(variables)}
        self._count = len(variables)

    @property
    def name(self) -> str:
        """Class name of the optimizer."""
        return type(self._keras).__name__

    def rule_of(self, parameter: Tensor) -> str:
        """Return the optimizer's name: it has one rule."""
        return self.name

    def state_of(self, parameter: Tensor) -> Mapping[str, Any]:
        """Return the entries of the optimizer's lists that belong to a parameter."""
        index = self._index.get(parameter)
        found: dict[str, Tensor] = {}
        for name, value in vars(self._keras).items():
            if index is None or name.startswith("_trainable") or not isinstance(value, list):
                continue
            if len(value) == self._count and isinstance(value[index], keras.Variable):
                found[_TORCH_NAMES.get(name, name)] = parameter_of(value[index]).detach()
        return found

    def predicted_bytes(self, parameters: Any) -> int | None:
        """Return None: there is no forecast for other libraries' optimizers."""
        return None

    def total_bytes(self) -> int:
        """Return the bytes of all that the optimizer keeps."""
        with torch.no_grad():
            return sum(tensor_bytes(parameter_of(v)) for v in self._keras.variables)


_TORCH_NAMES = {"momentums": "momentum", "_momentums": "momentum"}
