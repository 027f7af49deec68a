"""The recipes run, learn, and go on from their files bit for bit."""

import runpy
from pathlib import Path

import pytest

RECIPES = ("neurms", "racs", "rmnp", "alice", "eigen_adam", "shared_basis")


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipe(
    name: str,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(repository / "examples" / f"keras_{name}.py"))
    accuracy, continued = capsys.readouterr().out.splitlines()
    assert float(accuracy.removeprefix("accuracy ").removesuffix("%")) > 85
    assert continued == "continued bit for bit"
