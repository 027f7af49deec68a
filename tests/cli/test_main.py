import importlib
import json
import pkgutil
import subprocess
import sys
import textwrap

import pytest

import neurms.cli
from neurms.cli import main


def test_module_runs_and_hands_on_the_exit_code() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "neurms", "plan", "nowhere"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: 'nowhere' does not say where the model is")


def test_without_a_command_shows_help(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main([])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "Start with `neurms demo`" in printed
    for command in ("demo", "doctor", "plan", "advise", "bench"):
        assert command in printed


@pytest.mark.parametrize(("name", "extra"), [("sklearn", "demo"), ("tyro", "report")])
def test_missing_package_names_its_extra(monkeypatch, capsys, name, extra) -> None:
    # All of them, so that none of those imported below stays beside the others afterwards.
    for found in pkgutil.iter_modules(neurms.cli.__path__, "neurms.cli."):
        importlib.import_module(found.name)
    for module in [m for m in sys.modules if m.startswith(("neurms.cli.", f"{name}."))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["demo", "--data", "digits"]) == 1
    assert f'pip install "neurms[{extra}]"' in capsys.readouterr().err


def test_version_needs_no_extra() -> None:
    source = """
import sys
sys.modules["tyro"] = sys.modules["rich"] = None
from neurms.cli import main
raise SystemExit(main(["--version"]))
"""
    command = [sys.executable, "-c", source]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stdout) == (0, f"neurms {neurms.__version__}\n"), ended.stderr


def test_a_reader_that_goes_away_gets_no_traceback() -> None:
    command = [sys.executable, "-m", "neurms", "bench"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.close()
        assert running.stderr is not None
        assert running.stderr.read() == b""
        assert running.wait(timeout=100) == 141


def test_interrupt(monkeypatch, capsys) -> None:
    def interrupt(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr("neurms.cli.doctor.examine", interrupt)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.fixture
def models(monkeypatch, tmp_path):
    (tmp_path / "my_models.py").write_text(
        textwrap.dedent(
            """
            import torch
            number = 3
            def build():
                return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
            def nothing():
                return None
            """
        )
    )
    (tmp_path / "broken_models.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_models", None)


@pytest.mark.parametrize("optimizer", ["racs", "neurms"])
def test_plan_is_the_optimizer_s(models, capsys, optimizer) -> None:
    assert main(["plan", "my_models:build", "--optimizer", optimizer]) == 0
    printed = capsys.readouterr().out
    model = sys.modules["my_models"].build()
    assert printed.strip() == str(neurms.create(optimizer, model).plan()).strip()


def test_plan_for_machines(models, capsys) -> None:
    assert main(["plan", "my_models:build", "--optimizer", "racs", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    predicted = neurms.memory_report(sys.modules["my_models"].build(), "racs")
    assert printed["state_bytes"] == predicted.state_bytes
    assert [row["name"] for row in printed["parameters"]] == [row.name for row in predicted]
    assert printed["parameters"][0]["rule"] == "racs"


def test_help_says_what_exit_codes_mean(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "2 the command line is wrong" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["demo", "doctor", "plan", "advise", "report", "bench"])
def test_every_command_has_help(capsys, command) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: neurms {command}" in printed
    assert len(printed.splitlines()) > 6


def test_completion_is_written(tmp_path) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--tyro-write-completion", "bash", str(tmp_path / "neurms.sh")])
    assert end.value.code in (0, None)
    assert "plan" in (tmp_path / "neurms.sh").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["my_models"], "write module:function"),
        (["no_such_models:build"], "module 'no_such_models' was not found"),
        (["my_models:missing"], "my_models has no function 'missing'"),
        (["my_models:number"], "my_models has no function 'number'"),
        (["my_models:nothing"], "returned NoneType; it must return an nn.Module"),
        (["my_models:build", "--optimizer", "adan"], "--optimizer adan is not known"),
        (["my_models:build", "--optimizer", "adamw"], "adamw is torch's own"),
    ],
)
def test_plan_explains_what_is_wrong(models, capsys, words, message) -> None:
    assert main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


def test_plan_shows_the_user_s_own_import_errors(models) -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        main(["plan", "broken_models:build"])
