"""Nested spans on a clock that is wound by hand: nothing is lost, nothing counted twice."""

from __future__ import annotations

import pytest
import torch

from neurms.callbacks.profiler.clock import OWN, Clock, SpanCost, Stopwatch, span_cost

ME = {"layer": 1.0}


class HandWound(Clock):
    """Every mark comes a microsecond after the one before; ``spend`` adds to that."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.now = 0

    def mark(self) -> int:
        self.now += 1000
        return self.now

    def spend(self, microseconds: int) -> None:
        self.now += 1000 * microseconds


def nested(cost: SpanCost) -> tuple[HandWound, Stopwatch]:
    clock = HandWound()
    watch = Stopwatch(clock, cost)
    with watch.span("backward", ME):
        clock.spend(50)
        with watch.span("bookkeeping", ME):
            clock.spend(20)
            with watch.span("reduce", {"layer": 0.25, "other": 0.75}):
                clock.spend(39)
    return clock, watch


def test_a_span_is_charged_without_what_lies_inside_it() -> None:
    _, watch = nested(SpanCost())
    totals = watch.totals()
    # One microsecond goes by with each mark: of the span's own end, and of each inner span's two.
    assert totals["reduce", "layer"] == pytest.approx(10.0)
    assert totals["reduce", "other"] == pytest.approx(30.0)
    assert totals["bookkeeping", "layer"] == pytest.approx(22.0)
    assert totals["backward", "layer"] == pytest.approx(52.0)
    assert totals[OWN, None] == 0.0


def test_what_spans_cost_goes_to_the_profiler_and_the_sum_stays() -> None:
    _, watch = nested(SpanCost(inside=1.0, outside=1.0))
    totals = watch.totals()
    assert totals["reduce", "layer"] + totals["reduce", "other"] == pytest.approx(39.0)
    assert totals["bookkeeping", "layer"] == pytest.approx(20.0)
    assert totals["backward", "layer"] == pytest.approx(50.0)
    assert totals[OWN, None] == pytest.approx(5.0)
    assert sum(totals.values()) == pytest.approx(sum(nested(SpanCost())[1].totals().values()))


def test_no_charge_is_negative() -> None:
    _, watch = nested(SpanCost(inside=1e3, outside=1e3))
    assert min(watch.totals().values()) == 0.0


def test_the_profilers_own_work_hides_the_spans_within() -> None:
    clock = HandWound()
    watch = Stopwatch(clock, SpanCost())
    with watch.own(), watch.span("reduce", ME):
        clock.spend(5)
    assert watch.totals() == {(OWN, None): 6.0}


def test_spans_left_open_by_an_exception_end_with_the_one_around() -> None:
    clock = HandWound()
    watch = Stopwatch(clock, SpanCost())
    outer = watch.begin("backward", ME)
    watch.begin("reduce", ME)
    clock.spend(7)
    watch.end(outer)
    assert watch.totals()["reduce", "layer"] == pytest.approx(8.0)
    assert not watch.innermost


def test_the_cost_of_a_span_is_measured_once() -> None:
    cost = span_cost("cpu")
    assert cost.inside >= 0
    assert cost.outside > 0
    assert span_cost("cpu") is cost
    assert Stopwatch(Clock(torch.device("cpu"))).cost is cost
