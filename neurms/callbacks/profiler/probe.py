"""What one layer shows in one profiled step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from neurms.callbacks.profiler.clock import Stopwatch
from neurms.callbacks.profiler.subjects import Subject
from neurms.callbacks.profiler.timing import LayerTimer
from neurms.core.diagnostics.factorization import (
    expected_correlation,
    factor_correlation,
    factorization_error,
    gradient_margins,
    signal_rows,
    spaced,
    square_products,
)
from neurms.core.diagnostics.unit_statistics import dead_units, levels
from neurms.core.ground.errors import check_choice, check_fraction, check_positive_int
from neurms.core.taps.accumulation import graph_task
from neurms.core.taps.protocol import Sums
from neurms.core.unitwise.rule import LossReduction
from neurms.core.unitwise.statistics import PendingSums

__all__ = ["Averages", "LayerProbe", "Values"]

Values = dict[str, Any]


class Averages:
    """Moving averages of a pair of vectors, seen at some steps only.

    Seen at steps t_1 < t_2 < ..., an average decays by beta^(t_k - t_(k-1)) from one sight to the
    next, so that it forgets at the rate of one that is updated in every step.

    Args:
        beta: Decay for each step.
    """

    def __init__(self, beta: float) -> None:
        self.beta = check_fraction("beta", beta)
        self.pair: tuple[Tensor, Tensor] | None = None
        self._weight: float | None = None
        self._step = 0

    def moved(self, first: Tensor, second: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Take a sight at a step and return both averages, their start at zero corrected."""
        first, second = first.double(), second.double()
        if self.pair is None:
            self.pair = first, second
        else:
            decay = self.beta ** max(step - self._step, 1)
            # A sight stands for the steps since the last; the first for as many as the second.
            before = (1.0 - decay) if self._weight is None else self._weight
            self._weight = decay * before + (1.0 - decay)
            share = (1.0 - decay) / self._weight
            self.pair = self.pair[0].lerp(first, share), self.pair[1].lerp(second, share)
        self._step = step
        return self.pair


class LayerProbe:
    """Hooks of one layer and what they saw; the sink of its tap.

    Args:
        subject: The layer.
        beta: Decay of the averages of v and u, for each step.
        loss_reduction: How the loss reduces over rows.
        loss_scale: Returns the factor that the loss carries, or None.
        max_elements: Entries of a weight up to which E[d^2 h^2] is formed for all its units.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        beta: float,
        loss_reduction: LossReduction,
        loss_scale: Callable[[], Tensor | float | None],
        max_elements: int,
    ) -> None:
        self.subject = subject
        self.timer = LayerTimer(subject.name)
        self.tap = subject.tap(self)
        self.pending = PendingSums()
        self.products: Tensor | None = None
        self.gradient: Tensor | None = None
        self.keep_gradient = False
        self.loss_reduction: LossReduction = check_choice(
            "loss_reduction", loss_reduction, ("mean", "sum")
        )
        self._loss_scale = loss_scale
        self._moments, self._margins = Averages(beta), Averages(beta)
        layout = subject.layout
        entries = max(layout.matrix_shape[1], 1)
        kept = check_positive_int("max_elements", max_elements) // entries
        self.units = spaced(layout.units, max(kept, 1), subject.weight.device)
        self._stopwatch: Stopwatch | None = None
        self._signals: tuple[Tensor, Tensor] | None = None
        self._gemms: list[tuple[Any, Any]] = []
        self._task: int | None = None

    # ---------------------------------------------------------------- one window

    def attach(self) -> None:
        """Put hooks and tap in place."""
        self.timer.attach(self.subject.module)
        self.tap.attach()

    def detach(self) -> None:
        """Take hooks and tap off."""
        self.timer.detach()
        self.tap.detach()

    def begin(self, stopwatch: Stopwatch, *, statistics: bool) -> None:
        """Start to look: at times, and at D and H as well for ``statistics``."""
        self.clear()
        self.timer.stopwatch = self._stopwatch = stopwatch
        self.tap.enabled = statistics

    def end(self) -> None:
        """Look no more and let go of what was held."""
        self.timer.stopwatch = self._stopwatch = None
        self.tap.enabled = False
        self.clear()

    def clear(self) -> None:
        """Forget what was seen in this window."""
        self.pending = PendingSums()
        self.products = self.gradient = self._signals = self._task = None
        self._gemms.clear()
        self.timer.batch = 0

    # ---------------------------------------------------------------- what the tap calls

    def watching(self) -> AbstractContextManager[Any]:
        """Return a span of the profiler's own work."""
        return nullcontext() if self._stopwatch is None else self._stopwatch.own()

    def signals(self, errors: Tensor, inputs: Tensor) -> None:
        """Keep D and H until :meth:`add`."""
        self._signals = errors, inputs

    def add(self, sums: Sums) -> None:
        """Take one backward firing."""
        signals, self._signals = self._signals, None
        task = graph_task()
        if task != self._task and self._task is not None and self.subject.weight.grad is None:
            # Gradients of the passes before were dropped without a step; micro-batches keep theirs.
            batch = self.timer.batch
            self.clear()
            self.timer.batch = batch
        self._task = task
        self.pending.add(sums)
        if signals is not None and sums.rows:
            self._look_at(*signals)

    def rescale(self, sums: Sums) -> Tensor | None:
        """Leave D alone."""
        return None

    def loss_scale(self) -> Tensor | float | None:
        """Return the factor that the loss carries; D is divided by it."""
        return self._loss_scale()

    def _look_at(self, errors: Tensor, inputs: Tensor) -> None:
        module = self.subject.module
        scale = self.loss_scale()
        wide = errors.double() if errors.device.type == "cpu" else errors.float()
        unscaled = wide if scale is None else wide / scale
        layout, activity = self.subject.layout, self.subject.activity
        products = square_products(module, layout, activity, unscaled, inputs, self.units)
        if products is not None:
            self.products = products if self.products is None else self.products + products
        if layout.groups == layout.taps == 1 and activity.tokens is None:
            self._multiply(errors, inputs)

    def empty_products(self) -> Tensor:
        """Return the zeros that a rank contributes whose rows left the layer out."""
        layout, device = self.subject.layout, self.subject.weight.device
        kept = layout.units if self.units is None else len(self.units)
        groups = layout.groups
        shape = (groups, kept // groups, layout.features // groups, layout.taps)
        wide = torch.float64 if device.type == "cpu" else torch.float32
        return torch.zeros(shape, dtype=wide, device=device)

    def _multiply(self, errors: Tensor, inputs: Tensor) -> None:
        """Time the product D^T H once more: autograd does it in one node with D W."""
        layout, activity = self.subject.layout, self.subject.activity
        d = signal_rows(errors, activity.unit_axes)
        h = signal_rows(inputs.to(errors.dtype), activity.feature_axes)
        if self._stopwatch is not None:
            clock = self._stopwatch.clock
            start = clock.mark()
            gradient = d.T @ h
            self._gemms.append((start, clock.mark()))
            if self.keep_gradient:
                whole = layout.from_matrix(gradient)
                self.gradient = whole if self.gradient is None else self.gradient + whole

    # ---------------------------------------------------------------- statistics

    @torch.no_grad()
    def measured(self, step: int, own: tuple[Tensor, Tensor | None] | None) -> Values:
        """Return the statistics of this window; the gradient is complete and nothing moved yet.

        Args:
            step: Number of the step.
            own: The optimizer's v and u as this step will leave them, where it has them.
        """
        values: Values = {"rows": self.pending.rows}
        gradient = self._gradient()
        moments = self.pending.moments(self.loss_reduction)
        layout = self.subject.layout
        if moments.units is not None and moments.features is not None and self.pending.is_finite():
            v, u = self._moments.moved(moments.units, moments.features, step)
            if own is not None:
                v, u = own[0].double(), u if own[1] is None else own[1].double()
            values |= {"v": levels(v), "u": levels(u), "dead_units": dead_units(moments.units)}
            values["rho_expected"] = float(expected_correlation(layout, v, u))
            if gradient is not None:
                values["rho"] = float(factor_correlation(gradient, layout, v, u))
                batch = factor_correlation(gradient, layout, moments.units, moments.features)
                values["rho_batch"] = float(batch)
            values |= self._factorization()
        if gradient is not None and bool(torch.isfinite(gradient).all()):
            values |= self._foretold(gradient, step)
        return values

    def _factorization(self) -> Values:
        if self.products is None or self.pending.units is None or self.pending.features is None:
            return {}
        error = factorization_error(
            self.products,
            self.pending.units,
            self.pending.features,
            self.pending.rows,
            self.pending.feature_rows,
            self.units,
        )
        return {"factorization_error": float(error)}

    def _foretold(self, gradient: Tensor, step: int) -> Values:
        """Return how well G's own margins of the steps *before* tell G^2 now, as RACS needs."""
        layout, before = self.subject.layout, self._margins.pair
        self._margins.moved(*gradient_margins(gradient, layout), step)
        if before is None:
            return {}
        return {
            "rho_gradient": float(factor_correlation(gradient, layout, *before)),
            "rho_gradient_expected": float(expected_correlation(layout, *before)),
        }

    def _gradient(self) -> Tensor | None:
        gradient = self.subject.weight.grad
        if gradient is None and self.gradient is not None:
            # Formed by nobody else where weights move during backward.
            gradient = self.gradient.to(self.subject.weight.dtype)
        # A sharded gradient holds a part of the rows only.
        ordinary = gradient is not None and type(gradient) in (Tensor, nn.Parameter)
        return gradient.detach() if ordinary and gradient is not None else None

    def gemm_us(self) -> float | None:
        """Return the microseconds that D^T H took by itself, None for other layers than linear."""
        if not self._gemms or self._stopwatch is None:
            return None
        return sum(self._stopwatch.clock.microseconds(*marks) for marks in self._gemms)
