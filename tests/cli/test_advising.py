"""``neurms advise``: from a function that gives a training to the code of its optimizer."""

import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import neurms
from neurms.cli import main
from neurms.cli.advising import matched_rates
from neurms.report import Advice, AdviceList

TRAININGS = """
import types
import torch
from tests.report.test_advice import M, N, independent, taking_turns

KNOWN = {"first": independent, "second": taking_turns}

def training():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(N, M) for name in KNOWN})
    generator = torch.Generator().manual_seed(0)
    def loss(model):
        signals = {name: of(generator) for name, of in KNOWN.items()}
        return sum((model[n](inputs) * errors).sum() for n, (errors, inputs) in signals.items())
    return model, loss

def batches():
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
    made = [(torch.randn(16, 6), torch.randint(4, (16,))) for _ in range(5)]
    return model, made, torch.nn.functional.cross_entropy

class Output(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 4)
    def forward(self, inputs):
        return types.SimpleNamespace(loss=self.layer(inputs).square().mean())

def dictionaries():
    return Output(), ({"inputs": torch.randn(16, 6)} for _ in range(1000))

def model_alone():
    return batches()[0]

def no_criterion():
    return batches()[:2]

def no_batch():
    return batches()[0], [], torch.nn.functional.mse_loss

def wrong_loss():
    return batches()[0], lambda: torch.tensor(1.0)

def constant_loss():
    return batches()[0], lambda model: torch.tensor(1.0)

def nothing_to_profile():
    return torch.nn.LayerNorm(3), lambda model: model(torch.randn(2, 3)).sum()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tried_trainings.py").write_text(TRAININGS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("tried_trainings", None)


def test_layers_of_which_the_answer_is_known(folder, capsys) -> None:
    assert main(["advise", "tried_trainings:training", "--lr", "1e-5"]) == 0
    printed = capsys.readouterr().out
    assert "first: F (rho" in printed
    assert "second: U (rho" in printed
    model, _ = sys.modules["tried_trainings"].training()
    names: dict[str, Any] = {"neurms": neurms, "model": model}
    exec(printed[printed.index("optimizer =") :], names)
    optimizer = names["optimizer"]
    assert [row.rule for row in optimizer.plan()] == ["neurms"] * 4
    variants = {n: g["variant"] for g in optimizer.param_groups for n in g["param_names"]}
    assert variants["first.weight"] == "F"
    assert variants["second.weight"] == "U"


@pytest.mark.parametrize("function", ["batches", "dictionaries"])
def test_batches(folder, capsys, function: str) -> None:
    assert main(["advise", f"tried_trainings:{function}", "--steps", "20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rates"]["AdamW"] == 1e-3
    assert found["code"].startswith("optimizer = neurms.")
    assert len(found["advice"]) == (2 if function == "batches" else 1)


def test_rates_travel_as_far_as_adamw_does() -> None:
    """P's and AdamW's first steps have an RMS of about their rates; U's has not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 8))
    start = [p.detach().clone() for p in model.parameters()]

    def loss(own: nn.Module) -> torch.Tensor:
        return own(torch.randn(32, 16)).square().mean()

    for rule, least, most in (("P", 0.3, 3.0), ("U", 0.0, 1e6)):
        advice = AdviceList([Advice(str(i), rule, "known") for i in (0, 2)])
        rate = matched_rates(model, loss, advice, 1e-3)[rule]
        assert 1e-3 * least < rate < 1e-3 * most
        one, other = _moved(model, loss, "adamw", 1e-3), _moved(model, loss, "neurms", rate, rule)
        assert other == pytest.approx(one, rel=0.15)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), start, strict=True))


def _moved(model: nn.Module, loss: Any, name: str, rate: float, rule: str = "") -> float:
    own = copy.deepcopy(model)
    settings = {"variant": rule} if rule else {}
    optimizer = neurms.create(name, own, lr=rate / 10, **settings)
    torch.manual_seed(0)
    for _ in range(10):
        optimizer.zero_grad()
        loss(own).backward()
        optimizer.step()
    pairs = zip(own.parameters(), model.parameters(), strict=True)
    return statistics.median((a - b).square().mean().sqrt().item() for a, b in pairs if a.ndim > 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tried_trainings:model_alone", "returned Sequential; it must return (model, loss)"),
        ("tried_trainings:no_criterion", "no dictionaries, and no criterion; it must return"),
        ("tried_trainings:no_batch", "returned no batch"),
        ("tried_trainings:wrong_loss", "takes nothing; it must take the model alone"),
        ("tried_trainings:constant_loss", "a tensor of shape () alone; it must be a tensor"),
        ("tried_trainings:nothing_to_profile", "there is nothing to advise on;"),
        ("tried_trainings:trainin", "did you mean 'training'?"),
        ("tried_trainings:batches --steps 3", "--steps 3 must be at least 10; 60 is the default"),
        ("tried_trainings:batches --lr 0", "--lr 0.0 must be positive; 1e-3 is the default"),
        ("tried_trainings:batches --lr fast", "--lr fast must be a number"),
        ("tried_trainings:batches --rate 1", "has no option '--rate'"),
        ("", "neurms advise needs MODULE:FUNCTION; write neurms advise MODULE:FUNCTION"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, words: str, message: str) -> None:
    assert main(["advise", *words.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err
