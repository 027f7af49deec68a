"""Who is under NeuRMS's rule, who goes to AdamW, and what if that turns out in training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurms import NeuRMS
from tests.core.unitwise.neurms_models import (
    assert_same,
    batches,
    cross_entropy,
    mlp,
    pair,
    snapshot,
    train,
    vectors,
)
from tests.core.unitwise.root_truth import inverse_root
from tests.core.unitwise.test_neurms_state import saved


def rules(optimizer: NeuRMS) -> dict[str, str]:
    return {row.name: row.rule for row in optimizer.plan()}


class Mixed(nn.Module):
    """One of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.hidden = nn.Linear(8, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight
        self.scale = nn.Parameter(torch.ones(8))
        self.last = nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.tokens(x))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.last(self.head(self.normed(F.relu(self.hidden(h))) * self.scale).mean(1))


def test_every_kind_of_parameter_has_its_place_and_its_reason() -> None:
    model = Mixed()
    optimizer = NeuRMS(model, variant="U")
    ours = {"hidden.weight", "hidden.bias", "last.weight", "last.bias"}
    assert {name for name, rule in rules(optimizer).items() if rule == "neurms"} == ours
    reasons = {row.name: row.reason for row in optimizer.plan()}
    assert reasons["tokens.weight"] == "tied: shared by 2 modules"
    assert "MultiheadAttention" in reasons["attention.in_proj_weight"]
    assert "MultiheadAttention" in reasons["attention.out_proj.weight"]
    assert reasons["hidden.bias"] == "bias of hidden.weight: scaled by its s"
    assert all(row.reason for row in optimizer.plan())


@pytest.mark.parametrize("update", ["step", "backward"])
def test_the_fallback_is_torchs_adamw(update: str) -> None:
    torch.manual_seed(0)
    model, twin = Mixed(), Mixed()
    twin.load_state_dict(model.state_dict())
    settings = {"fallback_lr": 0.003, "fallback_betas": (0.8, 0.9), "fallback_weight_decay": 0.1}
    optimizer = NeuRMS(model, lr=0.01, update=update, **{"variant": "U", **settings})
    rest = [twin.get_parameter(n) for n, rule in rules(optimizer).items() if rule == "fallback"]
    adamw = torch.optim.AdamW(rest, lr=0.003, betas=(0.8, 0.9), weight_decay=0.1)
    x, y = torch.randint(0, 11, (4, 5)), torch.tensor([0, 1, 2, 0])
    for _ in range(4):
        cross_entropy(model, x, y).backward()
        # The gradient of a key's bias is rounding noise, which AdamW blows up: give both the same.
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            b.grad = None if a.grad is None else a.grad.clone()
        optimizer.step()
        adamw.step()
        optimizer.zero_grad()
    for name, rule in rules(optimizer).items():
        if rule == "fallback":
            a, b = model.get_parameter(name), twin.get_parameter(name)
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_head_and_exclude() -> None:
    assert set(rules(NeuRMS(mlp(), variant="U")).values()) == {"neurms"}
    head = rules(NeuRMS(mlp(), head="fallback", variant="U"))
    assert {n for n, rule in head.items() if rule == "fallback"} == {"4.weight", "4.bias"}
    one = rules(NeuRMS(mlp(), exclude=("0", "*.bias"), variant="U"))
    assert {n for n, rule in one.items() if rule == "neurms"} == {"2.weight", "4.weight"}


def test_a_bias_shared_by_two_layers_is_scaled_by_neither() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].bias = model[0].bias
    optimizer = NeuRMS(model, variant="U")
    assert rules(optimizer) == {"0.weight": "neurms", "0.bias": "fallback", "2.weight": "neurms"}
    model(vectors()[0]).square().mean().backward()
    optimizer.step()


class TestHeads:
    def test_outputs_of_a_head_share_their_mean(self) -> None:
        model, twin = mlp().double(), mlp().double()
        optimizer = NeuRMS(model, heads={"2.*": 3}, lr=0.1, variant="U")
        x, y = vectors()
        x = x.double()
        kept: list[Tensor] = []
        twin[2].register_forward_hook(lambda m, a, out: kept.append(out))
        before = twin[2].weight.detach().clone()
        loss = cross_entropy(twin, x, y)
        (errors,) = torch.autograd.grad(loss, kept, retain_graph=True)
        loss.backward()
        train(model, optimizer, [(x, y)])
        v = (len(x) * errors).square().mean(0).reshape(3, 2).mean(1).repeat_interleave(2)
        s = inverse_root(v).clip(0, 100)
        torch.testing.assert_close(model[2].weight, before - 0.1 * s[:, None] * twin[2].weight.grad)
        assert optimizer.state[model[2].weight]["v"].shape == (3,)

    @pytest.mark.parametrize("update", ["step", "backward"])
    def test_the_first_pattern_wins_and_a_head_for_each_unit_is_no_head(self, update: str) -> None:
        data = batches(3)
        (model, optimizer), (twin, other) = pair(heads={"*": 1, "0.*": 7}, update=update), pair()
        assert optimizer.state_bytes() == 0
        train(model, optimizer, data)
        train(twin, other, data)
        # A pattern that comes first wins, so every layer has one head here.
        assert [optimizer.state[layer.weight]["v"].numel() for layer in optimizer.layers] == [1] * 3
        exact, third = pair(heads={"0.*": 7, "2.*": 6, "4.*": 3}, update=update)
        train(exact, third, data)
        for a, b in zip(exact.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


class Bypassing(nn.Module):
    """Uses a layer's weight without calling the layer, as fused kernels do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(5, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.linear(x, self.first.weight, self.first.bias).tanh())


class TestNeverCalled:
    @pytest.mark.parametrize("update", ["step", "backward"])
    @pytest.mark.parametrize("low_precision", ["nearest", "master"])
    def test_goes_to_adamw_says_so_once_and_comes_back_there(
        self, low_precision: str, update: str
    ) -> None:
        def make() -> tuple[nn.Module, NeuRMS]:
            model = Bypassing().bfloat16()
            settings: dict[str, Any] = {"low_precision": low_precision, "fallback_lr": 0.01}
            return model, NeuRMS(
                model, update=update, momentum=0.9, lr=0.02, **{"variant": "U", **settings}
            )

        data = [(x.bfloat16(), y) for x, y in batches(6)]
        model, optimizer = make()
        with pytest.warns(UserWarning, match=r"'first\.weight'.*never seen.*AdamW") as caught:
            train(model, optimizer, data[:1])
        assert len(caught) == 1
        assert caught[0].filename.endswith("neurms_models.py")  # the caller of step
        train(model, optimizer, data[1:3])  # warnings are errors here
        assert rules(optimizer) == {
            "first.weight": "fallback",
            "first.bias": "fallback",
            "second.weight": "neurms",
            "second.bias": "neurms",
        }
        assert optimizer.plan().state_bytes == optimizer.state_bytes()
        twin, other = make()
        twin.load_state_dict(model.state_dict())
        other.load_state_dict(saved(optimizer))
        assert rules(other) == rules(optimizer)
        train(model, optimizer, data[3:])
        train(twin, other, data[3:])
        assert_same(snapshot(model, optimizer), snapshot(twin, other))

    def test_a_layer_seen_later_is_waited_for(self) -> None:
        # Without a gradient there is nothing to decide: a branch may be used late.
        model, optimizer = pair()
        x, y = vectors()
        for _ in range(2):
            model[2:](torch.randn(4, 7)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        train(model, optimizer, [(x, y)])
        assert set(rules(optimizer).values()) == {"neurms"}
        assert optimizer.state[model[0].weight]["step"] == 1


class TestFrozen:
    def test_bias_of_a_frozen_weight(self) -> None:
        model = mlp()
        model[0].weight.requires_grad_(False)
        optimizer = NeuRMS(model, variant="U")
        twin = torch.nn.Parameter(model[0].bias.detach().clone())
        adamw = torch.optim.AdamW([twin], lr=1e-3, weight_decay=0.0)
        row = next(row for row in optimizer.plan() if row.name == "0.bias")
        assert (row.rule, row.reason[:24]) == ("fallback", "bias of a frozen weight,")
        for x, y in batches(3):
            cross_entropy(model, x, y).backward()
            twin.grad = model[0].bias.grad.clone()
            optimizer.step()
            adamw.step()
            optimizer.zero_grad()
        torch.testing.assert_close(model[0].bias, twin)

    def test_frozen_after_the_optimizer_was_made(self) -> None:
        model, optimizer = pair()
        model[0].weight.requires_grad_(False)
        before = model[0].bias.detach().clone()
        with pytest.warns(UserWarning, match=r"bias of layer '0\.weight'.*frozen.*AdamW"):
            train(model, optimizer, batches(1))
        train(model, optimizer, batches(2))
        assert not torch.equal(model[0].bias, before)
        twin, other = pair()
        twin[0].weight.requires_grad_(False)
        twin.load_state_dict(model.state_dict())
        other.load_state_dict(saved(optimizer))
        train(model, optimizer, batches(2))
        train(twin, other, batches(2))
        assert_same(snapshot(model, optimizer), snapshot(twin, other))

    @pytest.mark.parametrize("update", ["step", "backward"])
    def test_frozen_and_thawed_in_training(self, update: str) -> None:
        model, optimizer = pair(update=update)
        data = batches(3)
        train(model, optimizer, data[:1])
        weight = model[2].weight.requires_grad_(False)
        before, bias = weight.clone(), model[2].bias.detach().clone()
        train(model, optimizer, data[1:2])
        assert torch.equal(weight, before)
        assert not torch.equal(model[2].bias, bias)
        assert optimizer.state[weight]["step"] == 1
        weight.requires_grad_(True)
        train(model, optimizer, data[2:])
        assert not torch.equal(weight, before)
        assert optimizer.state[weight]["step"] == 2

    @pytest.mark.parametrize("update", ["step", "backward"])
    def test_all_frozen_at_first(self, update: str) -> None:
        model = mlp().requires_grad_(False)
        optimizer = NeuRMS(model, update=update, lr=0.05, variant="U")
        optimizer.step()
        model.requires_grad_(True)
        twin, other = pair()
        train(model, optimizer, batches(2))
        train(twin, other, batches(2))
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def loop(model: nn.Module, x: Tensor) -> Tensor:
    return model(model(x).tanh())


@pytest.mark.parametrize("variant", ["U", "F"])
def test_a_layer_used_twice_sums_both_uses(variant: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    optimizer = NeuRMS(layer, lr=0.1, variant=variant)
    x = torch.randn(6, 4, dtype=torch.float64)
    before = layer.weight.detach().clone()
    first = layer(x)
    second_input = first.tanh()
    second = layer(second_input)
    for tensor in (first, second):
        tensor.retain_grad()
    second.square().mean().backward()
    gradient = layer.weight.grad.clone()
    optimizer.step()
    errors, inputs = torch.cat([first.grad, second.grad]), torch.cat([x, second_input])
    s = inverse_root((12 * errors).square().mean(0))
    c = inverse_root(inputs.square().mean(0)) if variant == "F" else torch.ones(4)
    expected = before - 0.1 * s.clip(0, 100)[:, None] * gradient * c.clip(0, 100)
    torch.testing.assert_close(layer.weight.detach(), expected.detach())


@pytest.mark.parametrize("build", [lambda m: nn.Sequential(m, nn.Tanh(), m), lambda m: m])
def test_a_module_under_two_names_is_one_layer(build: Callable[[nn.Module], nn.Module]) -> None:
    model = build(nn.Linear(3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = NeuRMS(model, variant="U")
        model(torch.randn(2, 3)).sum().backward()
        optimizer.step()
    assert len(list(optimizer.layers)) == 1
    assert set(rules(optimizer).values()) == {"neurms"}
