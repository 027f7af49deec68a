"""Where a step's time goes: nested spans, each charged with its own time only."""

from __future__ import annotations

import functools
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Hashable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.profiler import record_function

__all__ = ["OWN", "Clock", "Shares", "SpanCost", "Stopwatch", "span_cost"]

OWN = "profiler"
"""Kind of the spans in which the profiler itself works; nothing in them is charged to a layer."""

Mark: TypeAlias = Any
Shares: TypeAlias = Mapping[Hashable, float]
"""Whom a span is charged to, and by which part of it."""


class Clock:
    """Marks in time: the processor's clock, or events on an accelerator's stream.

    Work on an accelerator runs long after it was ordered. An event is a mark in the order of the
    work itself; it is read once, at the end of the step.

    Args:
        device: Where the model computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.asynchronous = device.type not in ("cpu", "meta")

    def mark(self) -> Mark:
        """Return a mark of now."""
        if not self.asynchronous:
            return time.perf_counter_ns()
        event = torch.Event(self.device.type, enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Wait until all marks have been passed."""
        if self.asynchronous:
            torch.accelerator.synchronize(self.device)

    def microseconds(self, start: Mark, stop: Mark) -> float:
        """Return the time between two marks, after :meth:`wait`."""
        if self.asynchronous:
            return float(start.elapsed_time(stop)) * 1e3
        return float(stop - start) / 1e3


class SpanCost(NamedTuple):
    """What a span itself costs, in microseconds.

    Args:
        inside: Between its two marks; charged to the span unless it is subtracted.
        outside: Before and after them; charged to the span around it.
    """

    inside: float = 0.0
    outside: float = 0.0


class _Span:
    """An open or closed span."""

    __slots__ = ("inner", "kind", "record", "shares", "start", "stop")

    def __init__(self, kind: str, shares: Shares, record: Any) -> None:
        self.kind = kind
        self.shares = shares
        self.record = record
        self.inner: list[_Span] = []
        self.start: Mark = None
        self.stop: Mark = None


class _Timed(AbstractContextManager[None]):
    """A span as a ``with`` block; a generator would put more of itself between the marks."""

    __slots__ = ("_open", "_watch", "_what")

    def __init__(self, watch: Stopwatch, kind: str, shares: Shares, label: str) -> None:
        self._watch = watch
        self._what = kind, shares, label
        self._open: _Span | None = None

    def __enter__(self) -> None:
        self._open = self._watch.begin(*self._what)

    def __exit__(self, *error: object) -> None:
        self._watch.end(self._open)


class Stopwatch:
    """Collects spans of one step. Threads have stacks of their own; backward passes use several.

    A span is charged with what it took less what the spans inside it took, so that statistics
    gathered within a backward pass do not count as backward. What spans themselves cost
    (:func:`span_cost`) is taken off as well and charged to the profiler, so that nothing is lost.
    Spans are ``torch.profiler.record_function`` ranges too.

    Args:
        clock: Gives the marks.
        cost: What a span costs; None measures it, once for each kind of device.
    """

    def __init__(self, clock: Clock, cost: SpanCost | None = None) -> None:
        self.clock = clock
        self.cost = span_cost(clock.device.type) if cost is None else cost
        self._done: list[_Span] = []
        self._local = threading.local()

    def begin(self, kind: str, shares: Shares, label: str = "") -> _Span | None:
        """Open a span and return it; None inside the profiler's own work."""
        stack = self._stack()
        if stack and stack[-1].kind == OWN:
            return None
        record = record_function(f"neurms::{kind}" + (f"::{label}" if label else ""))
        record.__enter__()
        span = _Span(kind, shares, record)
        stack.append(span)
        # Last of all here and first of all in ``end``: nothing but the work lies between.
        span.start = self.clock.mark()
        return span

    def end(self, span: _Span | None) -> None:
        """Close a span, and with it those that an exception left open inside it."""
        if span is None:
            return
        now = self.clock.mark()
        stack = self._stack()
        if span not in stack:
            return
        while True:
            top = stack.pop()
            top.stop = now
            top.record.__exit__(None, None, None)
            if stack:
                stack[-1].inner.append(top)
            self._done.append(top)
            if top is span:
                return

    def span(self, kind: str, shares: Shares, label: str = "") -> AbstractContextManager[None]:
        """Return a context manager that opens a span for the length of a ``with`` block."""
        return _Timed(self, kind, shares, label)

    def own(self) -> AbstractContextManager[None]:
        """Return a span of the profiler's own work."""
        return _Timed(self, OWN, {None: 1.0}, "")

    @property
    def innermost(self) -> Shares:
        """Whom the innermost open span is charged to."""
        stack = self._stack()
        return stack[-1].shares if stack else {}

    def totals(self) -> dict[tuple[str, Hashable], float]:
        """Return microseconds by (kind, whom), once all spans are closed."""
        self.clock.wait()
        totals: dict[tuple[str, Hashable], float] = defaultdict(float)
        for span in self._done:
            spent = self._spent(span) - sum(self._spent(inner) for inner in span.inner)
            # Never more than there is: a calibrated cost is a median, and one span may be faster.
            own = min(self.cost.inside + self.cost.outside * len(span.inner), max(spent, 0.0))
            totals[OWN, None] += own
            for whom, share in span.shares.items():
                totals[span.kind, whom] += (spent - own) * share
        return dict(totals)

    def _spent(self, span: _Span) -> float:
        return self.clock.microseconds(span.start, span.stop)

    def _stack(self) -> list[_Span]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        stack: list[_Span] = self._local.stack
        return stack


@functools.cache
def span_cost(device_type: str) -> SpanCost:
    """Measure what an empty span costs, by itself and for the span around it.

    Medians of 200 empty spans, taken before anything is profiled: about a millisecond, once for a
    process. A training's spans find colder caches and cost a little more than that.

    Args:
        device_type: ``"cpu"``, ``"cuda"``, ...
    """
    outer, inner = [], []
    for _ in range(10):
        watch = Stopwatch(Clock(torch.device(device_type)), SpanCost())
        with watch.span("calibration", {None: 1.0}):
            for _ in range(20):
                with watch.span("empty", watch.innermost, "layer"):
                    pass
        outer.append(watch.totals()["calibration", None] / 20)
        inner += [watch._spent(span) for span in watch._done if span.kind == "empty"]
    return SpanCost(statistics.median(inner), statistics.median(outer))
