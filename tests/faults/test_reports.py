"""What users of other optimizers have reported, asked of ours.

Threads are named where a test is what one of them shows.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import neurms
from neurms.core.ground.errors import UnsupportedTrainingError
from tests.faults.rules import RULES, SMALL

OF_PARAMETERS = [rule for rule in RULES if rule != "neurms"]
KINDS = ["neurms", "rmnp", "alice", "soap", "galore"]
"""One of each way to keep state."""


class Branches(nn.Module):
    """A part that is always trained, and one that is trained at times."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(5)
        layers = nn.Conv1d(3, 6, 2), nn.GELU(), nn.Flatten(), nn.Linear(24, 9), nn.Linear(9, 4)
        self.always = nn.Sequential(*layers)
        self.at_times = nn.Sequential(nn.Flatten(), nn.Linear(15, 7), nn.Linear(7, 4))
        self.both = True
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.always(x)
        return y + self.at_times(x) if self.both else y


def made(rule: str, model: Any, **settings: Any) -> Any:
    return neurms.create(rule, model, **SMALL.get(rule, {}), **settings)


def train(model: nn.Module, optimizer: Any, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    like = next(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        signal = torch.randn(5, 3, 5, generator=generator).to(like)
        model(signal).square().mean().backward()
        optimizer.step()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(list(a.parameters()), list(b.parameters()), rtol=0, atol=0)


# -------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("rule", RULES)
def test_state_comes_back_in_its_own_dtype(rule: str, low_precision: str) -> None:
    """pytorch#43706: state of float16 and bfloat16 parameters is cast to their dtype."""
    model = Branches(torch.bfloat16)
    optimizer = made(rule, model, low_precision=low_precision)
    train(model, optimizer, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = Branches(torch.bfloat16)
    twin.load_state_dict(model.state_dict())
    restored = made(rule, twin, low_precision=low_precision)
    restored.load_state_dict(torch.load(file, weights_only=True))
    for one, other in zip(optimizer.state.values(), restored.state.values(), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, Tensor):
                assert value.dtype == other[key].dtype != torch.bfloat16
                torch.testing.assert_close(other[key], value, rtol=0, atol=0)
    train(model, optimizer, 2)
    train(twin, restored, 2)
    assert_same(model, twin)


@pytest.mark.parametrize("rule", RULES)
def test_what_was_never_trained_is_missing_in_a_checkpoint_and_trains_later(rule: str) -> None:
    """prime-rl#3399, facebookresearch/optimizers#271, GaLore#35."""
    model, twin = Branches(), Branches()
    model.both = False
    optimizer, restored = made(rule, model), made(rule, twin)
    train(model, optimizer, 3)
    twin.load_state_dict(model.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(restored.state) == len(list(model.always.parameters()))
    for both in (False, True):
        model.both = twin.both = both
        train(model, optimizer, 2, seed=int(both))
        train(twin, restored, 2, seed=int(both))
    assert_same(model, twin)


@pytest.mark.parametrize("rule", RULES)
def test_asking_for_the_form_of_the_state_counts_no_step(rule: str) -> None:
    """Megatron-Bridge#5680, KempnerForge#115: torch.distributed.checkpoint takes an empty step."""
    model, twin = Branches(), Branches()
    optimizer, asked = made(rule, model), made(rule, twin)
    get_optimizer_state_dict(twin, asked)
    train(model, optimizer, 2)
    train(twin, asked, 2)
    assert_same(model, twin)
    third = Branches()
    third.load_state_dict(model.state_dict())
    restored = made(rule, third)
    set_optimizer_state_dict(third, restored, get_optimizer_state_dict(model, optimizer))
    train(model, optimizer, 2)
    train(third, restored, 2)
    assert_same(model, third)


# -------------------------------------------------------------------- groups and parameters


@pytest.mark.parametrize("rule", RULES)
def test_zero_grad_reaches_what_the_fallback_has(rule: str) -> None:
    """KempnerForge#182: only the matrices' gradients were dropped."""
    model = Branches()
    optimizer = made(rule, model)
    for to_none in (True, False):
        model(torch.ones(2, 3, 5)).sum().backward()
        optimizer.zero_grad(set_to_none=to_none)
        left = [p.grad for p in model.parameters()]
        assert all(g is None if to_none else not g.any() for g in left)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_one_kind_of_parameter_may_be_all_that_is_trained(rule: str, kind: str) -> None:
    """DeepSpeed#7869: the group of the other kind was left with frozen parameters only."""
    model = Branches()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(kind))
    before = copy.deepcopy(model)
    optimizer = made(rule, model)
    train(model, optimizer, 2)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for (name, now), then in zip(model.named_parameters(), before.parameters(), strict=True):
        assert bool((now != then).any()) == name.endswith(kind), name


@pytest.mark.parametrize("rule", OF_PARAMETERS)
def test_groups_keep_their_rates_and_decays(rule: str) -> None:
    """DeepSpeed#8440: groups of the caller's were rebuilt from the configuration."""
    own = list(Branches().named_parameters())
    matrices = {"params": [p for p in own if p[1].ndim > 1], "weight_decay": 0.1, "lr": 1e-3}
    vectors = {"params": [p for p in own if p[1].ndim < 2], "weight_decay": 0.0, "lr": 1e-4}
    optimizer = made(rule, [matrices, vectors], lr=5e-4, weight_decay=0.01, fallback_lr=1e-2)
    first, second = optimizer.param_groups
    assert (first["lr"], first["weight_decay"]) == (1e-3, 0.1)
    assert (second["lr"], second["weight_decay"]) == (1e-4, 0.0)
    assert optimizer.fallback_lr(second) == pytest.approx(1e-2 * 1e-4 / 5e-4)


@pytest.mark.parametrize("rule", OF_PARAMETERS)
def test_parameters_from_a_generator_are_all_taken(rule: str) -> None:
    """prime-rl#1433: a second pass over a generator found nothing."""
    model = Branches()

    def groups() -> Iterator[dict[str, Any]]:
        for part in (model.always, model.at_times):
            yield {"params": (p for p in part.parameters())}

    optimizer = made(rule, groups())
    train(model, optimizer, 1)
    assert len(optimizer.state) == len(list(model.parameters()))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("rule", KINDS)
def test_matrices_that_are_flattened_are_missed(rule: str, named: bool) -> None:
    """DeepSpeed#8461: ZeRO puts a vector in their place, and every parameter reads as 1-D."""
    model = Branches()
    optimizer = made(rule, model)
    for group in optimizer.param_groups:
        flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in group["params"]]))
        flat.grad = torch.ones_like(flat)
        group["params"] = [flat]
        if not named:
            del group["param_names"]
    with pytest.raises(UnsupportedTrainingError, match=r"'always\.0\.weight' holds a vector of"):
        optimizer.step()


@pytest.mark.parametrize("rule", ["neurms", "rmnp"])
def test_placeholders_of_zero_are_refused(rule: str) -> None:
    """DeepSpeed#8438: a partitioned parameter has the shape (0,), so that no rule took it."""
    model = Branches()
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    with pytest.raises(UnsupportedTrainingError, match=r"placeholder of DeepSpeed's ZeRO-3"):
        made(rule, model)
    if rule != "neurms":
        with pytest.raises(UnsupportedTrainingError, match=r"of shape \(6, 3, 2\)"):
            made(rule, model.parameters())


def test_flat_pieces_are_refused() -> None:
    """The same of FSDP1, whose parameters come without their model."""
    pytest.importorskip("torch.distributed.fsdp")
    flat = nn.Parameter(torch.ones(12))
    flat._is_flat_param = True
    with pytest.raises(UnsupportedTrainingError, match="flat piece of FullyShardedDataParallel"):
        neurms.RMNP([flat])


# -------------------------------------------------------------------- numbers


@pytest.mark.parametrize("rule", ["rmnp", "racs", "alice"])
def test_weight_decay_below_the_resolution_of_bfloat16_is_not_lost(rule: str) -> None:
    """OneTrainer#996: 1 - lr weight_decay rounds to 1 in bfloat16."""
    for low_precision, kept in (("master", 0.999**20), ("stochastic", 0.999**20)):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        settings = {"lr": 1e-2, "weight_decay": 0.1, "low_precision": low_precision}
        optimizer = made(rule, [("weight", weight)], **settings)
        for _ in range(20):
            weight.grad = torch.zeros_like(weight)
            optimizer.step()
        assert float(weight.detach().float().mean()) == pytest.approx(kept, abs=2e-3)


# -------------------------------------------------------------------- closures


@pytest.mark.parametrize("rule", RULES)
def test_a_closure_that_computes_the_gradient_is_a_step_like_any(rule: str) -> None:
    """peft#3382: what a closure computes escaped the preconditioner."""
    model, twin = Branches(), Branches()
    optimizer, plain = made(rule, model), made(rule, twin)
    signal = torch.randn(5, 3, 5, generator=torch.Generator().manual_seed(0))

    def closure(net: nn.Module = model, own: Any = optimizer) -> Tensor:
        own.zero_grad()
        loss: Tensor = net(signal).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
        closure(twin, plain)
        plain.step()
    assert_same(model, twin)


@pytest.mark.parametrize("rule", ["rmnp", "neurms"])
def test_a_step_in_a_full_graph_says_why_it_cannot(rule: str) -> None:
    model = Branches()
    optimizer = made(rule, model)
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    model(torch.ones(2, 3, 5)).sum().backward()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="leave fullgraph=True off the step"):
        step()
