"""Momentum that takes the gradient in backward trains as the rule does with gradients."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import neurms
from neurms.core.ground.errors import CheckpointError
from tests.core.optimizers.momentum_models import (
    AVERAGES,
    LINEAR,
    RULES,
    assert_close,
    assert_same,
    backward,
    batch,
    made,
    network,
    pair,
    snapshot,
    train,
)

STEPS = 25
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


class TestTrajectory:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("parts", [1, 4])
    @pytest.mark.parametrize("name", RULES)
    def test_it_is_the_rules_own(self, name: str, parts: int, dtype: torch.dtype) -> None:
        if parts > 1 and name not in AVERAGES:
            pytest.skip("its ratio needs all of the gradient at once")
        (model, optimizer), (twin, other) = pair(name, dtype, weight_decay=0.1)
        start = copy.deepcopy(model)
        for m, o in ((model, optimizer), (twin, other)):
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS)
            for step in range(STEPS):
                train(m, o, [step], parts)
                schedule.step()
        assert_close(model, twin, TOLERANCE[dtype])
        for (key, p), q, r in zip(
            model.named_parameters(), twin.parameters(), start.parameters(), strict=True
        ):
            assert (p.grad is None) is (key in LINEAR)
            assert not torch.equal(p, r)
            mine, theirs = optimizer.state[p], other.state[q]
            assert mine.keys() == theirs.keys()
            assert mine["step"] == theirs["step"] == STEPS
        assert optimizer.state_bytes() == other.state_bytes() == optimizer.plan().state_bytes

    @pytest.mark.parametrize("name", RULES)
    def test_ascending(self, name: str) -> None:
        (model, optimizer), (twin, other) = pair(name, maximize=True, weight_decay=0.1)
        train(model, optimizer, range(5))
        train(twin, other, range(5))
        assert_close(model, twin, 1e-12)

    @pytest.mark.parametrize("name", AVERAGES)
    def test_a_momentum_that_a_schedule_changes(self, name: str) -> None:
        (model, optimizer), (twin, other) = pair(name)
        for m, o in ((model, optimizer), (twin, other)):
            schedule = torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=10)
            for step in range(8):
                train(m, o, [step])
                schedule.step()
            assert o.param_groups[0]["momentum"] != 0.8
        assert_close(model, twin, 1e-12)

    @pytest.mark.parametrize("name", AVERAGES)
    def test_parts_of_different_sizes_and_an_empty_one(self, name: str) -> None:
        (model, optimizer), (twin, other) = pair(name)
        for m, o in ((model, optimizer), (twin, other)):
            for step in range(4):
                x, y = batch(step)
                for a, b in ((0, 5), (5, 5), (5, 12)):
                    F.cross_entropy(m(x[a:b]), y[a:b], reduction="sum").backward()
                o.step()
                o.zero_grad()
        assert_close(model, twin, 1e-12)

    @pytest.mark.parametrize("name", RULES)
    def test_a_batch_without_rows_is_a_gradient_of_zero(self, name: str) -> None:
        (model, optimizer), (twin, other) = pair(name, weight_decay=0.1)
        for m, o in ((model, optimizer), (twin, other)):
            train(m, o, range(3))
            o.zero_grad()
            m(batch(0)[0][:0]).sum().backward()
            o.step()
        assert_close(model, twin, 1e-12)

    @pytest.mark.parametrize("name", AVERAGES)
    def test_a_module_that_is_used_twice(self, name: str) -> None:
        results = []
        for update in ("backward", "step"):
            torch.manual_seed(0)
            layer = nn.Linear(8, 8).double()
            optimizer = made(name, nn.Sequential(layer), update=update)
            for step in range(5):
                x = batch(step)[0][:, 0]
                layer(torch.tanh(layer(x))).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            results.append(layer)
        assert_close(*results, 1e-12)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("name", RULES)
    def test_gradient_checkpointing(self, name: str, reentrant: bool) -> None:
        results = []
        for update in ("backward", "step"):
            model = network()
            optimizer = made(name, model, update=update)
            for step in range(5):
                optimizer.zero_grad()
                x, y = batch(step)
                hidden = model[:2](x)
                middle = checkpoint(model[2:6], hidden, use_reentrant=reentrant)
                F.cross_entropy(model[6:](middle), y).backward()
                optimizer.step()
            results.append(model)
        assert_close(*results, 1e-12)

    @pytest.mark.parametrize("name", RULES)
    def test_other_passes_in_between_change_nothing(self, name: str) -> None:
        (model, optimizer), (twin, other) = pair(name), pair(name)
        model, optimizer, twin, other = *model, *twin
        x, _ = batch(9)
        for step in range(3):
            train(model, optimizer, [step])
            optimizer.zero_grad()
            backward(twin, step)
            before = snapshot(twin, other)
            with torch.no_grad():
                twin(x)
            with torch.inference_mode():
                twin.eval()(x)
            ahead = x.clone().requires_grad_()
            torch.autograd.grad(twin.train()(ahead).sum(), ahead)
            assert_same(before, snapshot(twin, other))
            other.step()
            other.zero_grad()
        assert_same(snapshot(model, optimizer), snapshot(twin, other))

    @pytest.mark.parametrize("name", RULES)
    def test_a_closure(self, name: str) -> None:
        (model, optimizer), (twin, other) = pair(name)
        for m, o in ((model, optimizer), (twin, other)):
            for step in range(4):

                def closure(m: nn.Module = m, o: Any = o, step: int = step) -> Tensor:
                    o.zero_grad()
                    loss = F.cross_entropy(m(batch(step)[0]), batch(step)[1])
                    loss.backward()
                    return loss.detach()

                assert float(o.step(closure)) > 0
        assert_close(model, twin, 1e-12)

    def test_layers_that_a_step_does_not_reach_stay(self) -> None:
        model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).double()
        optimizer = made("rmnp", model, update="backward", weight_decay=0.5)
        for _ in range(2):
            model[0](torch.ones(3, 4).double()).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.state[model[0].weight]["step"] == 2
        assert model[1].weight not in optimizer.state

    def test_a_step_without_any_gradient(self) -> None:
        results = []
        for update in ("backward", "step"):
            torch.manual_seed(0)
            layer = nn.Linear(6, 5, bias=False).double()
            optimizer = made("rmnp", nn.Sequential(layer), update=update)
            optimizer.step()
            for seed in range(3):
                torch.manual_seed(seed)
                layer(torch.randn(4, 6).double()).square().sum().backward()
                assert (layer.weight.grad is None) is (update == "backward")
                optimizer.step()
                optimizer.zero_grad()
            results.append(layer)
        assert_close(*results, 1e-12)

    def test_groups_of_other_rules_and_rates(self) -> None:
        results = []
        for update in ("backward", "step"):
            model = network()
            groups = [
                {"params": model[2], "rule": "muon", "nesterov": False},
                {"params": model[4], "lr": 0.1, "momentum": 0.5},
            ]
            optimizer = made("rmnp", model, update=update, groups=groups)
            train(model, optimizer, range(4))
            results.append(model)
        ours, theirs = results
        assert ours[2].weight.grad is not None, "Muon is another rule here"
        assert ours[4].weight.grad is None
        assert_close(ours, theirs, 1e-12)


class TestPrecision:
    @pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
    @pytest.mark.parametrize("name", RULES)
    def test_bfloat16_parameters(self, name: str, low_precision: Any) -> None:
        """The product is summed in float32; autograd's gradient is rounded to bfloat16."""
        (model, optimizer), (twin, other) = pair(name, torch.bfloat16, low_precision=low_precision)
        train(model, optimizer, range(8))
        train(twin, other, range(8))
        assert_close(model, twin, 0.03)
        weight = model[4].weight
        assert weight.dtype is torch.bfloat16
        assert optimizer.state[weight]["momentum"].dtype is torch.float32
        assert ("master" in optimizer.state[weight]) is (low_precision == "master")

    @pytest.mark.parametrize("name", RULES)
    def test_autocast(self, name: str) -> None:
        (model, optimizer), (twin, other) = pair(name, torch.float32)
        for m, o in ((model, optimizer), (twin, other)):
            for step in range(8):
                x, y = batch(step, torch.float32)
                with torch.autocast("cpu", torch.bfloat16):
                    loss = F.cross_entropy(m(x).float(), y)
                loss.backward()
                o.step()
                o.zero_grad()
        assert_close(model, twin, 0.03)

    def test_a_model_that_changes_its_dtype(self) -> None:
        (model, optimizer), (twin, other) = pair("rmnp", torch.float32)
        for m, o in ((model, optimizer), (twin, other)):
            train(m, o, range(3))
            m.double()
            train(m, o, range(3, 6))
        assert optimizer.state[model[4].weight]["momentum"].dtype is torch.float64
        assert_close(model, twin, 1e-5)


class _Largest(TorchDispatchMode):
    """Writes down the largest tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        held = {x.data_ptr() for x in args if isinstance(x, Tensor)}
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x.numel() and x.data_ptr() not in held:
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("name", ["rmnp", "lars"])
def test_nothing_of_the_gradients_size_is_made(name: str) -> None:
    """In the step either, of which Muon and Nora need room for their update."""
    sizes: dict[str, int] = {}
    for update in ("backward", "step"):
        model = nn.Sequential(nn.Linear(512, 1024), nn.ReLU(), nn.Linear(1024, 512))
        optimizer = made(name, model, update=update, weight_decay=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            with _Largest() as largest, torch.profiler.profile(profile_memory=True) as profile:
                model(torch.randn(8, 512)).square().mean().backward()
                optimizer.step()
        sizes[update] = max(
            largest.numel,
            # Negative numbers are what an operator frees.
            *(event.self_cpu_memory_usage // 4 for event in profile.events()),
        )
    assert sizes["step"] >= 512 * 1024, "a gradient that cannot be seen shows nothing"
    # A few rows at a time is what the length of LARS's gradient is made of.
    assert sizes["backward"] <= 512 * 1024 // 4


class TestPlan:
    @pytest.mark.parametrize("name", RULES)
    def test_it_tells_what_is_saved(self, name: str) -> None:
        model = network(torch.float32)
        before = [type(module) for module in model.modules()]
        settings: Any = {"head": "rule", "nesterov": False, "momentum": 0.9}
        report = neurms.memory_report(model, name, update="backward", **settings)
        plain = neurms.memory_report(model, name, **settings)
        assert [type(module) for module in model.modules()] == before, "the model is only read"
        optimizer = made(name, model, update="backward")
        train(model, optimizer, [0])
        unformed = sum(p.nbytes for n, p in model.named_parameters() if n in LINEAR)
        assert report.unformed_bytes == optimizer.plan().unformed_bytes == unformed
        assert report.state_bytes == plain.state_bytes == optimizer.state_bytes()
        assert plain.unformed_bytes == 0
        assert {row.name for row in report if row.unformed_bytes} == set(LINEAR)
        assert "gradients never formed" in str(report)
        assert f"{unformed:,}" in str(report)
        assert "never formed" not in str(plain)

    def test_of_neurms_too(self) -> None:
        model = network(torch.float32)
        for settings in ({"variant": "P"}, {"variant": "U"}):
            report = neurms.memory_report(model, "neurms", update="backward", **settings)
            assert {row.name for row in report if row.unformed_bytes} == set(LINEAR)
            assert neurms.memory_report(model, "neurms", **settings).unformed_bytes == 0


class TestCheckpoints:
    @pytest.mark.parametrize("name", RULES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_resumes_bit_for_bit(self, name: str, dtype: torch.dtype) -> None:
        model = network(dtype)
        optimizer = made(name, model, update="backward", weight_decay=0.1)
        train(model, optimizer, range(3))
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        twin = network(dtype)
        train(twin, made(name, twin), [7])
        other = made(name, twin, update="backward", weight_decay=0.1)
        twin.load_state_dict(saved[0])
        other.load_state_dict(saved[1])
        train(model, optimizer, range(3, 6))
        train(twin, other, range(3, 6))
        assert_same(snapshot(model, optimizer), snapshot(twin, other))

    @pytest.mark.parametrize(("first", "then"), [("step", "backward"), ("backward", "step")])
    def test_one_mode_goes_on_with_the_others(self, first: str, then: str) -> None:
        model = network()
        train(model, optimizer := made("rmnp", model, update=first), range(3))
        weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        twin = network()
        twin.load_state_dict(weights)
        other = made("rmnp", twin, update=then)
        other.load_state_dict(state)
        train(model, optimizer, range(3, 6))
        train(twin, other, range(3, 6))
        assert_close(model, twin, 1e-12)

    @pytest.mark.parametrize("settings", [{"nesterov": True}, {"momentum": 0.0}])
    def test_of_settings_that_the_mode_cannot_have(self, settings: dict[str, Any]) -> None:
        model, twin = network(), network()
        train(model, optimizer := made("rmnp", model, **settings), [0])
        other = made("rmnp", twin, update="backward")
        before = snapshot(twin, other)
        with pytest.raises(CheckpointError):
            other.load_state_dict(optimizer.state_dict())
        assert_same(before, snapshot(twin, other))
        train(twin, other, [0])

    def test_between_backward_and_step(self) -> None:
        model = network()
        optimizer = made("rmnp", model, update="backward")
        saved = copy.deepcopy(optimizer.state_dict())
        backward(model, 0)
        with pytest.raises(CheckpointError, match=r"state_dict\(\) between.*after step\(\)"):
            optimizer.state_dict()
        with pytest.raises(CheckpointError, match=r"load_state_dict\(\) between"):
            optimizer.load_state_dict(saved)
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(saved)
        backward(model, 1)
        with pytest.warns(UserWarning, match="before step"):
            optimizer.zero_grad()
        optimizer.load_state_dict(saved)
        assert optimizer.state_dict()["state"].keys() == saved["state"].keys()

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
    def test_copies(self, duplicate: Any) -> None:
        model = network()
        optimizer = made("rmnp", model, update="backward")
        with pytest.raises(TypeError, match="tied to its model by taps"):
            duplicate(optimizer)
        copied = copy.deepcopy(model)
        assert type(copied[4]) is nn.Linear, "a copy of the model is a plain one"
        copied(batch(0)[0]).sum().backward()
        assert copied[4].weight.grad is not None

    def test_copies_at_the_step(self) -> None:
        model = network()
        train(model, optimizer := made("rmnp", model), [0])
        other = pickle.loads(pickle.dumps(optimizer))
        assert other.update_mode == "step"
        assert copy.deepcopy(optimizer).momentum_layers is None
