"""Peers in turns: a baseline, a first step, a reason where one did not run."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

import neurms
from benchmarks import peers


def test_torch_forms_run_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(parameters: object) -> torch.optim.Optimizer:
        raise RuntimeError("not on this machine")

    forms = {**peers._torch_forms(), "torch Broken": broken}
    monkeypatch.setattr(peers, "_torch_forms", lambda: forms)
    ours = {"rmnp": partial(neurms.create, "rmnp", lr=1e-3)}
    found = peers.against_peers((12, 8), ours, "torch", rounds=2)
    assert found[peers.BASELINE]["ratio"] == 1.0
    assert found["torch Broken"] == {"failed": "RuntimeError: not on this machine"}
    assert {"torch Muon default", "torch SGD foreach", "rmnp"} <= found.keys()
    assert all(row["first_s"] > 0 for row in found.values() if "failed" not in row)


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PATIENCE", 1)
    with pytest.raises(TimeoutError, match="more than 1 s"), peers._patience():
        time.sleep(30)
