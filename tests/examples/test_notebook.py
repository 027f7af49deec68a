"""The notebook of examples/ runs from top to bottom, and is kept without outputs."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")


@pytest.fixture
def notebook(repository: Path) -> dict[str, Any]:
    return json.loads((repository / "examples" / "first_steps.ipynb").read_text())


def test_it_is_a_notebook_without_outputs(notebook: dict[str, Any]) -> None:
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_it_runs_from_top_to_bottom(notebook: dict[str, Any], capsys) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            exec(compile(source, cell["id"], "exec"), names)
    printed = capsys.readouterr().out
    accuracies = names["accuracies"]
    assert set(accuracies) == {"adamw", "neurms", "racs", "rmnp", "groups", "advised"}
    # Ten classes; what is advised runs at default rates, which are nobody's best.
    assert all(share > 0.7 for name, share in accuracies.items() if name != "advised"), accuracies
    assert accuracies["advised"] > 0.2
    assert "optimizer = neurms." in printed
    assert "2.weight" in printed
