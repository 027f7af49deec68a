"""Variant P in backward: no gradient is formed, and with full probes it is the step's update."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from neurms import NeuRMS
from neurms.core.ground.errors import NonFiniteError, UnsupportedTrainingError
from neurms.core.unitwise import probed
from tests.compiled.test_probes import hadamard

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def network(bias: bool = True) -> nn.Module:
    """Sides that are powers of two with the bias's column, for which there are full sets."""
    torch.manual_seed(1)
    n = 7 if bias else 8
    first, second = nn.Linear(n, 16, bias), nn.Linear(16, 8, False)
    last = nn.Linear(8, 4, False)
    layers = first, nn.Tanh(), second, nn.Tanh(), nn.LayerNorm(8), last
    return nn.Sequential(*layers).double()


def batch(step: int, width: int = 7) -> Tensor:
    return torch.randn(12, width, generator=torch.Generator().manual_seed(step)).double()


def backward(model: nn.Module, x: Tensor, parts: int = 1) -> None:
    for part in x.chunk(parts):
        (model(part).square().mean() / parts).backward()


def train(model: nn.Module, optimizer: NeuRMS, steps: range, parts: int = 1) -> None:
    width = model[0].in_features
    for step in steps:
        optimizer.zero_grad()
        backward(model, batch(step, width), parts)
        optimizer.step()


def full_probes(seed: int, step: int, sizes: tuple[int, int], count: int, like: Tensor) -> Any:
    """Stand in for random probes; more columns than are needed change no mean."""
    return tuple(hadamard(size) for size in sizes)


def assert_equal(a: nn.Module, b: nn.Module, rtol: float = 0.0, atol: float = 0.0) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_full_probes_make_it_the_step(
    momentum: float, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probed, "drawn_probes", full_probes)
    one, other = network(bias), network(bias)
    settings: Any = {"momentum": momentum, "weight_decay": 0.1, "lr": 0.02, "variant": "P"}
    in_backward = NeuRMS(one, update="backward", **settings)
    at_step = NeuRMS(other, **settings)
    assert in_backward.plan().state_bytes == at_step.plan().state_bytes
    train(one, in_backward, range(10))
    train(other, at_step, range(10))
    assert one[0].weight.grad is None
    assert_equal(one, other, **EXACT)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        a, b = in_backward.state[p], at_step.state[q]
        assert a.keys() == b.keys()
        assert a["step"] == b["step"] == 10
    assert in_backward.state_bytes() == in_backward.plan().state_bytes


def test_a_weight_of_an_unwatched_layer_moves_at_the_step() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(8, 3)).double()
    optimizer = NeuRMS(model, variant="P", update="backward")
    before = copy.deepcopy(model)
    model(torch.randn(5, 2, 4).double()).square().mean().backward()
    assert not torch.equal(before[2].weight, model[2].weight)
    assert torch.equal(before[0].weight, model[0].weight)
    optimizer.step()
    assert not torch.equal(before[0].weight, model[0].weight)
    assert not torch.equal(before[2].bias, model[2].bias)


def test_parts_of_a_batch_are_the_batch_with_momentum() -> None:
    whole, parts = network(), network()
    settings: Any = {"momentum": 0.5, "variant": "P", "update": "backward"}
    train(whole, NeuRMS(whole, **settings), range(6))
    train(parts, NeuRMS(parts, **settings), range(6), parts=4)
    assert_equal(whole, parts, rtol=1e-10, atol=1e-12)


def test_a_layer_may_be_used_twice_with_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probed, "drawn_probes", full_probes)
    results = []
    for update in ("backward", "step"):
        torch.manual_seed(0)
        layer = nn.Linear(8, 8, bias=False).double()
        optimizer = NeuRMS(layer, variant="P", momentum=0.5, update=update)  # type: ignore[arg-type]
        for step in range(3):
            layer(torch.tanh(layer(batch(step, 8)))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(layer.weight)
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_resumes_bit_for_bit(momentum: float) -> None:
    settings: Any = {"momentum": momentum, "variant": "P", "update": "backward", "seed": 3}
    model = network()
    optimizer = NeuRMS(model, **settings)
    train(model, optimizer, range(3))
    twin = network()
    other = NeuRMS(twin, **settings)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(3, 6))
    train(twin, other, range(3, 6))
    assert_equal(model, twin)


def test_the_seed_has_a_say() -> None:
    models = [network() for _ in range(2)]
    for seed, model in enumerate(models):
        train(model, NeuRMS(model, variant="P", update="backward", seed=seed), range(1))
    assert not torch.equal(models[0][0].weight, models[1][0].weight)


class _Largest(TorchDispatchMode):
    """Writes down the largest tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        held = {x.data_ptr() for x in args if isinstance(x, Tensor)}
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, Tensor) and x.numel() and x.data_ptr() not in held:
                self.numel = max(self.numel, x.numel())
        return made


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("gemm", ["float32", "bfloat16"])
def test_nothing_of_the_gradients_size_is_made(momentum: float, gemm: Any) -> None:
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    sizes: dict[str, int] = {}
    for update in ("backward", "step"):
        more = {"gemm": gemm} if update == "backward" else {}
        optimizer = NeuRMS(model, variant="P", update=update, momentum=momentum, **more)  # type: ignore[arg-type]
        for _ in range(2):
            optimizer.zero_grad()
            with _Largest() as largest, torch.profiler.profile(profile_memory=True) as profile:
                model(torch.randn(8, 256)).square().mean().backward()
                optimizer.step()
        optimizer.detach()
        sizes[update] = max(
            largest.numel,
            # Negative numbers are what an operator frees.
            *(event.self_cpu_memory_usage // 4 for event in profile.events()),
        )
    assert sizes["step"] >= 512 * 256, "a gradient that cannot be seen shows nothing"
    assert sizes["backward"] < 512 * 256 // 8


class TestRefusals:
    def test_parts_of_a_batch_without_momentum(self) -> None:
        model = network()
        optimizer = NeuRMS(model, variant="P", update="backward")
        backward(model, batch(0))
        assert optimizer.update_mode == "backward"
        with pytest.raises(UnsupportedTrainingError, match="second backward"):
            backward(model, batch(0))

    @pytest.mark.parametrize("momentum", [0.0, 0.5])
    def test_clipping(self, momentum: float) -> None:
        model = network()
        optimizer = NeuRMS(model, variant="P", update="backward", momentum=momentum)
        backward(model, batch(0))
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        with pytest.raises(UnsupportedTrainingError, match="clipping"):
            optimizer.step()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("momentum", [0.0, 0.5])
    def test_bad_signals(self, momentum: float, value: float) -> None:
        model = network()
        optimizer = NeuRMS(model, variant="P", update="backward", momentum=momentum)
        train(model, optimizer, range(2))
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
        x = batch(3)
        x[0, 0] = value
        optimizer.zero_grad()
        with pytest.raises(NonFiniteError, match="NaN or infinite"):
            backward(model, x)
        after = model.state_dict(), optimizer.state_dict()["state"]
        for one, other in zip(before, after, strict=True):
            # A NaN stops the backward's first layer; an infinity that tanh hides, its last.
            kept = other if value != value else sorted(other)[:1]
            for key in kept:
                torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)

    def test_bad_signals_may_be_left_out(self) -> None:
        model = network()
        optimizer = NeuRMS(model, variant="P", update="backward", nonfinite="skip")
        before = copy.deepcopy(model)
        x = batch(3)
        x[0, 0] = float("nan")
        backward(model, x)
        optimizer.step()
        assert optimizer.skipped_steps == 1
        assert_equal(model, before)
        train(model, optimizer, range(1))
        assert not torch.equal(model[0].weight, before[0].weight)

    def test_momentum_that_begins_later(self) -> None:
        model = network()
        optimizer = NeuRMS(model, variant="P", update="backward")
        optimizer.param_groups[0]["momentum"] = 0.5
        with pytest.raises(ValueError, match="cannot begin or end"):
            backward(model, batch(0))

    def test_gradients_dropped_after_backward(self) -> None:
        model = network()
        optimizer = NeuRMS(model, variant="P", update="backward", momentum=0.5)
        backward(model, batch(0))
        with pytest.warns(UserWarning, match="before step"):
            optimizer.zero_grad()

    def test_plain_parameters(self) -> None:
        with pytest.raises(TypeError, match=r"must be an nn\.Module"):
            NeuRMS([torch.ones(2, 2)], variant="P", update="backward")

    @pytest.mark.parametrize("count", [0, 1.5, True])
    def test_numbers_of_probes(self, count: Any) -> None:
        with pytest.raises((TypeError, ValueError), match="probes"):
            NeuRMS(network(), variant="P", probes=count)


def test_statistics_are_committed_where_no_parameter_has_a_gradient() -> None:
    for variant in ("U", "P"):
        layer = nn.Linear(3, 2, bias=False)
        optimizer = NeuRMS(layer, variant=variant, update="backward")  # type: ignore[arg-type]
        for _ in range(2):
            layer(torch.ones(4, 3)).sum().backward()
            optimizer.step()
        assert optimizer.state[layer.weight]["step"] == 2


def test_detached_layers_are_plain_again() -> None:
    model = network()
    with NeuRMS(model, variant="P", update="backward"):
        assert type(model[0]) is not nn.Linear
    assert type(model[0]) is nn.Linear


def test_a_weight_pruned_before_moves_at_the_step() -> None:
    results = []
    for update in ("backward", "step"):
        model = network()
        for index in (0, 2, 5):
            prune.l1_unstructured(model[index], "weight", 0.5)
        optimizer = NeuRMS(model, variant="P", update=update)  # type: ignore[arg-type]
        train(model, optimizer, range(3))
        assert model[2].weight_orig.grad is not None
        results.append(model)
    assert_equal(*results)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_batch_without_rows(momentum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a gradient of zero where that enters an average, and no step where nothing would."""
    monkeypatch.setattr(probed, "drawn_probes", full_probes)
    results = []
    for update in ("backward", "step"):
        model = network()
        optimizer = NeuRMS(model, variant="P", momentum=momentum, update=update)  # type: ignore[arg-type]
        train(model, optimizer, range(2))
        optimizer.zero_grad()
        before = copy.deepcopy(model)
        model(batch(0)[:0]).sum().backward()
        optimizer.step()
        results.append(model)
        moved = not torch.equal(before[0].weight, model[0].weight)
        assert moved is (momentum > 0)
    if momentum:
        assert_equal(*results, **EXACT)
