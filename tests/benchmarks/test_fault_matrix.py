"""The page on faults says what the results files say, and no cell has failed."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path

import pytest

pytest.importorskip("lightning")
pytest.importorskip("keras")

from benchmarks import fault_matrix
from benchmarks.faults import keras_recipes, recipes
from benchmarks.harness import RESULTS


def content(name: str) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def test_page_is_made_from_the_files() -> None:
    assert fault_matrix.PAGE.read_text() == fault_matrix.page(content("fault_matrix"))


def test_every_cell_is_a_stated_outcome() -> None:
    runs = content("fault_matrix")["runs"]
    for front, module in fault_matrix.FRONTS.items():
        for name in importlib.import_module(module).NAMES:
            outcomes = runs[f"{front}: {name}"]
            assert len(outcomes) >= 27  # type: ignore[arg-type]
            for fault, outcome in outcomes.items():  # type: ignore[attr-defined]
                assert not fault_matrix.is_bad(outcome), (front, name, fault, outcome)


def test_killed_runs_ended_as_the_others() -> None:
    runs = content("kill_resume")["runs"]
    assert sum(key.startswith("lightning") for key in runs) >= 50
    assert sum(key.startswith("keras") for key in runs) >= 50
    assert all(not run["differs in"] for run in runs.values())  # type: ignore[index]


@pytest.mark.parametrize(
    "part",
    [
        recipes.AtomicCheckpointIO,
        recipes.RandomState,
        recipes.ResumableBatches,
        keras_recipes.AtomicSave,
        keras_recipes.SeedsByStep,
    ],
)
def test_the_guide_shows_what_was_tried(part: type, repository: Path) -> None:
    guide = (repository / "docs/guide/reliability.md").read_text()
    assert inspect.getsource(part).strip() in guide
