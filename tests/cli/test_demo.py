import json

import pytest
import torch

from neurms.cli import main
from neurms.cli.data import DATASETS
from neurms.cli.methods import BUDGETS, methods, perceptron


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """What ``neurms demo`` wrote after one epoch."""
    path = tmp_path_factory.mktemp("demo") / "figures.json"
    threads = torch.get_num_threads()
    assert main(["demo", "--epochs", "1", "--seed", "1", "--json", str(path)]) == 0
    assert torch.get_num_threads() == threads
    return json.loads(path.read_text())


def test_every_method_is_there_and_learns(figures) -> None:
    assert [row["title"] for row in figures["methods"]] == [m.title for m in methods("digits")]
    for row in figures["methods"]:
        assert row["accuracy"] > 0.5
        assert row["seconds"] > 0
        assert row["step"]["milliseconds"] > 0


def test_accuracies_are_counts_of_the_held_out_images(figures) -> None:
    held = BUDGETS["digits"].validation
    for row in figures["methods"]:
        assert row["accuracy"] * held == pytest.approx(round(row["accuracy"] * held), abs=1e-6)


def test_state_bytes(figures) -> None:
    """SGD keeps one number for each parameter, AdamW two and a step; U keeps m, F m + n a layer."""
    sizes = [(256, 64), (256, 256), (10, 256)]
    parameters = sum(m * n + m for m, n in sizes)
    expected = {
        "SGD momentum .9": 4 * parameters,
        "AdamW": 8 * parameters + 4 * 2 * len(sizes),
        "NeuRMS-U": 4 * sum(m for m, _ in sizes),
        "NeuRMS-B": 4 * sum(m for m, _ in sizes),
        "NeuRMS-F": 4 * sum(m + n for m, n in sizes),
    }
    assert {row["title"]: row["state_bytes"] for row in figures["methods"]} == expected


def test_rho_is_there_for_every_layer_and_method(figures) -> None:
    for row in figures["methods"]:
        assert list(row["rho"]) == ["hidden1", "hidden2", "head"]
        assert all(-1 <= value <= 1 for value in row["rho"].values())


def test_record(figures) -> None:
    assert figures["environment"]["threads"] == 1
    assert figures["environment"]["versions"]["torch"]
    assert figures["source"] == "scikit-learn (bundled)"
    assert figures["seed"] == 1
    assert figures["budget"]["epochs"] == 1


def test_terminal_gets_both_tables(capsys) -> None:
    from rich.console import Console

    from neurms.cli.demo import run

    demo = run("digits", epochs=1, console=Console(width=100), rounds=1)
    printed = capsys.readouterr().out
    for method, outcome in zip(demo.methods, demo.outcomes, strict=True):
        (line,) = [x for x in printed.splitlines() if method.title in x and "%" in x and "x " in x]
        assert f"{outcome.accuracy:.2%}" in line
        assert f"{outcome.rho['head']:.3f}" in printed
    assert "lightning" not in printed.replace("include Lightning", "").lower()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "--epochs 0 must be at least 1"),
        (["--seed", "-2"], "--seed -2 must not be negative"),
        (["--json", "no/such/folder/x.json"], "its folder does not exist"),
    ],
)
def test_bad_options_stop_before_any_training(words, message, capsys) -> None:
    assert main(["demo", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_missing_data_is_explained(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setenv("NEURMS_DATA", str(tmp_path / "nowhere"))
    assert main(["demo", "--data", "mnist"]) == 1
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("data", DATASETS)
def test_methods_make_their_optimizers(data) -> None:
    for method in methods(data):
        model = perceptron(6, 4)
        optimizer = method.optimize(model)
        model(torch.randn(3, 6)).square().mean().backward()
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == method.lr
