import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from neurms.cli import demo, main
from neurms.cli.methods import methods
from neurms.cli.network import Decoder, perceptron
from neurms.cli.tasks import TASKS, Images, Manual


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """What ``neurms demo --data digits`` wrote after one epoch."""
    folder = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    words = ["demo", "--data", "digits", "--epochs", "1", "--seed", "1"]
    paths = ["--json", str(folder / "demo.json"), "--html", str(folder / "demo.html")]
    assert main([*words, *paths]) == 0
    assert torch.get_num_threads() == threads
    return json.loads((folder / "demo.json").read_text()), (folder / "demo.html").read_text()


def test_every_method_is_there_and_learns(figures) -> None:
    found, page = figures
    assert [row["title"] for row in found["methods"]] == [m.title for m in methods("digits")]
    for row in found["methods"]:
        assert row["figure"] > 0.5
        assert row["curve"][-1][1] < row["curve"][0][1]
        assert row["step"]["milliseconds"] > 0
        assert f"{row['figure']:.2%}" in page
    assert page.count("<polyline") == 2 * len(found["methods"])
    assert "an illustration, no ranking" in page


def test_accuracies_are_counts_of_the_held_out_images(figures) -> None:
    for row in figures[0]["methods"]:
        assert row["figure"] * 360 == pytest.approx(round(row["figure"] * 360), abs=1e-6)


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
    assert {row["title"]: row["state_bytes"] for row in figures[0]["methods"]} == expected


def test_record(figures) -> None:
    found = figures[0]
    assert found["environment"]["threads"] == 1
    assert found["environment"]["versions"]["torch"]
    assert found["source"] == "scikit-learn (bundled)"
    assert found["seed"] == 1


def test_text_without_a_network_in_eighty_columns(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(demo, "task", lambda data, epochs, seed: Manual(12))
    html = tmp_path / "page.html"
    made = demo.run(html_path=html, console=Console(width=80), rounds=1)
    printed = capsys.readouterr().out
    assert f"Written to {html}" in printed
    assert all(len(line) <= 80 for line in printed.splitlines() if "Written" not in line)
    for method, outcome in zip(made.methods, made.outcomes, strict=True):
        (line,) = [x for x in printed.splitlines() if x.startswith(f"  {method.title}  ")]
        assert f"{outcome.figure:.3f}" in line
    assert "one seed on a tiny task" in printed.lower()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "--epochs 0 must be at least 1"),
        (["--seed", "-2"], "--seed -2 must not be negative"),
        (["--json", "no/such/folder/x.json"], "its folder does not exist"),
        (["--html", "no/such/folder/x.html"], "its folder does not exist"),
        (["--html", "."], "--html . is a folder; name a file in it"),
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


@pytest.mark.parametrize("data", TASKS)
def test_methods_make_their_optimizers(data) -> None:
    for method in methods(data):
        model = Decoder(8, 1, 2, 4) if data == "manual" else perceptron(6, 4)
        inputs = torch.randint(256, (3, 4)) if data == "manual" else torch.randn(3, 6)
        optimizer = method.optimize(model)
        model(inputs).square().mean().backward()
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == method.lr
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in held} == {id(p) for p in model.parameters()}


def test_the_settings_are_those_that_everybody_s_search_chose(repository: Path) -> None:
    """The rows of the comparison and the demo's methods make the same optimizers."""
    from benchmarks.contest import entrants_of
    from benchmarks.evidence.ledger import rows

    content = json.loads((repository / "benchmarks/results/contests/demo.json").read_text())
    found = {row.name: row for row in rows(content)}
    entrants = entrants_of("demo")
    chosen = methods("manual")
    assert len(chosen) == len(entrants)
    for method, (name, entrant) in zip(chosen, entrants.items(), strict=True):
        model = Decoder(8, 1, 2, 4)
        ours = method.optimize(model).param_groups
        theirs = entrant.make(model, dict(found[name].chosen)).param_groups
        for one, other in zip(ours, theirs, strict=True):
            assert [id(p) for p in one["params"]] == [id(p) for p in other["params"]], name
            settings = {k: v for k, v in other.items() if k != "params"}
            assert {k: v for k, v in one.items() if k != "params"} == settings, name


def test_a_long_run_of_text_is_counted_in_epochs() -> None:
    from neurms.cli.tasks import task

    assert task("manual", 2).steps == 400
    assert isinstance(task("digits", 1), Images)
