import pytest

from benchmarks.perceptron_rows import Cell, best_of, cells, duel, front


def cell(method: str, seconds: float, *scores: float, validation: float = 0.0) -> Cell:
    return Cell(("mnist", "net", seconds), method, 0.1, 10, 1.0, scores, validation, 0, 6)


def test_cells_take_the_steps_nearest_to_the_budget_and_whole_sets_of_seeds() -> None:
    runs = {
        "mnist/4-2/1 s/AdamW/search/lr 0.1": {"accuracy": 0.5},
        "mnist/4-2/1 s/AdamW/search/lr 0.3": {"accuracy": 0.7},
        "mnist/4-2/1 s/SGD/search/lr 1": {"accuracy": 0.6},
        "mnist/4-2/1 s/SGD/steps 500/lr 1/seed 0": {"accuracy": 0.1, "state_bytes": 0},
    }
    for seed in range(2):
        key = f"mnist/4-2/1 s/AdamW/steps 500/lr 0.1/seed {seed}"
        runs[key] = {"accuracy": 0.99, "state_bytes": 7}
    for steps in (400, 500):
        for seed in range(2):
            key = f"mnist/4-2/1 s/AdamW/steps {steps}/lr 0.3/seed {seed}"
            runs[key] = {"accuracy": steps / 1000 + seed / 10, "state_bytes": 7}
    times = {
        "4-2 batch 128 threads 1": {"AdamW": {"ratio": 1.05}, "SGD": {"ratio": 1.0}},
        "4-2 reference": {"ms": 2.0},
    }
    (found,) = cells(runs, times)
    assert found.place == ("mnist", "4-2", 1.0)
    assert (found.method, found.lr, found.steps, found.state_bytes) == ("AdamW", 0.3, 500, 7)
    assert found.scores == (0.5, 0.6)
    assert (found.validation, found.trials) == (0.7, 2)


def test_front_holds_what_no_cheaper_or_equal_cell_beats() -> None:
    fast = cell("SGD", 1.0, 0.90, 0.92)
    beaten = cell("Adam", 1.0, 0.80, 0.92)
    slow = cell("Adam", 5.0, 0.95, 0.97)
    useless = cell("SGD", 5.0, 0.90, 0.91)
    assert front([fast, beaten, slow, useless]) == [fast, slow]


def test_ours_is_chosen_by_validation_not_by_test() -> None:
    lucky = cell("NeuRMS-U", 1.0, 0.99, validation=0.90)
    chosen = cell("NeuRMS-F", 1.0, 0.95, validation=0.91)
    rival = cell("AdamW", 1.0, 0.99, validation=0.99)
    assert best_of([lucky, chosen, rival]) is chosen
    assert best_of([rival]) is None


def test_duel_is_with_the_others_of_the_same_place() -> None:
    own = cell("NeuRMS-U", 1.0, 0.93, 0.94, 0.96)
    rivals = [
        cell("AdamW", 1.0, 0.90, 0.92, 0.92),
        cell("AdamW", 5.0, 0.99, 0.99, 0.98),
        cell("NeuRMS-F", 1.0, 0.91, 0.90, 0.92),
    ]
    found = duel(own, [own, *rivals])
    assert set(found) == {"AdamW"}
    assert found["AdamW"]["difference"] == pytest.approx(0.03)
