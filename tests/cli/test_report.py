"""``neurms report --json``; its tables are tested with the profiler's report."""

import json
from pathlib import Path

import pytest
import torch

import neurms
from neurms.cli import main


@pytest.fixture
def run(tmp_path: Path):
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


def test_one_run(run, capsys) -> None:
    assert main(["report", run("a"), "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["finished"] is True
    assert [row["layer"] for row in record["layers"]] == ["0", "1"]
    assert [one["layer"] for one in record["advice"]] == ["0", "1"]


def test_two_runs_and_a_page(run, tmp_path, capsys) -> None:
    page = tmp_path / "page.html"
    assert main(["report", run("a"), run("b"), "--json", "--html", str(page)]) == 0
    shown = capsys.readouterr()
    assert len(json.loads(shown.out)) == 2
    assert f"written: {page}" in shown.err
    assert page.is_file()
