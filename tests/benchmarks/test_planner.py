"""The planner's figures: those of memory_report, and of optimizers that have stepped."""

from __future__ import annotations

import json

import pytest
import torch

import neurms
from benchmarks.planner import RANKS, RULES, SHAPES, made, predicted, size
from benchmarks.scale import Size, llama, observe
from benchmarks.tables import ROOT
from benchmarks.tables.planner import data, script

SMALL = Size(16, 2, 2, 24)


@pytest.mark.parametrize("rule", RULES)
def test_bytes_are_those_of_memory_report_and_of_a_real_step(rule: str) -> None:
    name, settings = RULES[rule]
    model = llama(SMALL)
    found = predicted(rule, model, 1)
    assert found["state_bytes"] == neurms.memory_report(llama(SMALL), name, **settings).state_bytes
    optimizer = made(rule, model)
    observe(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert found["state_bytes"] == optimizer.state_bytes()


def test_the_stored_figures_are_what_the_shapes_say() -> None:
    stored = json.loads((ROOT / "benchmarks/results/planner.json").read_text())["runs"]
    assert stored["19M on 1"] == size(SHAPES["19M"], 1)
    assert stored["19M on 8"] == size(SHAPES["19M"], 8)


def test_work_is_every_element_once_divided_by_the_ranks() -> None:
    elements = sum(p.numel() for p in llama(SMALL).parameters())
    for ranks in (1, 4):
        work = predicted("RACS", llama(SMALL), ranks)["work"]
        assert sum(work.values()) == pytest.approx(elements / ranks)
    one, four = (size(SMALL, ranks)["rules"]["Muon"]["work"]["Muon"] for ranks in (1, 4))
    assert one / 4 <= four <= one / 2, "owners of whole matrices, of which one has most"


def contents(rates: dict[str, float] | None) -> dict[str, dict[str, object]]:
    rules = {rule: {"state_bytes": 8, "work": {"AdamW": 2e9, rule: 3e9}} for rule in RULES}
    rules["AdamW"]["work"] = {"AdamW": 4e9}
    runs: dict[str, object] = {
        f"{name} on {ranks}": {"parameters": 5, "rules": rules}
        for name in SHAPES
        for ranks in RANKS
    }
    if rates is not None:
        runs["rates"] = {rule: {"ns_per_unit": rate} for rule, rate in rates.items()}
    old = ("AdamW", "NeuRMS-U", "RACS", "RMNP", "Muon", "Alice")
    timed = {"rates": {rule: {"ns_per_unit": 0.5} for rule in old}}
    return {"planner": {"runs": runs}, "scale": {"runs": timed}}


def test_seconds_are_work_times_rates_from_one_run() -> None:
    own = data(contents(dict.fromkeys(RULES, 0.25)))["table"]["7B"]["64"]
    assert own["AdamW"] == {"bytes": 8, "seconds": 1.0}
    assert own["NeuRMS P"]["seconds"] == pytest.approx(2 * 0.25 + 3 * 0.25)
    older = data(contents(None))["table"]["7B"]["64"]
    assert older["RACS"]["seconds"] == pytest.approx(2.5)
    assert older["NeuRMS P"]["seconds"] is None


def test_the_script_is_the_data() -> None:
    found = script(contents(None)).split("= ")[1].removesuffix(";\n")
    assert json.loads(found) == json.loads(json.dumps(data(contents(None))))
