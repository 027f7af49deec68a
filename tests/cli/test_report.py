"""``neurms report``: runs again from their files."""

import json
from pathlib import Path

import pytest
import torch

import neurms
from neurms.cli import main
from neurms.report.runs import RUN_FILE
from tests.report.small_runs import run


@pytest.fixture
def made(tmp_path: Path):
    def made(name: str) -> str:
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 3))
        optimizer = neurms.NeuRMS(model)
        output = tmp_path / name
        with neurms.profile(model, optimizer, every_n_steps=1, warmup_steps=0, output=output):
            for _ in range(5):
                model(torch.randn(4, 6)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return str(output)

    return made


def test_one_run(made, capsys) -> None:
    assert main(["report", made("a"), "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["finished"] is True
    assert [row["layer"] for row in record["layers"]] == ["0", "1"]
    assert [one["layer"] for one in record["advice"]] == ["0", "1"]


def test_two_runs_and_a_page(made, tmp_path, capsys) -> None:
    page = tmp_path / "page.html"
    assert main(["report", made("a"), made("b"), "--json", "--html", str(page)]) == 0
    shown = capsys.readouterr()
    assert len(json.loads(shown.out)) == 2
    assert f"written: {page}" in shown.err
    assert page.is_file()


def test_the_command_line_rebuilds_and_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run(tmp_path / "a", steps=5)
    run(tmp_path / "b", steps=5, variant="U")
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "a"), "--html", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "NeuRMS: layers" in shown
    assert "written" in shown
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "A: a (NeuRMS) against B: b (NeuRMS)" in shown
    assert shown.count("overhead") == 3
    assert "time B/A" in shown


def test_the_command_line_explains_bad_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "a", steps=3)
    file = tmp_path / "a" / RUN_FILE
    file.write_text(file.read_text()[:-30])
    assert main(["report", str(tmp_path / "a")]) == 1
    assert "--partial" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "a"), "--partial"]) == 0
    capsys.readouterr()
    blocked = tmp_path / "page.html"
    blocked.mkdir()
    assert main(["report", str(tmp_path / "a"), "--partial", "--html", str(blocked)]) == 1
    assert "error:" in capsys.readouterr().err
