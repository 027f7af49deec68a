"""What NeuRMS keeps, what it costs, and that a checkpoint brings all of it back bit for bit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from neurms import NeuRMS, memory_report
from neurms.core.ground.errors import CheckpointError
from tests.core.unitwise.neurms_models import (
    CASES,
    assert_same,
    batches,
    cnn,
    cross_entropy,
    mlp,
    pair,
    snapshot,
    train,
    transposed,
    vectors,
)

FLOAT = 4


def floats(model: nn.Module, *, features: bool, velocity: bool) -> int:
    """Return m (+ n) for each layer, and a velocity for each parameter."""
    total = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            total += module.out_features + features * module.in_features
        elif isinstance(module, nn.modules.conv._ConvNd):
            total += module.out_channels + features * module.in_channels
    return total + velocity * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("variant", ["U", "B", "F"])
def test_state_is_what_the_method_says_and_the_plan_predicts(
    case: str, variant: str, momentum: float
) -> None:
    make, batch = CASES[case]
    model = make()
    predicted = memory_report(model, "neurms", variant=variant, momentum=momentum)
    optimizer = NeuRMS(model, variant=variant, momentum=momentum)
    planned = optimizer.plan()
    train(model, optimizer, [batch()] * 2)
    expected = FLOAT * floats(model, features=variant == "F", velocity=momentum > 0)
    assert optimizer.state_bytes() == expected
    assert planned.state_bytes == optimizer.plan().state_bytes == expected
    assert predicted.state_bytes == expected
    assert [(r.name, r.state_bytes) for r in predicted] == [
        (r.name, r.state_bytes) for r in planned
    ]


def test_memory_report_leaves_the_model_alone() -> None:
    model = mlp()
    memory_report(model, "neurms", update="backward")
    assert not any(module._forward_hooks for module in model.modules())
    assert all(type(module) in (nn.Linear, nn.Tanh, nn.ReLU) for module in model)
    x, y = vectors()
    cross_entropy(model, x, y).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_master_copies_are_counted() -> None:
    model = mlp().bfloat16()
    optimizer = NeuRMS(model, low_precision="master", variant="U")
    x, y = vectors()
    train(model, optimizer, [(x.bfloat16(), y)])
    count = floats(model, features=False, velocity=False) + sum(
        p.numel() for p in model.parameters()
    )
    assert optimizer.state_bytes() == optimizer.plan().state_bytes == FLOAT * count


def saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


class TestResume:
    @pytest.mark.parametrize("update", ["step", "backward"])
    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    @pytest.mark.parametrize("variant", ["U", "B", "F"])
    @pytest.mark.parametrize("case", ["mlp", "cnn"])
    def test_n_and_n_steps_are_2n(
        self, case: str, variant: str, momentum: float, update: str
    ) -> None:
        make, batch = CASES[case]
        x, y = batch()
        data = [(x * (1 + 0.2 * i), y) for i in range(6)]
        settings = {"variant": variant, "momentum": momentum, "update": update, "lr": 0.02}
        whole = make()
        optimizer = NeuRMS(whole, **{"variant": "U", **settings})
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        for batch_ in data:
            train(whole, optimizer, [batch_])
            scheduler.step()

        first = make()
        before = NeuRMS(first, **{"variant": "U", **settings})
        scheduler = torch.optim.lr_scheduler.StepLR(before, 2, 0.5)
        for batch_ in data[:3]:
            train(first, before, [batch_])
            scheduler.step()
        second = make()
        with torch.no_grad():
            for p in second.parameters():
                p.zero_()
        second.load_state_dict(first.state_dict())
        after = NeuRMS(second, variant=variant, update=update)
        resumed = torch.optim.lr_scheduler.StepLR(after, 2, 0.5)
        after.load_state_dict(saved(before))
        resumed.load_state_dict(scheduler.state_dict())
        for batch_ in data[3:]:
            train(second, after, [batch_])
            resumed.step()
        assert_same(snapshot(whole, optimizer), snapshot(second, after))
        assert_same(optimizer.state_dict(), after.state_dict())

    @pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
    def test_bfloat16(self, low_precision: str) -> None:
        settings: dict[str, Any] = {"low_precision": low_precision, "momentum": 0.9, "variant": "F"}
        data = [(x.bfloat16(), y) for x, y in batches(6)]
        (whole, optimizer), (first, before) = (
            pair(lambda: mlp().bfloat16(), **settings) for _ in range(2)
        )
        train(whole, optimizer, data)
        train(first, before, data[:3])
        second = mlp().bfloat16()
        second.load_state_dict(first.state_dict())
        after = NeuRMS(second, lr=0.05, **{"variant": "U", **settings})
        after.load_state_dict(saved(before))
        train(second, after, data[3:])
        assert_same(snapshot(whole, optimizer), snapshot(second, after))

    def test_layers_are_matched_by_name(self) -> None:
        class Reordered(nn.Module):
            def __init__(self, *, flipped: bool) -> None:
                super().__init__()
                torch.manual_seed(3)
                first, second = nn.Linear(5, 5), nn.Linear(5, 5)
                layers = {"first": first, "second": second}
                for name in reversed(layers) if flipped else layers:
                    setattr(self, name, layers[name])

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.second(self.first(x).tanh())

        straight, flipped = Reordered(flipped=False), Reordered(flipped=True)
        one = NeuRMS(straight, momentum=0.9, variant="F")
        train(straight, one, batches(3))
        flipped.load_state_dict(straight.state_dict())
        other = NeuRMS(flipped, momentum=0.9, variant="F")
        other.load_state_dict(saved(one))
        train(straight, one, batches(2))
        train(flipped, other, batches(2))
        for name, weight in straight.state_dict().items():
            assert torch.equal(weight, flipped.state_dict()[name])

    def test_loading_in_mid_window_drops_what_was_pending(self) -> None:
        (model, optimizer), (twin, other) = pair(variant="F"), pair(variant="F")
        data = batches(3)
        for m, o in ((model, optimizer), (twin, other)):
            train(m, o, data[:1])
        x, y = data[1]
        cross_entropy(model, 100 * x, y).backward()
        optimizer.load_state_dict(saved(optimizer))
        model.zero_grad()
        train(model, optimizer, data[2:])
        train(twin, other, data[2:])
        assert_same(snapshot(model, optimizer), snapshot(twin, other))

    def test_state_is_plain(self) -> None:
        model, optimizer = pair(momentum=0.9, variant="F")
        train(model, optimizer, batches(2))
        plain = (torch.Tensor, int, float, bool, str, type(None))
        state = optimizer.state_dict()
        for entry in state["state"].values():
            assert all(isinstance(value, plain) for value in entry.values())
            assert not any(v.requires_grad for v in entry.values() if isinstance(v, torch.Tensor))
        for group in state["param_groups"]:
            assert all(isinstance(v, (*plain, tuple, list)) for v in group.values())


class TestRefused:
    def check(self, optimizer: NeuRMS, model: nn.Module, state: Any, message: str) -> None:
        before = snapshot(model, optimizer), copy.deepcopy(optimizer.state_dict())
        with pytest.raises(CheckpointError, match=message):
            optimizer.load_state_dict(state)
        assert_same(before, (snapshot(model, optimizer), optimizer.state_dict()))

    def test_checkpoints_of_others(self) -> None:
        model, optimizer = pair(variant="U", momentum=0.9)
        train(model, optimizer, batches(2))
        x, y = vectors()
        cross_entropy(model, x, y).backward()  # something is pending, too
        for other, message in (
            (NeuRMS(cnn(), variant="U"), "another model"),
            (NeuRMS(transposed(), variant="U"), "another model"),
            (torch.optim.SGD(mlp().named_parameters(), lr=1.0), "lacks"),
        ):
            self.check(optimizer, model, saved(other), message)
        self.check(optimizer, model, {}, "param_groups")
        self.check(optimizer, model, None, "param_groups")
        self.check(optimizer, model, {"state": {}, "param_groups": [3]}, "damaged")

    @pytest.mark.parametrize("own", ["U", "B", "F"])
    @pytest.mark.parametrize("variant", ["U", "B", "F"])
    def test_checkpoint_of_another_variant(self, own: str, variant: str) -> None:
        if own == variant:
            return
        model, optimizer = pair(variant=own)
        other, source = pair(variant=variant)
        self.check(optimizer, model, saved(source), f"variant='{variant}'.*variant='{own}'")
        train(other, source, batches(1))
        self.check(optimizer, model, saved(source), f"variant='{variant}'.*variant='{own}'")

    def test_checkpoint_of_other_sizes(self) -> None:
        model, optimizer = pair()
        wide = nn.Sequential(
            nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 3)
        )
        other = NeuRMS(wide, variant="U")
        train(wide, other, batches(1))
        self.check(optimizer, model, saved(other), r"'v' of '0.weight'.*\(9,\).*\(7,\)")

    def test_checkpoint_with_other_heads(self) -> None:
        model, optimizer = pair(heads={"2.weight": 2})
        other, source = pair()
        train(other, source, batches(1))
        self.check(optimizer, model, saved(source), r"'v' of '2.weight'")
