from __future__ import annotations

import json

import pytest

from benchmarks.harness import RESULTS
from benchmarks.language_rows import rows
from benchmarks.tables import text, text_figures, text_order, text_page, text_tasks
from benchmarks.tables.provenance import made_by

ENVIRONMENT = {"commit": "abc", "machine": "some", "versions": {"torch": "2"}}
RECORD = {"environment": ENVIRONMENT, "command": "neurms bench some --only x"}


def run(*losses: float, **extra: object) -> dict:
    return {"curve": [[10 * (i + 1), loss, 1.0] for i, loss in enumerate(losses)], **extra}


def scales() -> dict:
    runs = {}
    for seed in (1, 2):
        runs[f"steps=20 final adamw lr=0.1 seed={seed} steps=20"] = run(3.0, 2.0 + seed / 10)
        runs[f"steps=20 final rmnp lr=0.1 seed={seed} steps=20"] = run(2.5, 1.5 + seed / 9)
    settings = {"methods": {"adamw": {}, "rmnp": {}}, "cells": {"steps=20": {"steps": 20}}}
    return {"runs": runs, "settings": settings, **RECORD}


def test_gaps_to_adamw_are_of_the_same_scale() -> None:
    assert "| steps=20, 2 seeds | 2.150 (+0.000) | 1.667 (-0.483) |" in text_order.order(scales())


def test_where_a_method_has_tuning_runs_only_all_are_compared_by_these() -> None:
    content = scales()
    for lr, adamw, rmnp in ((0.1, 1.8, 1.5), (0.2, 2.0, 1.9)):
        content["runs"][f"steps=20 tune adamw lr={lr} steps=20"] = run(adamw)
        content["runs"][f"steps=20 tune rmnp lr={lr} steps=20"] = run(rmnp)
    assert ", 2 seeds |" in text_order.order(content)
    content["runs"] = {k: r for k, r in content["runs"].items() if "final rmnp" not in k}
    row = "| steps=20, the tuning seed | 1.800 (+0.000) | 1.500 (-0.300) |"
    assert row in text_order.order(content)


def test_rmnp_is_set_against_muon_s_gain() -> None:
    content = scales()
    for seed in (1, 2):
        content["runs"][f"steps=20 final muon lr=0.1 seed={seed} steps=20"] = run(1.0, 1.0)
    content["settings"]["methods"]["muon"] = {}
    found = text_order.order(content)
    # AdamW 2.15, RMNP 1.667, Muon 1.
    assert "| 42% |" in found
    assert "ahead of AdamW at steps=20; of Muon's gain it has from 42% (steps=20)" in found
    assert "outermost" not in found
    for lr, loss in ((0.1, 1.0), (0.2, 1.5)):
        content["runs"][f"steps=20 tune muon lr={lr} steps=20"] = run(loss)
    assert "outermost of those tried for muon at steps=20." in text_order.order(content)


def test_small_scale_takes_the_shared_methods_from_the_other_file() -> None:
    leads = {"runs": {}, "settings": {"steps": 20}, **RECORD}
    for seed in (1, 2):
        leads["runs"][f"final methods:racs lr=0.2 seed={seed} steps=20"] = run(
            2.0, 1.0 + seed / 100
        )
    cost = {"ms": 2.0, "state_bytes": 3_000_000, "predicted_bytes": 3_000_001}
    timing = {"runs": {"w64 l2 b8 c64": {"racs": cost, "adamw": {**cost, "ms": 1.0}}}}
    found = text.small(leads, scales(), timing)
    # AdamW's 2.15 is met at step 15 of 20 by nobody sooner than the first point, step 10.
    assert "| racs | 0.2 | 2 | 1.0150 | 0.0071 | -1.1350 |" in found
    assert "| 2.00 | 0.50 | 1.00 | 3.00 |" in found
    assert "in every row but racs, adamw" in found
    assert found.index("| racs |") < found.index("| rmnp |") < found.index("| adamw |")


def test_variants_are_set_against_the_method_as_it_is() -> None:
    content = {"runs": {}, "settings": {"steps": 20}, **RECORD}
    losses = {"methods:adamw": 2.0, "methods:racs": 2.2, "racs:better": 1.9, "racs:worse": 2.5}
    for name, loss in losses.items():
        for seed in (1, 2):
            key = f"final {name} lr=0.2 seed={seed} steps=20"
            content["runs"][key] = run(3.0, loss + seed * len(name) / 1e5)
    found = text.leads(content, "racs", "Title", "Text.", "methods:racs")
    assert "Loss less that of `racs`: better -0.300, worse +0.300." in found
    assert "At AdamW's loss or below: better." in found
    assert text.leads(content, "muon", "Title", "Text.", "methods:muon") is None


def test_the_words_on_shared_basis_are_what_the_file_says() -> None:
    content = json.loads((RESULTS / "leads.json").read_text())
    runs = {k: r for k, r in content["runs"].items() if "shared_basis" in k or ":adamw" in k}
    found = rows(runs, content["settings"]["steps"], baseline="methods:adamw")
    loss = {row["optimizer"].partition(":")[2]: row["loss"] for row in found}
    assert loss["shared_basis"] > loss["adamw"] + 0.05
    for name in ("momentum=0", "momentum-first", "grafting=adam"):
        assert loss[name] < loss["shared_basis"] - 0.04
        assert loss[name] < loss["adamw"] + 0.01
    assert loss["momentum-first,grafting=adam"] == min(loss.values())
    assert abs(loss["decay=.99"] - loss["shared_basis"]) < 0.02


def test_models_of_which_a_shape_is_missing_are_left_out() -> None:
    content = {
        "runs": {"4x2": {"rmnp": 2.0, "muon": 30.0}, "2x2": {"rmnp": 1.0, "muon": 5.0}},
        "settings": {"threads": 2, "models": {"a": [[4, 2, 3], [2, 2, 1]], "b": [[8, 8, 1]]}},
        **RECORD,
    }
    found = text_tasks.shapes(content)
    assert "| a | 7 | 95 | 14 |  |" in found
    assert "| b |" not in found


def test_dominance_joins_shapes_and_seeds() -> None:
    def seen(average: float, least: float, greatest: float) -> dict:
        ratios = {"r_avg": average, "r_min": least, "r_max": greatest}
        return run(2.0, watched=[{"step": 5, "8x8": ratios, "8x32": {**ratios, "r_avg": 5.0}}])

    content = {
        "runs": {
            "final muon lr=0.1 seed=1 steps=10": seen(1.0, 0.5, 9.0),
            "final muon lr=0.1 seed=2 steps=10": seen(3.0, 0.7, 8.0),
        },
        "settings": {"steps": 10},
    }
    assert text_tasks.dominance(content) == {"muon": [(5, pytest.approx(3.5), 0.5, 9.0)]}


def test_a_page_of_no_results_has_no_tables(tmp_path) -> None:
    assert "| ---" not in text_page.page({})
    text_figures.draw(tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_figures_of_the_same_results_are_the_same(tmp_path) -> None:
    for name in ("a", "b"):
        text_figures.draw(tmp_path / name, {"scales": scales()})
    first, second = (tmp_path / name / "text-order.svg" for name in ("a", "b"))
    assert first.read_text() == second.read_text()


def test_every_commit_that_made_runs_is_named() -> None:
    line = made_by({**RECORD, "commits": ["abc", "def"]})
    assert "`neurms bench some`, commit abc, def, torch 2" in line
