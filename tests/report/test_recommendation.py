"""The sentence on top, for rows whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from neurms.report import LayerRow, ProfilerReport, Run
from neurms.report.recommendation import recommendation
from neurms.report.summary import Summary


class Made(Summary):
    """A report of given rows."""

    def __init__(self, rows: list[LayerRow], variant: str | None, bookkeeping: float = 0.0) -> None:
        layers = {row.layer: {"variant": variant} for row in rows}
        samples = [{"step": 0, "layers": {}, "bookkeeping_us": bookkeeping}]
        super().__init__(Run({"layers": layers}, samples))
        self._rows = rows


@pytest.fixture
def row(report: ProfilerReport) -> LayerRow:
    times = {"forward_us": 60.0, "backward_us": 30.0, "update_us": 7.0, "bookkeeping_us": 0.0}
    rho = {"rho": 0.5, "rho_expected": 0.5}
    return replace(report[0], **times, **rho, reduce_us=2.0, scale_us=1.0, layer="a")


def failing(row: LayerRow, **changed: Any) -> LayerRow:
    """The row of a layer whose factorisation does not hold, with units of very different v."""
    levels = (1e-9, 1e-8, 1e-7, 1e-6, 1e-3, 1e-2, 1e-1)
    unfit: dict[str, Any] = {"rho": 0.1, "rho_gradient": None, "dominance": None}
    return replace(row, **(unfit | {"unit_levels": levels} | changed))


def test_cost_then_the_many_then_the_few(row: LayerRow) -> None:
    rows = [row, replace(row, layer="b"), failing(row, layer="head")]
    assert recommendation(Made(rows, "F")) == (
        "Reduce + scale cost 3.0 % here; rho holds in `a` and `b`: keep NeuRMS's variant F there; "
        "rho does not hold in `head`: use NeuRMS's variant U there."
    )


def test_many_layers_are_counted_and_one_answer_is_for_all(row: LayerRow) -> None:
    rows = [replace(row, layer=str(i)) for i in range(9)]
    assert "rho holds in all layers: use NeuRMS's variant F." in recommendation(Made(rows, "U"))
    rows += [failing(row, layer="head", unit_levels=None)]
    assert "in 9 of 10 layers: use" in recommendation(Made(rows, None))
    assert "no premise holds in `head`: use AdamW there" in recommendation(Made(rows, None))


def test_what_has_no_choice_is_left_out(row: LayerRow) -> None:
    embedding = replace(row, layer="tokens", kind="Embedding")
    assert "tokens" not in recommendation(Made([row, embedding], "F"))
    assert recommendation(Made([embedding], None)).endswith("has a choice: keep AdamW.")


def test_too_few_steps_and_no_statistics_are_said_plainly(row: LayerRow) -> None:
    free = replace(row, reduce_us=0.0, scale_us=0.0, samples=2)
    assert recommendation(Made([free], None)) == "Too few profiled steps to judge `a`."


def test_bookkeeping_is_named_where_it_is_the_most(row: LayerRow) -> None:
    assert "(50 % with bookkeeping)" in recommendation(Made([row], "F", bookkeeping=94.0))


def test_a_variant_whose_own_premise_holds_is_kept(row: LayerRow) -> None:
    margins = {"rho_gradient": 0.5, "rho_gradient_expected": 0.5}
    foretold, not_foretold = replace(row, **margins), replace(row, layer="b", rho_gradient=0.1)
    not_foretold = replace(not_foretold, rho_gradient_expected=0.5)
    assert recommendation(Made([foretold], "P")).endswith(
        "variant P's premise holds in `a`, as F's does: keep P."
    )
    assert recommendation(Made([foretold, not_foretold], "P")).endswith(
        "variant P's premise holds in `a`, as F's does: keep P there; rho holds in `b`: use "
        "NeuRMS's variant F there."
    )
    assert "use NeuRMS's variant F." in recommendation(Made([foretold], "U"))
