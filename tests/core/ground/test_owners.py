"""To which module a parameter belongs, and what it is to it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from neurms.core.ground.owners import Owner, owners_of, weight_behind


def owners(model: nn.Module) -> dict[str, list[Owner]]:
    found = owners_of(model)
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


class Learned(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale.sum()


def test_plain_layers_own_what_they_hold() -> None:
    layer = nn.Linear(3, 2)
    assert owners(layer) == {"weight": [Owner(layer, "weight")], "bias": [Owner(layer, "bias")]}
    assert weight_behind(layer, layer.weight) == Owner(layer, "weight")
    assert weight_behind(layer, nn.Parameter(torch.ones(2, 3))) is None


def test_a_tied_weight_has_two() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert owners(model)["0.weight"] == [Owner(model[0], "weight"), Owner(model[1], "weight")]


def test_pruning_is_seen_through() -> None:
    layer = nn.Linear(3, 2)
    prune.identity(layer, "bias")
    assert owners(layer)["bias_orig"] == [Owner(layer, "bias", "pruned")]


def test_a_parametrization_keeps_it_for_its_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    parametrize.register_parametrization(model[0], "weight", Learned())
    found = owners(model)
    original = "0.parametrizations.weight.original"
    assert found[original] == [Owner(model[0], "weight", "parametrized")]
    ((own,),) = [found[name] for name in found if name.endswith("scale")]
    assert (type(own.module), own.name, own.made) == (Learned, "scale", "")
    assert weight_behind(model[0], model[0].parametrizations.weight.original) is None


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_norms_keep_the_matrix_and_its_lengths() -> None:
    new, old = parametrizations.weight_norm(nn.Linear(3, 2)), weight_norm(nn.Linear(3, 2))
    for layer, lengths, directions in (
        (new, "parametrizations.weight.original0", "parametrizations.weight.original1"),
        (old, "weight_g", "weight_v"),
    ):
        assert owners(layer)[lengths] == [Owner(layer, "weight", "parametrized", whole=False)]
        assert owners(layer)[directions] == [Owner(layer, "weight", "parametrized")]
    spectral = spectral_norm(nn.Linear(3, 2))
    assert owners(spectral)["weight_orig"] == [Owner(spectral, "weight", "parametrized")]


def test_names_that_only_look_like_it_are_names() -> None:
    module = nn.Module()
    for name in ("first_v", "weight", "weight_orig"):
        module.register_parameter(name, nn.Parameter(torch.ones(2, 2)))
    assert {name: own.name for name, (own,) in owners(module).items()} == {
        "first_v": "first_v",
        "weight": "weight",
        "weight_orig": "weight_orig",
    }
