"""Layers that are pruned, parametrized, copied or scripted after their optimizer was built."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.nn.utils import parametrize, prune

import neurms
from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.taps.hooks import HookTap


def convolutional() -> nn.Sequential:
    torch.manual_seed(3)
    layers = (nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 4, 7), nn.Linear(7, 2))
    return nn.Sequential(*layers).double()


def train(model: nn.Module, optimizer: Any, steps: int, scale: float = 1.0, seed: int = 0) -> None:
    torch.manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        images = torch.randn(6, 2, 4, 4, dtype=torch.float64)
        (scale * model(images).square().mean()).backward()
        optimizer.step()


class Same(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.0


CHANGES = {
    "mask": lambda layer: prune.custom_from_mask(layer, "weight", torch.ones_like(layer.weight)),
    "mask of the bias": lambda layer: prune.identity(layer, "bias"),
    "parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Same()),
}


@pytest.mark.filterwarnings("ignore:layer .* was parametrized since")
@pytest.mark.parametrize("variant", ["U", "F", "B", "P"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("position", [0, 3])
def test_a_change_that_changes_no_number_changes_nothing(
    variant: Any, change: str, position: int
) -> None:
    found = []
    for changed in (False, True):
        model = convolutional()
        optimizer = neurms.NeuRMS(model, lr=1e-2, variant=variant, momentum=0.5)
        weights = list(model.parameters())
        train(model, optimizer, 3)
        if changed:
            CHANGES[change](model[position])
        # Other gradients than before, so that statistics that stood still would show.
        train(model, optimizer, 4, scale=30.0, seed=1)
        steps = [optimizer.state[weight]["step"] for weight in weights]
        found.append((steps, [weight.detach() for weight in weights]))
    assert found[0][0] == found[1][0] == [7] * 6
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=0)


def test_a_pruned_weight_moves_by_its_masked_gradient() -> None:
    model = convolutional()
    optimizer = neurms.NeuRMS(model, lr=1e-2, variant="U")
    train(model, optimizer, 1)
    weight = model[3].weight
    before = weight.detach().clone()
    prune.custom_from_mask(model[3], "weight", torch.arange(20).remainder(2).expand(7, 20))
    train(model, optimizer, 2)
    moved = (weight.detach() - before).abs().amax(0)
    assert moved[::2].max() == 0.0
    assert moved[1::2].min() > 0.0


@pytest.mark.parametrize("change", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_is_gone_is_named(change: Any) -> None:
    model = convolutional()
    optimizer = neurms.NeuRMS(model, lr=1e-2, variant="U")
    train(model, optimizer, 1)
    change(model[3])
    with pytest.warns(UserWarning, match=r"layer '3\.weight' no longer holds the weight"):
        train(model, optimizer, 1)


@pytest.mark.parametrize("variant", ["U", "F", "B", "P"])
def test_a_mask_that_is_taken_off_again_changes_nothing(variant: Any) -> None:
    found = []
    for pruned in (False, True):
        model = convolutional()
        optimizer = neurms.NeuRMS(model, lr=1e-2, variant=variant)
        weights = list(model.parameters())
        for change in (prune.identity, prune.remove):
            train(model, optimizer, 2, scale=5.0)
            if pruned:
                change(model[3], "weight")
        train(model, optimizer, 2)
        found.append([weight.detach() for weight in weights])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("variant", ["U", "F", "B", "P"])
def test_layers_that_are_pruned_from_the_start_are_under_the_rule(
    variant: Any, update: Any
) -> None:
    found = []
    for pruned in (False, True):
        model = convolutional()
        if pruned:
            for layer in (model[0], model[3]):
                prune.identity(layer, "weight")
        # Backward writes into the weight itself where nothing stands between: it has no masks.
        own = "step" if not pruned or variant == "P" else update
        optimizer = neurms.NeuRMS(model, lr=1e-2, variant=variant, update=own)
        assert {row.rule for row in optimizer.plan()} == {"neurms"}
        train(model, optimizer, 3)
        found.append(sorted((p.detach() for p in model.parameters()), key=lambda p: p.shape))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-15)


@pytest.mark.filterwarnings("ignore:.*quantization is deprecated", "ignore:Please use quant")
def test_quantization_aware_training_takes_the_taps_along() -> None:
    model = convolutional().float()
    optimizer = neurms.NeuRMS(model, lr=1e-2, variant="F")
    images = torch.randn(6, 2, 4, 4)
    model(images).square().mean().backward()
    optimizer.step()
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model, inplace=True)
    assert type(model[3]) is not nn.Linear
    before = optimizer.state[model[3].weight]["v"].clone()
    optimizer.zero_grad()
    (9.0 * model(images).square().mean()).backward()
    optimizer.step()
    assert {state["step"] for state in optimizer.state.values()} == {2}
    assert (optimizer.state[model[3].weight]["v"] > 2.0 * before).all()
    optimizer.detach()
    assert not any(
        hook
        for layer in model
        for hook in layer._forward_hooks.values()
        if isinstance(hook, HookTap)
    )


def test_a_weight_normed_by_its_spectrum_later_is_named() -> None:
    model = convolutional()
    optimizer = neurms.NeuRMS(model, lr=1e-2, variant="U")
    train(model, optimizer, 1)
    nn.utils.spectral_norm(model[3])
    with pytest.warns(UserWarning, match=r"layer '3\.weight' was parametrized since"):
        train(model, optimizer, 1)


@pytest.mark.parametrize("change", ["mask", "parametrization"])
def test_updates_in_backward_refuse_a_changed_layer(change: str) -> None:
    model = convolutional()
    optimizer = neurms.NeuRMS(model, lr=1e-2, update="backward", variant="U")
    train(model, optimizer, 1)
    CHANGES[change](model[3])
    with pytest.raises(UnsupportedTrainingError, match=r"layer 3\.weight was pruned or param"):
        train(model, optimizer, 1)
    optimizer.detach()
    model(torch.randn(1, 2, 4, 4, dtype=torch.float64))


def nothing_of_ours(model: nn.Module) -> None:
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_hooks_with_kwargs
        assert "__getstate__" not in vars(module)


def saved_and_loaded(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    assert b"neurms" not in file.getvalue()
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("update", ["step", "backward"])
def test_copies_carry_nothing_of_ours(how: str, update: Any) -> None:
    model = convolutional()
    optimizer = neurms.NeuRMS(model, update=update, variant="U")
    assert b"neurms" not in pickle.dumps(model)
    twin = COPIES[how](model)
    nothing_of_ours(twin)
    nothing_of_ours(copy.deepcopy(twin))
    train(model, optimizer, 1)
    assert optimizer.state[model[3].weight]["step"] == 1, "the model itself lost its taps"
    optimizer.detach()
    nothing_of_ours(model)


def test_copies_keep_hooks_of_others() -> None:
    model = convolutional()
    seen: list[int] = []

    model[3].register_forward_hook(lambda *_: seen.append(1))
    optimizer = neurms.NeuRMS(model, variant="U")
    twin = copy.deepcopy(model)
    assert len(twin[3]._forward_hooks) == 1
    twin(torch.randn(1, 2, 4, 4, dtype=torch.float64))
    assert seen == [1]
    del optimizer


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is")
@pytest.mark.parametrize("update", ["step", "backward"])
def test_scripting_a_tapped_model_says_how(update: Any) -> None:
    model = convolutional()
    optimizer = neurms.NeuRMS(model, update=update, variant="U")
    with pytest.raises(UnsupportedTrainingError, match=r"detach\(\)"):
        torch.jit.script(model)
    images = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(model))(images), model(images))
    optimizer.detach()
    torch.testing.assert_close(torch.jit.script(model)(images), model(images))
