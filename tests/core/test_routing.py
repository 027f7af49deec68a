"""Which parameter gets which rule, by the kind of its module, and why."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from neurms.core.routing import (
    FALLBACK,
    Route,
    applies_to_nothing,
    check_patterns,
    excluded,
    head_of,
    movable,
    route_model,
    route_tensors,
)

UNKNOWN = "not a linear, convolution, recurrent or attention weight"


def routed(model: nn.Module, **settings: object) -> dict[str, Route]:
    routes = route_model(model, "rule", **settings)  # type: ignore[arg-type]
    assert [r.parameter for r in routes] == list(model.parameters())
    return {route.name: route for route in routes}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.shared = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.shared.weight
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight


def test_attention_projections_get_the_rule() -> None:
    joint = routed(nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 3)))
    assert joint["0.in_proj_weight"].reason == "attention projection"
    assert joint["0.out_proj.weight"].rule == "rule"
    assert joint["0.in_proj_bias"].is_fallback
    apart = routed(nn.Sequential(nn.MultiheadAttention(4, 2, kdim=3, vdim=5), nn.Linear(4, 3)))
    for name, shape in (("q", (4, 4)), ("k", (4, 3)), ("v", (4, 5))):
        route = apart[f"0.{name}_proj_weight"]
        assert (route.rule, route.layout.matrix_shape) == ("rule", shape)


def test_attention_bias_tokens_do_not() -> None:
    routes = routed(nn.Sequential(nn.MultiheadAttention(4, 2, add_bias_kv=True), nn.Linear(4, 3)))
    assert routes["0.bias_k"].is_fallback


def test_transformer_layer() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    rules = {name: route.rule for name, route in routed(layer).items() if route.rule == "rule"}
    assert set(rules) == {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight"}


def test_tied_weights_are_taken_once_by_the_fallback() -> None:
    routes = routed(Tied())
    assert routes["embedding.weight"].reason == "tied: shared by 2 modules"
    assert routes["shared.weight"].reason == "tied: shared by 2 modules"
    assert routes["hidden.weight"].rule == "rule"
    assert "head.weight" not in routes


def test_the_same_module_twice_is_not_tied() -> None:
    layer = nn.Linear(3, 3)
    routes = routed(nn.Sequential(layer, layer, nn.Linear(3, 2)))
    assert routes["0.weight"].rule == "rule"


NORMS = {
    "weight norm": lambda layer: parametrizations.weight_norm(layer),
    "spectral norm": lambda layer: parametrizations.spectral_norm(layer),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer),
    "old weight norm": lambda layer: weight_norm(layer),
    "old spectral norm": lambda layer: spectral_norm(layer),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("how", NORMS)
@pytest.mark.parametrize("layer", [nn.Linear(3, 4), nn.Conv1d(3, 4, 2)], ids=str)
def test_what_a_weight_is_made_of_counts_as_the_weight(how: str, layer: nn.Module) -> None:
    kind = routed(nn.Sequential(layer, nn.Linear(4, 2)))["0.weight"]
    routes = routed(nn.Sequential(NORMS[how](copy.deepcopy(layer)), nn.Linear(4, 2)))
    (matrix,) = [route for route in routes.values() if not route.is_fallback]
    assert matrix.reason == f"{kind.reason}, parametrized"
    assert matrix.layout == kind.layout
    scales = [r for r in routes.values() if r.reason == "scales of a parametrized weight"]
    assert [r.parameter.numel() for r in scales] == ([4] if "weight" in how else [])


def test_pruned_weights_and_biases_are_what_they_were() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.MultiheadAttention(4, 2), nn.Linear(4, 2))
    prune.identity(model[0], "weight")
    prune.identity(model[0], "bias")
    prune.identity(model[1], "in_proj_weight")
    prune.identity(model[2], "weight")
    routes = routed(model)
    assert routes["0.weight_orig"].reason == "hidden linear layer, pruned"
    assert routes["0.bias_orig"].reason == "bias"
    assert routes["1.in_proj_weight_orig"].reason == "attention projection, pruned"
    assert routes["2.weight_orig"].reason == "output head"


def test_recurrent_weights_get_the_rule() -> None:
    model = nn.Sequential(nn.LSTM(3, 4, proj_size=2), nn.GRUCell(4, 5), nn.Linear(5, 2))
    routes = routed(model)
    ruled = {name: r.layout.matrix_shape for name, r in routes.items() if not r.is_fallback}
    assert ruled == {
        "0.weight_ih_l0": (16, 3),
        "0.weight_hh_l0": (16, 2),
        "0.weight_hr_l0": (2, 4),
        "1.weight_ih": (15, 4),
        "1.weight_hh": (15, 5),
    }
    assert routes["0.bias_ih_l0"].is_fallback
    normed = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    reasons = {route.reason for route in routed(normed).values() if not route.is_fallback}
    assert reasons == {"recurrent weight", "recurrent weight, parametrized"}


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Embedding(5, 3), "embedding"),
        (nn.EmbeddingBag(5, 3), "embedding"),
        (nn.LayerNorm((3, 3)), f"LayerNorm.weight: {UNKNOWN}"),
        (nn.BatchNorm1d(3), "1-D tensor: no matrix"),
        (nn.Bilinear(3, 3, 3), f"Bilinear.weight: {UNKNOWN}"),
        (nn.PReLU(), "1-D tensor: no matrix"),
    ],
)
def test_everything_else_gets_the_fallback(module: nn.Module, reason: str) -> None:
    first, *_ = routed(nn.Sequential(module, nn.Linear(3, 2))).values()
    assert first.rule == FALLBACK
    assert first.reason == reason


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 4, 3),
        nn.Conv2d(2, 4, 3, groups=2),
        nn.Conv3d(2, 4, 3),
        nn.ConvTranspose2d(2, 4, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_convolutions_get_the_rule(layer: nn.Module) -> None:
    route = routed(nn.Sequential(layer))["0.weight"]
    assert (route.rule, route.reason, route.kind) == ("rule", "convolution", type(layer).__name__)
    assert route.module is layer


class TestHead:
    def test_is_the_last_linear_layer(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 2), nn.ReLU()))
        assert head_of(model) is model[1][0]
        assert routed(model)["1.0.weight"].reason == "output head"
        assert routed(model, head="rule")["1.0.weight"].rule == "rule"
        assert routed(model, head="rule")["1.0.bias"].is_fallback

    def test_a_convolutional_model_has_none(self) -> None:
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 2, 3))
        assert head_of(model) is None
        assert {r.rule for r in routed(model).values() if r.parameter.ndim > 1} == {"rule"}

    def test_subclasses_count(self) -> None:
        class Output(nn.Linear):
            pass

        model = nn.Sequential(nn.Linear(3, 3), Output(3, 2))
        assert routed(model)["1.weight"].kind == "Output"
        assert routed(model)["1.weight"].reason == "output head"


class TestExclude:
    def test_a_modules_name_covers_all_its_parameters(self) -> None:
        model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Linear(3, 2))
        routes = routed(model, exclude=["0"])
        assert all(r.is_fallback for r in routes.values())
        assert routes["0.1.weight"].reason == "excluded by '0'"

    def test_patterns_are_case_sensitive_shell_patterns(self) -> None:
        model = nn.ModuleDict({"a": nn.Linear(3, 3), "B": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
        routes = routed(model, exclude=("[B-C]*",))
        assert routes["B.weight"].is_fallback
        assert routes["a.weight"].rule == "rule"
        with pytest.raises(ValueError, match="exclude='b' matches no parameter; names look like"):
            routed(model, exclude=["b"])

    def test_a_bare_string_is_a_mistake(self) -> None:
        with pytest.raises(TypeError, match=r"write \('0',\)"):
            routed(nn.Sequential(nn.Linear(3, 2)), exclude="0")

    def test_not_every_pattern_need_match_a_part(self) -> None:
        routes = route_tensors([("a", torch.zeros(2, 2)), ("b", torch.zeros(2, 2))], "rule")
        assert [r.rule for r in excluded(routes, ["b", "c"], every=False)] == ["rule", FALLBACK]
        with pytest.raises(ValueError, match="exclude='c'"):
            check_patterns(routes, ["b", "c"])


def test_bare_tensors_go_by_their_axes() -> None:
    tensors = [torch.zeros(()), torch.zeros(3), torch.zeros(3, 2), torch.zeros(3, 2, 2)]
    routes = route_tensors([(str(t.ndim), t) for t in tensors], "rule")
    assert [(r.rule, r.reason) for r in routes] == [
        (FALLBACK, "0-D tensor: no matrix"),
        (FALLBACK, "1-D tensor: no matrix"),
        ("rule", "2 axes"),
        ("rule", "3 axes"),
    ]
    assert all(r.is_fallback for r in route_tensors([("w", torch.zeros(2, 2))], FALLBACK))


def test_a_matrix_too_small_for_its_rule_goes_to_the_fallback_with_the_reason() -> None:
    (route,) = route_tensors([("w", torch.ones(5, 1))], "rule")
    assert movable(route, 1, 1) is route
    assert movable(route, 1, 2).reason == "1 feature, and rule moves matrices of at least 2"
    assert movable(route, 6, 1).reason == "5 units, and rule moves matrices of at least 6"
    assert movable(route, 1, 2).is_fallback


def test_a_rule_that_applies_to_nothing_is_told_from_one_that_was_not_asked_for() -> None:
    vectors = route_tensors([("a", torch.ones(3, requires_grad=True))], "muon")
    assert not applies_to_nothing("muon", vectors)
    assert not applies_to_nothing("muon", route_model(nn.Linear(3, 2), "muon"))
    bilinear = applies_to_nothing("muon", route_model(nn.Bilinear(3, 2, 2), "muon"))
    assert "muon applies to 0 of 2 parameters (" in bilinear
    matrix = route_tensors([("w", torch.ones(3, 2, requires_grad=True))], "muon")
    assert not applies_to_nothing("muon", [*vectors, *matrix])
    assert not applies_to_nothing("muon", excluded(matrix, ("w",)))
    assert not applies_to_nothing("muon", route_tensors([("a", torch.ones(3))], FALLBACK))
    frozen = route_tensors([("w", torch.ones(3, 2))], "muon")
    of_pairs = route_model(nn.Bilinear(3, 2, 2), "muon")
    assert "0 of 2" in applies_to_nothing("muon", [*of_pairs, *frozen])
