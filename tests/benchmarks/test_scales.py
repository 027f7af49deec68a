from __future__ import annotations

import pytest
import torch

from benchmarks import scales
from benchmarks.harness import Results


@pytest.fixture(autouse=True)
def keep_denormals():
    """Making results flushes denormals, which other tests may need."""
    yield
    torch.set_flush_denormal(False)


def test_long_runs_begin_around_the_best_of_shorter_ones(tmp_path) -> None:
    record = Results(tmp_path / "some.json", {})
    assert scales.begun(record, "steps=900", "muon") == scales.METHODS["muon"]
    for lr, loss in ((0.1, 2.0), (0.2, 1.0)):
        key = f"steps=300 tune muon lr={lr:g} steps=300"
        record.runs[key] = {"curve": [(300, loss, 1.0)]}
        record.runs[key.replace("300", "100")] = {"curve": [(100, loss, 1.0)]}
    assert scales.begun(record, "steps=900", "muon").rates == (0.1, 0.2, 0.4)
    assert scales.begun(record, "steps=300", "muon") == scales.METHODS["muon"]
    assert scales.begun(record, "batch=2", "muon") == scales.METHODS["muon"]
