"""The task on tags: which part judges, and that every row trains."""

from __future__ import annotations

import pytest

from benchmarks.contest import entrants_of
from benchmarks.evidence import tags
from benchmarks.tagger import WINDOW

PARTS = {"train": "ab", "dev": "a", "test": "b"}


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> tags.Tags:
    """Return a task of three steps on two words, each with a tag of its own."""
    monkeypatch.setattr(tags, "STEPS", 3)
    monkeypatch.setattr(tags, "read", lambda name: [(w, w) for w in PARTS[name]] * WINDOW)
    return tags.Tags()


def test_searches_are_judged_by_the_development_part_and_rows_by_the_test_part(
    task: tags.Tags,
) -> None:
    entrant = entrants_of("tags")["AdamW"]
    values = entrant.space.values(entrant.space.origin)
    runs = [task.train(lambda m: entrant.make(m, values), 0, reported=r) for r in (False, True)]
    assert [set(run) & {"validation", "test"} for run in runs] == [{"validation"}, {"test"}]
    # One part has nothing but the first word, the other nothing but the second.
    assert {runs[0]["validation"], runs[1]["test"]} <= {0.0, 1.0}


@pytest.mark.parametrize("name", entrants_of("tags"))
def test_every_row_trains_from_where_its_search_begins(task: tags.Tags, name: str) -> None:
    entrant = entrants_of("tags")[name]
    values = entrant.space.values(entrant.space.origin)
    run = task.train(lambda m: entrant.make(m, values), 0, reported=True)
    assert run["steps"] == 3
    assert "diverged" not in run
    assert run["state_bytes"] > 0
