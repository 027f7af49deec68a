"""Layers that move in one native call move as they would one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import neurms
from neurms.compiled.native import compiler
from neurms.core.unitwise import moves, statistics
from tests.core.unitwise.neurms_models import (
    assert_close_models,
    assert_same,
    batches,
    cross_entropy,
    pair,
    snapshot,
    train,
    wide,
)

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")

SETTINGS: list[dict[str, Any]] = [
    {"variant": variant, **more}
    for variant in ("U", "F", "B")
    for more in (
        {},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "momentum_coupling": "gradient+velocity", "lr": 1e-3},
        {"agc": 0.5},
        {"clip": "relative"},
    )
]


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_eager_definitions_say_the_same(settings: dict[str, Any], update: str) -> None:
    if update == "backward" and "agc" in settings:
        pytest.skip("refused")
    model, optimizer = pair(wide, update=update, **settings)
    twin, other = pair(wide, update=update, backend="eager", **settings)
    train(model, optimizer, batches(4))
    train(twin, other, batches(4))
    assert_close_models(model, twin, 2e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_call_for_all(monkeypatch: pytest.MonkeyPatch, momentum: float) -> None:
    counts = {"commit": [], "move": []}  # type: ignore[var-annotated]

    class Counting:
        def __init__(self, kernel: Any, name: str) -> None:
            self.kernel, self.name = kernel, name

        def on(self, backend: str) -> Any:
            def counted(items: Any, *rest: Any, **more: Any) -> Any:
                counts[self.name].append(len(items))
                return self.kernel.on(backend)(items, *rest, **more)

            return counted

    monkeypatch.setattr(statistics, "move_moments", Counting(statistics.move_moments, "commit"))
    monkeypatch.setattr(moves, "apply_updates_", Counting(moves.apply_updates_, "move"))
    model, optimizer = pair(wide, momentum=momentum)
    train(model, optimizer, batches(2))
    assert counts == {"commit": [3, 3], "move": [6, 6]}


def test_groups_keep_their_settings() -> None:
    def build(backend: str) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = wide()
        optimizer = neurms.NeuRMS(model, lr=0.05, backend=backend, variant="U")
        rest = optimizer.param_groups[0]
        second = {**rest, "params": rest["params"][2:], "lr": 0.01, "momentum": 0.9, "beta": 0.9}
        rest["params"] = rest["params"][:2]
        optimizer.param_groups.append(second)
        return model, optimizer

    (model, optimizer), (twin, other) = build("auto"), build("eager")
    train(model, optimizer, batches(3))
    train(twin, other, batches(3))
    assert_close_models(model, twin, 2e-5)


def test_who_measures_changes_nothing() -> None:
    model, optimizer = pair(wide, variant="F", momentum=0.9)
    twin, other = pair(wide, variant="F", momentum=0.9)
    train(model, optimizer, batches(4))
    with neurms.profile(twin, other, every_n_steps=1, warmup_steps=0) as profiler:
        train(twin, other, batches(4))
    assert_same(snapshot(model, optimizer), snapshot(twin, other))
    rows = profiler.report()
    assert all(row.update_us > 0 and row.scale_us > 0 for row in rows)


def test_a_gradient_stored_otherwise_moves_alone() -> None:
    model, optimizer = pair(wide)
    twin, other = pair(wide, backend="eager")
    for one, its in ((model, optimizer), (twin, other)):
        cross_entropy(one, *batches(1)[0]).backward()
        weight = one[2].weight
        weight.grad = weight.grad.t().contiguous().t()
        its.step()
    assert_close_models(model, twin, 1e-5)
