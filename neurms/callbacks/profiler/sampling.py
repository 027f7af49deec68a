"""Looking at steps when they are due, and keeping what was found."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from neurms.callbacks.profiler.clock import OWN, span_cost
from neurms.callbacks.profiler.logged import LoggedValues
from neurms.callbacks.profiler.optimizer_view import OptimizerView
from neurms.callbacks.profiler.probe import LayerProbe, Values
from neurms.callbacks.profiler.process import process_memory
from neurms.callbacks.profiler.ranks import sum_over_ranks
from neurms.callbacks.profiler.samples import (
    descriptions,
    environment,
    layer_values,
    memory_forecast,
)
from neurms.callbacks.profiler.schedule import Look, Schedule
from neurms.callbacks.profiler.subjects import Subject
from neurms.callbacks.profiler.window import OPTIMIZER, Window
from neurms.core.ground.spans import observed_by
from neurms.report.report import ProfilerReport
from neurms.report.runs import Run, logged_on
from neurms.report.writer import RunWriter

__all__ = ["Sampler"]


class Sampler:
    """A profiler without the framework: whoever drives it says where steps begin and end.

    Args:
        model: The model.
        subjects: The layers to look at.
        view: The optimizers.
        schedule: Which steps are looked at.
        output: Folder for the run file and its page, or None.
        overwrite: Whether a new run replaces the one in ``output``.
        first_step: Number of the first step; not 0 where a training is resumed.
        **settings: Those of :class:`~neurms.callbacks.profiler.probe.LayerProbe`.

    Raises:
        OSError: ``output`` cannot be written.
    """

    def __init__(
        self,
        model: Any,
        subjects: Sequence[Subject],
        view: OptimizerView,
        schedule: Schedule,
        output: str | Path | None,
        *,
        overwrite: bool = False,
        first_step: int = 0,
        **settings: Any,
    ) -> None:
        self.model = model
        self.view = view
        self.schedule = schedule
        self.device = subjects[0].weight.device
        # What these need and cost the first time must not fall into a training's step.
        process_memory(self.device)
        span_cost(self.device.type)
        self.probes = [LayerProbe(subject, **settings) for subject in subjects]
        self.samples: list[Values] = []
        self.logged = LoggedValues()
        self.step = self.first_step = first_step
        self._owners = {
            p: probe.subject.name for probe in self.probes for p in probe.subject.parameters
        }
        self._static: dict[str, Values] = {}
        self._window: Window | None = None
        self._observing = ExitStack()
        self._measured: dict[str, Values] | None = None
        self._norms: dict[str, float | None] = {}
        self._plain: deque[float] = deque(maxlen=1000)
        self._since = 0.0
        self._timing = False
        self._ahead: tuple[dict[tuple[str, Any], float], float] | None = None
        self._preparing = 0.0
        self._stay = False
        self._finished = False
        self._forecast: dict[str, int] | None = None
        self._writer: RunWriter | None = None
        if output is not None:
            self._writer = RunWriter.opened(
                output, self._header(), first_step=first_step, overwrite=overwrite
            )

    @property
    def page(self) -> Path | None:
        """The page beside the run file, once it is written."""
        return None if self._writer is None else self._writer.page

    @property
    def folder(self) -> Path | None:
        """Where the run file is: ``output``, or its numbered neighbour."""
        return None if self._writer is None else self._writer.path.parent

    def detach(self, *, failed: bool = False) -> None:
        """Look no more: take every hook off and close the run file. A step under way is dropped.

        Args:
            failed: Whether training ended in an error, beside which an empty profile is no news.
        """
        self._stop_looking()
        for probe in self.probes:
            probe.detach()
        if self._finished:
            return
        self._finished = True
        self._write_logged(all_=True)
        if self._writer is not None:
            self._writer.close(self.report())
        if not self.samples and not failed:
            self._say_that_it_is_empty()

    def report(self) -> ProfilerReport:
        """Return what was found so far, before a resumption too: rows, tables, files, advice."""
        self._write_logged()
        run = Run(self._header(), list(self.samples), self._totals())
        run.logged = {name: list(points) for name, points in self.logged.points.items()}
        if self._writer is not None:
            run.path = self._writer.path
            run.samples[:0] = self._writer.earlier
            run.logged = logged_on(self._writer.earlier_logged, self.first_step, run.logged)
        return ProfilerReport(run)

    def log(self, **values: Any) -> None:
        """Keep values of the step under way for the report's curves.

        Args:
            **values: Name -> number or tensor of one number, such as ``loss=loss``; the loss of
                the training is best called ``train_loss``. Names that begin alike but for
                ``train_``, ``val_`` or ``eval_`` share a plot. After the end nothing is kept.
        """
        for name, value in values.items():
            self.keep(name, value)

    def keep(self, name: str, value: Any, step: int | None = None) -> None:
        """Keep one value, of the step under way or of another."""
        if not self._finished:
            self.logged.add(name, self.step if step is None else step, value)

    def _write_logged(self, *, all_: bool = False) -> None:
        new = self.logged.take(all_=all_)
        if new and self._writer is not None:
            self._writer.log(new)

    def _say_that_it_is_empty(self) -> None:
        trained, schedule = self.step - self.first_step, self.schedule
        due = schedule.due_after(self.first_step) - self.first_step
        if not trained:
            warnings.warn(
                "the profile is empty: no step of the optimizer was seen; profile the optimizer "
                "that the training steps",
                UserWarning,
                stacklevel=4,
            )
            return
        warnings.warn(
            f"the profile is empty: {trained} steps were trained, and statistics were due after "
            f"{due} (warmup_steps={schedule.warmup_steps}, every_n_steps="
            f"{schedule.every_n_steps}); set warmup_steps=0, or train more than {due} steps",
            UserWarning,
            stacklevel=4,
        )

    @property
    def looking(self) -> bool:
        """Whether the current step is looked at."""
        return self._window is not None

    @property
    def timing(self) -> bool:
        """Whether the current step is looked at for its times alone."""
        return self.looking and self._timing

    def _hook(self) -> None:
        for probe in self.probes:
            probe.attach()

    # ---------------------------------------------------------------- one step

    def begin_step(self) -> None:
        """Begin the step that comes now."""
        begun = time.perf_counter()
        look = self.schedule.look(self.step)
        if look is not None:
            self._start_looking(look)
        self._since = time.perf_counter()
        self._preparing = self._since - begun

    def _start_looking(self, look: Look) -> None:
        window = Window(self.device, self.view, self._owners, self.gradients_ready)
        self._window = window
        self._timing = look == "times"
        self._measured = {} if self._timing else None
        tapped = [self.view.tapped(probe.subject.weight) for probe in self.probes]
        in_backward = any(layer is not None and layer.updated_in_backward for layer in tapped)
        for probe in self.probes:
            probe.keep_gradient = in_backward
            probe.begin(window.stopwatch, statistics=not self._timing)
        self._hook()
        self._norms = {
            p.subject.name: self.view.limiter_norm(p.subject.weight) for p in self.probes
        }
        self._observing.enter_context(observed_by(window))
        for optimizer in self.view.optimizers:
            handle = optimizer.register_step_pre_hook(window.before_step)
            self._observing.callback(handle.remove)

    def _stop_looking(self) -> None:
        self._observing.close()
        self._window = None
        for probe in self.probes:
            probe.end()
            if not self._stay:
                probe.detach()

    def end_step(self) -> None:
        """Count a step that has ended; a looked-at one becomes a sample."""
        spent = time.perf_counter() - self._since
        if self._window is not None:
            self._finish(self._window, spent * 1e3)
        else:
            self._plain.append(spent)
        self.step += 1

    def gradients_ready(self) -> None:
        """Measure what needs the gradients, before anything is done to them; once for each step."""
        if self._window is None or self._measured is not None:
            return
        with self._window.stopwatch.own(), torch.no_grad():
            sum_over_ranks(self.probes, self.device)
            self._measured = {}
            for probe in self.probes:
                own = self.view.foreseen_moments(probe.subject.weight, probe.pending)
                self._measured[probe.subject.name] = probe.measured(self.step, own)

    # ---------------------------------------------------------------- putting together

    def _finish(self, window: Window, spent: float) -> None:
        begun = time.perf_counter()
        self.gradients_ready()
        totals = window.stopwatch.totals()
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
        sample["bookkeeping_us"] = totals.get(("step", OPTIMIZER))
        sample["state_bytes"] = self.view.total_bytes()
        self._stop_looking()
        self.samples.append(sample)
        if self._writer is not None:
            self._writer.add(sample, self._header())
        self._write_logged()

    def _layer(self, probe: LayerProbe, totals: dict[tuple[str, Any], float]) -> Values:
        name = probe.subject.name
        measured = (self._measured or {}).get(name, {})
        return layer_values(probe, self.view, totals, measured, self._norms.get(name))

    def _header(self) -> Values:
        if not self._static or self.samples:
            self._static = descriptions(self.probes, self.view)
        return {
            "model": type(self.model).__name__,
            "optimizer": self.view.name,
            **environment(self.device),
            "every_n_steps": self.schedule.every_n_steps,
            "warmup_steps": self.schedule.warmup_steps,
            "layers": self._static,
        }

    def _totals(self) -> Values:
        plain = statistics.median(self._plain) * 1e3 if self._plain else None
        if self._forecast is None:
            self._forecast = self._memory()
        return {"steps": self.step, "step_ms": plain, "memory": self._forecast}

    def _memory(self) -> dict[str, int]:
        """Return the state bytes that other optimizers would take for this model."""
        return memory_forecast(self.model)
