"""Two trainings at once, each in a thread, are two trainings."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import neurms
from tests.core.optimizers.training import SETTINGS, assert_same_state

CASES = [
    ("neurms", {"variant": "U", "momentum": 0.9}),
    ("neurms", {"variant": "B"}),
    ("neurms", {"variant": "F"}),
    ("neurms", {"update": "backward"}),
    *((name, SETTINGS.get(name, {})) for name in ("rmnp", "racs", "alice", "soap", "shared_basis")),
]


def trained(name: str, settings: dict[str, Any], seed: int, gate: Any = None) -> Any:
    """Train a model of this seed; with a gate, step by step beside another thread."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 7), nn.Linear(7, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    optimizer = neurms.create(name, model, **{"lr": 0.01, **settings})
    for _ in range(12):
        if gate is not None:
            gate.wait()
        inputs = torch.randn(5, 6, generator=generator)
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.state_dict()), optimizer.state_dict()


@pytest.mark.parametrize(("name", "settings"), CASES, ids=lambda case: str(case))
def test_two_trainings_in_two_threads_are_each_alone(name: str, settings: dict[str, Any]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = [trained(name, settings, seed) for seed in (1, 2)]
        together: dict[int, Any] = {}
        gate = threading.Barrier(2, timeout=60)

        def work(seed: int) -> None:
            torch.set_num_threads(1)
            together[seed] = trained(name, settings, seed, gate)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed, expected in zip((1, 2), alone, strict=True):
            assert_same_state(list(together[seed]), list(expected))
    finally:
        torch.set_num_threads(before)
