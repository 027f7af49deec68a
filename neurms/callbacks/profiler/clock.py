"""Where a step's time goes: nested spans, each charged with its own time only."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.profiler import record_function

__all__ = ["OWN", "Clock", "Shares", "Stopwatch"]

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


@dataclass
class _Span:
    kind: str
    shares: Shares
    start: Mark
    record: Any
    inner: list[tuple[Mark, Mark]] = field(default_factory=list)
    stop: Mark = None


class Stopwatch:
    """Collects spans of one step. Threads have stacks of their own; backward passes use several.

    A span is charged with what it took less what the spans inside it took, so that statistics
    gathered within a backward pass do not count as backward. Spans are
    ``torch.profiler.record_function`` ranges as well.

    Args:
        clock: Gives the marks.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._done: list[_Span] = []
        self._local = threading.local()

    def begin(self, kind: str, shares: Shares, label: str = "") -> _Span | None:
        """Open a span and return it; None inside the profiler's own work."""
        stack = self._stack()
        if stack and stack[-1].kind == OWN:
            return None
        record = record_function(f"neurms::{kind}" + (f"::{label}" if label else ""))
        record.__enter__()
        span = _Span(kind, shares, self.clock.mark(), record)
        stack.append(span)
        return span

    def end(self, span: _Span | None) -> None:
        """Close a span, and with it those that an exception left open inside it."""
        stack = self._stack()
        if span is None or span not in stack:
            return
        while True:
            top = stack.pop()
            top.stop = self.clock.mark()
            top.record.__exit__(None, None, None)
            if stack:
                stack[-1].inner.append((top.start, top.stop))
            self._done.append(top)
            if top is span:
                return

    @contextmanager
    def span(self, kind: str, shares: Shares, label: str = "") -> Iterator[None]:
        """Open a span for the length of a ``with`` block."""
        opened = self.begin(kind, shares, label)
        try:
            yield
        finally:
            self.end(opened)

    @contextmanager
    def own(self) -> Iterator[None]:
        """Open a span of the profiler's own work."""
        with self.span(OWN, {None: 1.0}):
            yield

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
            spent = self.clock.microseconds(span.start, span.stop)
            spent -= sum(self.clock.microseconds(*inner) for inner in span.inner)
            for whom, share in span.shares.items():
                totals[span.kind, whom] += spent * share
        return dict(totals)

    def _stack(self) -> list[_Span]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        stack: list[_Span] = self._local.stack
        return stack
