"""Every command with its typical mistakes: one line with the cure, status 2, no traceback."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from neurms.cli import main
from tests.report.small_runs import run

MODELS = """
import torch
def build():
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
def sized(width, depth=2):
    return torch.nn.Linear(width, depth)
class Net(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
def nothing():
    return None
"""

# command line -> what its one line says: the fault, and behind it the cure
MISTAKES = {
    "demoo": ["no command 'demoo'", "did you mean 'demo'?"],
    "neurms demo": ["no command 'neurms'", "choose one of demo, doctor, plan"],
    "--versoin": ["no command '--versoin'", "did you mean '--version'?"],
    "demo --epoch 3": ["no option '--epoch'", "did you mean '--epochs'?"],
    "demo --epochs ten": ["--epochs ten", "must be a whole number"],
    "demo --epochs 0": ["--epochs 0 must be at least 1", "leave it out"],
    "demo --epochs": ["--epochs needs a value", "write --epochs NUMBER"],
    "demo --seed -1": ["--seed -1 must not be negative", "0 is the default"],
    "demo --data digit": ["--data digit is not known", "did you mean 'digits'?"],
    "demo --data=": ["--data needs a value", "write --data manual"],
    "demo digits": ["no use for 'digits'", "options such as --data"],
    "demo --json nowhere/x.json": ["its folder does not exist", "create it first"],
    "doctor --kernel": ["no option '--kernel'", "did you mean '--kernels'?"],
    "doctor --kernels=yes": ["--kernels takes no value", "write --kernels alone"],
    "doctor all": ["no use for 'all'", "write neurms doctor"],
    "plan": ["needs MODULE:FUNCTION", "write neurms plan MODULE:FUNCTION"],
    "plan tried": ["'tried' does not say where the model is", "write module:function"],
    "plan tried.py:build": ["'tried.py' is a file", "write tried:build"],
    "plan ./tried.py:build": ["is a file", "write tried:build"],
    "plan tride:build": ["module 'tride' was not found", "did you mean 'tried'?"],
    "plan tried:bild": ["no function 'bild'", "did you mean 'build'?"],
    "plan tried:sized": ["needs width", "def build(): return sized(...)"],
    "plan tried:Net": ["needs width", "def build(): return Net(...)"],
    "plan tried:nothing": ["returned NoneType", "must return an nn.Module"],
    "plan tried:build racs": ["no use for 'racs'", "options such as --optimizer"],
    "plan tried:build --optimizer rcas": ["--optimizer rcas", "did you mean 'racs'?"],
    "plan tried:build --optimizer adamw": ["torch's own", "choose a rule of this library"],
    "plan tried:build --optimiser racs": ["'--optimiser'", "did you mean '--optimizer'?"],
    "report": ["needs RUN", "write neurms report RUN [RUN2]"],
    "report nothing": ["'nothing' does not exist", "give the folder that the profiler wrote"],
    "report empty": ["holds no run.jsonl", "give the one that the profiler wrote to"],
    "report tried.py": ["'tried.py' is not a run file", "give the folder that it wrote to"],
    "report rows.json": ["'rows.json' is not a run file", "give the folder that it wrote to"],
    "report picture.png": ["'picture.png' is not a run file", "give the folder"],
    "report good good good": ["no use for 'good'", "write neurms report RUN [RUN2]"],
    "report good --html": ["--html needs a value", "write --html PATH"],
    "report good --html nowhere/page.html": ["its folder does not exist", "create it first"],
    "report good --csv nowhere/rows.csv": ["its folder does not exist", "create it first"],
    "report good --htm page.html": ["no option '--htm'", "did you mean '--html'?"],
    "bench contst": ["no benchmark 'contst'", "did you mean 'contest'?"],
    "bench --jsn": ["no option '--jsn'", "did you mean '--json'?"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tried.py").write_text(MODELS)
    (tmp_path / "rows.json").write_text('{"rows": [1, 2]}')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\x00\xff")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("tried", None)


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_cure(folder: Path, capsys, words: str) -> None:
    if "good" in words:
        run(folder / "good", steps=3)
        capsys.readouterr()
    assert main(words.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    fault, cure = MISTAKES[words]
    assert fault in printed.err
    assert cure in printed.err.split(fault)[1]


@pytest.mark.parametrize("words", ["demoo", "plan tried:sized", "report tried.py"])
def test_a_process_ends_so_too(folder: Path, words: str) -> None:
    command = [sys.executable, "-m", "neurms", *words.split()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=folder)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert MISTAKES[words][1] in ended.stderr


def test_what_is_right_passes(folder: Path, capsys) -> None:
    assert main(["plan", "tried:build", "--optimizer=racs", "--json"]) == 0
    assert '"racs"' in capsys.readouterr().out


def test_a_narrow_terminal_gets_whole_reasons(folder: Path, capsys, monkeypatch) -> None:
    reasons = {row.reason for row in _plan()}
    assert main(["plan", "tried:build"]) == 0
    piped = capsys.readouterr().out
    assert all(reason in piped for reason in reasons)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["plan", "tried:build"]) == 0
    lines = re.sub(r"\x1b\[\d*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 60
    words = " ".join(" ".join(lines).split())
    assert all(word in words for reason in reasons for word in reason.split())


def _plan():
    from neurms.cli.planning import plan_of

    return plan_of("tried:build", "neurms")
