"""Stopping and going on is the same as never having stopped, bit for bit, for every rule."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.core.optimizers.training import RULES, assert_same_state, make, small_model, train

STEPS = 4


def uninterrupted(name: str, **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    model = small_model()
    optimizer = make(name, model, **settings)
    train(model, optimizer, 2 * STEPS)
    return model, optimizer.state_dict()


def saved_halfway(name: str, path: Path, **settings: Any) -> None:
    model = small_model()
    optimizer = make(name, model, **settings)
    train(model, optimizer, STEPS)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)


@pytest.mark.parametrize("name", RULES)
def test_resumed_equals_uninterrupted(name: str, tmp_path: Path) -> None:
    saved_halfway(name, tmp_path / "half.pt", weight_decay=0.1)
    checkpoint = torch.load(tmp_path / "half.pt", weights_only=True)
    model = small_model(seed=1)
    model.load_state_dict(checkpoint["model"])
    optimizer = make(name, model, weight_decay=0.1)
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert_same_state(optimizer.state_dict(), checkpoint["optimizer"])
    train(model, optimizer, range(STEPS, 2 * STEPS))
    truth, state = uninterrupted(name, weight_decay=0.1)
    assert_same_state(dict(model.state_dict()), dict(truth.state_dict()))
    assert_same_state(optimizer.state_dict(), state)


@pytest.mark.parametrize("name", ["neurms", "rmnp", "racs", "alice"])
def test_resumed_in_another_process(name: str, tmp_path: Path) -> None:
    if name not in RULES:
        pytest.skip(f"{name} is not in the registry")
    saved_halfway(name, tmp_path / "half.pt")
    program = f"""
import torch
from tests.core.optimizers.training import make, small_model, train
torch.set_num_threads({torch.get_num_threads()})
checkpoint = torch.load({str(tmp_path / "half.pt")!r}, weights_only=True)
model = small_model(seed=2)
model.load_state_dict(checkpoint["model"])
optimizer = make({name!r}, model)
optimizer.load_state_dict(checkpoint["optimizer"])
train(model, optimizer, range({STEPS}, {2 * STEPS}))
state = dict(model=model.state_dict(), optimizer=optimizer.state_dict())
torch.save(state, {str(tmp_path / "end.pt")!r})
"""
    subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=100, cwd=Path(__file__).parents[3]
    )
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    truth, state = uninterrupted(name)
    assert_same_state(dict(end["model"]), dict(truth.state_dict()))
    # Which says of each process whether it had loaded the native kernels by then.
    assert end["optimizer"].pop("made_by").keys() == state.pop("made_by").keys()
    assert_same_state(end["optimizer"], state)


@pytest.mark.parametrize("name", ["rmnp", "racs"])
@pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
def test_bfloat16_resumes_exactly(name: str, low_precision: str, tmp_path: Path) -> None:
    """State stays float32 through torch's own cast to the parameter's dtype."""

    def started() -> tuple[nn.Module, Any]:
        model = small_model(dtype=torch.bfloat16)
        return model, make(name, model, low_precision=low_precision)

    model, optimizer = started()
    train(model, optimizer, STEPS)
    torch.save((model.state_dict(), optimizer.state_dict()), tmp_path / "half.pt")
    other, resumed = started()
    weights, state = torch.load(tmp_path / "half.pt", weights_only=True)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, range(STEPS, 2 * STEPS))
    assert_same_state(dict(model.state_dict()), dict(other.state_dict()))
    assert_same_state(optimizer.state_dict(), resumed.state_dict())
