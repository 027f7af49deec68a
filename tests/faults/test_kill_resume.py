"""A run that is killed and resumed ends at the bits of one that was left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system"),
]


@pytest.mark.parametrize("front", ["lightning", "keras"])
def test_three_kills(front: str, repository: Path, tmp_path: Path) -> None:
    pytest.importorskip(front)
    out = tmp_path / "kills.json"
    command = [sys.executable, "-m", "benchmarks.kill_resume", "--kills", "3", "--seed", "7"]
    done = subprocess.run(
        [*command, "--front", front, "--out", str(out)],
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    runs = json.loads(out.read_text())["runs"]
    assert len(runs) == 3
    assert all(run["killed in"] != "end" for run in runs.values())


def test_a_difference_is_seen() -> None:
    """The comparison that the test above rests on."""
    import torch

    from benchmarks.kill_resume import differing

    end = {"model": {"w": torch.ones(2)}, "optimizer": [{"step": 1}], "resumed from": -1}
    other = {"model": {"w": torch.ones(2)}, "optimizer": [{"step": 1}], "resumed from": 4}
    assert differing(end, other) == []
    other["model"] = {"w": torch.tensor([1.0, 1.0 + 1e-7])}
    assert differing(end, other) == ["/model/w"]
    other["optimizer"] = [{"step": 2}]
    assert differing(end, other) == ["/model/w", "/optimizer/0/step"]
