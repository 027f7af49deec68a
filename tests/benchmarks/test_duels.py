"""NeuRMS against the others, budget by budget."""

from __future__ import annotations

from benchmarks.perceptron_rows import Cell
from benchmarks.tables.duels import float32, matrix, outcomes, places, summary, words


def cell(method: str, net: str, seconds: float, *scores: float, validation: float = 0.5) -> Cell:
    return Cell(("mnist", net, seconds), method, 0.1, 10, 1.0, scores, validation, 0, 6)


LOW, MIDDLE, HIGH = (0.90, 0.902, 0.903), (0.902, 0.904, 0.902), (0.95, 0.951, 0.953)


def test_the_rival_is_the_best_of_the_others_and_all_of_them_are_counted() -> None:
    found = [
        cell("NeuRMS-U", "4-2", 1, *MIDDLE),
        cell("AdamW", "4-2", 1, *HIGH),
        cell("SGD", "4-2", 1, *LOW),
    ]
    (outcome,) = outcomes(found)
    assert outcome.rival.method == "AdamW"
    assert (outcome.kind, outcome.ahead, outcome.behind, outcome.others) == ("behind", 0, 1, 2)
    assert outcome.on_front == ()
    assert "another method is significantly ahead of NeuRMS in 1 of 1 budgets" in words([outcome])
    assert "In none is it significantly ahead of every other method" in words([outcome])
    assert summary([outcome]) == (
        "Of 1 budgets NeuRMS is significantly ahead in 0, not told apart in 0, behind in 1; a "
        "NeuRMS is on the front of accuracy over time in 0."
    )


def test_a_slower_budget_is_on_the_front_only_if_no_shorter_one_beats_it() -> None:
    found = [
        cell("AdamW", "4-2", 1, *HIGH),
        cell("NeuRMS-U", "4-2", 1, *LOW),
        cell("NeuRMS-U", "4-2", 5, *MIDDLE),
        cell("AdamW", "4-2", 5, *LOW),
    ]
    assert [outcome.on_front for outcome in outcomes(found)] == [(), ()]
    assert outcomes(found[1:])[0].on_front == ("NeuRMS-U",)


def test_matrix_has_a_row_for_a_network_and_a_column_for_a_budget() -> None:
    found = [
        cell(method, net, seconds, *scores)
        for net, seconds in (("4-2", 1), ("4-2", 5), ("4-4-2", 5))
        for method, scores in (("NeuRMS-U", HIGH), ("AdamW", LOW))
    ]
    assert places(found)[-1] == ("mnist", "4-4-2", 5)
    table = matrix(outcomes(found))
    assert "|  | 1 s | 5 s |" in table
    assert "| mnist 4-4-2 |  | **+4.97** on AdamW (p < .001) |" in table


def test_what_multiplies_in_bfloat16_can_be_left_out() -> None:
    found = [cell("NeuRMS-U-bf16", "4-2", 1, *HIGH), cell("AdamW", "4-2", 1, *LOW)]
    assert [c.method for c in float32(found)] == ["AdamW"]
    assert outcomes(float32(found)) == []


def test_a_variant_that_was_not_chosen_may_be_ahead_by_itself() -> None:
    found = [
        cell("NeuRMS-U", "4-2", 1, *LOW, validation=0.9),
        cell("NeuRMS-U-head", "4-2", 1, *HIGH),
        cell("AdamW", "4-2", 1, *MIDDLE),
    ]
    (outcome,) = outcomes(found)
    assert outcome.ours.method == "NeuRMS-U"
    ((method, p),) = outcome.alone_ahead
    assert (method, outcome.variants) == ("NeuRMS-U-head", 2)
    assert 0.0005 < p < 0.001
    said = "NeuRMS-U-head in mnist 4-2 1 s (largest of 1 p: < .001; times the 2 NeuRMS: .001)"
    assert said in words([outcome])
    assert "Taken by itself" not in words(outcomes(found[::2]))
