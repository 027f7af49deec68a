"""Layouts against what the layers compute: units are outputs, features are inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from neurms.core.ground.layout import Layout, default_layout, layout_of

LAYERS: dict[str, nn.Module] = {
    "linear": nn.Linear(5, 3),
    "embedding": nn.Embedding(7, 4),
    "embedding_bag": nn.EmbeddingBag(7, 4),
    "conv1d": nn.Conv1d(4, 6, 3),
    "conv2d": nn.Conv2d(4, 6, (3, 2)),
    "conv3d": nn.Conv3d(2, 3, 2),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv2d(4, 8, 3, groups=4),
    "transposed": nn.ConvTranspose2d(4, 6, 3),
    "transposed_grouped": nn.ConvTranspose2d(4, 6, 3, groups=2),
    "transposed_depthwise": nn.ConvTranspose1d(4, 4, 3, groups=4),
    "transposed3d": nn.ConvTranspose3d(2, 4, 2, groups=2),
}
SIZES = {  # units, features, groups, taps
    "linear": (3, 5, 1, 1),
    "embedding": (4, 7, 1, 1),
    "embedding_bag": (4, 7, 1, 1),
    "conv1d": (6, 4, 1, 3),
    "conv2d": (6, 4, 1, 6),
    "conv3d": (3, 2, 1, 8),
    "grouped": (6, 4, 2, 9),
    "depthwise": (8, 4, 4, 9),
    "transposed": (6, 4, 1, 9),
    "transposed_grouped": (6, 4, 2, 9),
    "transposed_depthwise": (4, 4, 4, 3),
    "transposed3d": (4, 2, 2, 8),
}


def layer_and_layout(name: str) -> tuple[Any, Layout]:
    layout = layout_of(LAYERS[name], "weight")
    assert layout is not None
    return LAYERS[name], layout


@pytest.mark.parametrize("name", LAYERS)
def test_sizes(name: str) -> None:
    _, layout = layer_and_layout(name)
    assert (layout.units, layout.features, layout.groups, layout.taps) == SIZES[name]


@pytest.mark.parametrize("name", LAYERS)
def test_matrix_and_back(name: str) -> None:
    layer, layout = layer_and_layout(name)
    matrix = layout.matrix(layer.weight)
    assert tuple(matrix.shape) == layout.matrix_shape
    assert torch.equal(layout.from_matrix(matrix), layer.weight)
    assert torch.equal(matrix.sum(), layout.blocks(layer.weight).reshape(matrix.shape).sum())


@pytest.mark.parametrize("name", LAYERS)
def test_blocks_are_views_in_the_order_of_the_matrix(name: str) -> None:
    layer, layout = layer_and_layout(name)
    weight = layer.weight.detach().clone()
    blocks = layout.blocks(weight)
    groups, units, features, taps = blocks.shape
    assert (groups * units, groups * features, groups, taps) == SIZES[name]
    assert torch.equal(blocks.reshape(layout.matrix_shape), layout.matrix(weight))
    blocks.mul_(2.0)
    assert torch.equal(weight, 2 * layer.weight.detach())


@pytest.mark.parametrize("name", [n for n in LAYERS if "embedding" not in n])
def test_rows_belong_to_outputs(name: str) -> None:
    """Scaling row i of the matrix scales channel i of the output, and no other."""
    layer, layout = layer_and_layout(name)
    shape = (2, layout.features, *([5] * (layer.weight.ndim - 2)))
    inputs = torch.randn(shape)
    factors = torch.arange(1.0, layout.units + 1)
    with torch.no_grad():
        plain = layer(inputs) - bias_of(layer)
        scaled = nn.Parameter(layout.from_matrix(layout.matrix(layer.weight) * factors[:, None]))
        out = torch.func.functional_call(layer, {"weight": scaled}, inputs) - bias_of(layer)
        blocks = layout.blocks(layer.weight.clone()) * layout.unit_factors(factors)
    channels = factors.view(-1, *([1] * (plain.ndim - 2)))
    torch.testing.assert_close(out, plain * channels, rtol=1e-4, atol=1e-5)
    assert torch.equal(blocks.reshape(layout.matrix_shape), layout.matrix(scaled))


@pytest.mark.parametrize("name", [n for n in LAYERS if "embedding" not in n])
def test_feature_factors_belong_to_inputs(name: str) -> None:
    """Scaling the weight's features does what scaling the input's channels does."""
    layer, layout = layer_and_layout(name)
    inputs = torch.randn(2, layout.features, *([5] * (layer.weight.ndim - 2)))
    factors = torch.arange(1.0, layout.features + 1)
    with torch.no_grad():
        weight = layer.weight.clone()
        layout.blocks(weight).mul_(layout.feature_factors(factors))
        through_weight = torch.func.functional_call(layer, {"weight": weight}, inputs)
        channels = factors.view(-1, *([1] * (inputs.ndim - 2)))
        torch.testing.assert_close(through_weight, layer(inputs * channels), rtol=1e-4, atol=1e-4)


def bias_of(layer: Any) -> torch.Tensor:
    bias: torch.Tensor = layer.bias.detach()
    return bias.view(-1, *([1] * (layer.weight.ndim - 2)))


def test_embedding_rows_are_embedding_dimensions() -> None:
    layer, layout = layer_and_layout("embedding")
    assert torch.equal(layout.matrix(layer.weight), layer.weight.t())


def test_blocks_reach_channels_last_weights() -> None:
    conv = nn.Conv2d(4, 6, 3, groups=2).to(memory_format=torch.channels_last)
    layout = layout_of(conv, "weight")
    assert layout is not None
    weight = conv.weight.detach().clone(memory_format=torch.preserve_format)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    layout.blocks(weight).zero_()
    assert weight.count_nonzero() == 0


def test_blocks_never_copy() -> None:
    layout = layout_of(nn.Conv2d(2, 2, 3), "weight")
    assert layout is not None
    twisted = torch.zeros(2, 2, 3, 3).permute(0, 1, 3, 2)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        layout.blocks(twisted)
    assert torch.equal(layout.matrix(twisted), torch.zeros(2, 18))


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [((), (1, 1)), ((5,), (1, 5)), ((4, 3), (4, 3)), ((4, 3, 2), (4, 6)), ((0, 3), (0, 3))],
)
def test_bare_tensors(shape: tuple[int, ...], matrix: tuple[int, int]) -> None:
    tensor = torch.randn(shape)
    layout = default_layout(tensor)
    assert layout.matrix_shape == matrix
    assert torch.equal(layout.matrix(tensor).reshape(-1), tensor.reshape(-1))
    assert torch.equal(layout.from_matrix(layout.matrix(tensor)), tensor)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.Linear(2, 2), "bias"),
        (nn.LayerNorm(2), "weight"),
        (nn.LSTM(2, 2), "weight_ih_l0"),
        (nn.Bilinear(2, 2, 2), "weight"),
        (nn.ReLU(), "weight"),
    ],
)
def test_unknown_parameters_have_no_layout(module: nn.Module, name: str) -> None:
    assert layout_of(module, name) is None
