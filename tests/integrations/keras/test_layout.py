"""Orientation, held to what layers compute: a unit is an output, a feature an input."""

from typing import Any

import keras
import pytest
import torch
from keras import layers

from neurms.integrations.keras.layout import kernel_activity, kernel_layout

CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "dense": (lambda: layers.Dense(3), (4,)),
    "dense on tokens": (lambda: layers.Dense(3), (5, 4)),
    "conv1d": (lambda: layers.Conv1D(6, 2), (7, 4)),
    "conv2d": (lambda: layers.Conv2D(6, 3), (5, 5, 4)),
    "conv3d": (lambda: layers.Conv3D(2, 2), (3, 3, 3, 2)),
    "channels first": (lambda: layers.Conv2D(6, 3, data_format="channels_first"), (4, 5, 5)),
    "grouped": (lambda: layers.Conv2D(6, 3, groups=2), (5, 5, 4)),
    "depthwise": (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), (5, 5, 4)),
    "depthwise 1d": (lambda: layers.DepthwiseConv1D(3), (5, 4)),
    "transposed": (lambda: layers.Conv2DTranspose(6, 3), (5, 5, 4)),
    "transposed 1d": (lambda: layers.Conv1DTranspose(6, 3), (5, 4)),
    "einsum": (lambda: layers.EinsumDense("ab,bc->ac", 3), (4,)),
    "einsum to heads": (lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3)), (5, 4)),
    "einsum from heads": (lambda: layers.EinsumDense("abcd,cde->abe", (None, 3)), (5, 2, 4)),
    "einsum with ellipsis": (lambda: layers.EinsumDense("...x,xy->...y", 3), (5, 4)),
    "einsum per head": (lambda: layers.EinsumDense("abc,bcd->abd", (5, 3)), (5, 4)),
}


def built(name: str) -> tuple[Any, torch.Tensor]:
    make, shape = CASES[name]
    layer = make()
    inputs = torch.randn(2, *shape)
    layer(inputs)
    return layer, inputs


@pytest.mark.parametrize("name", CASES)
def test_a_unit_row_is_what_one_output_depends_on(name: str) -> None:
    layer, inputs = built(name)
    layout, activity = kernel_layout(layer, layer.kernel), kernel_activity(layer)
    assert layout is not None
    assert activity is not None
    outputs = layer(inputs)
    for unit in range(layout.units):
        chosen = activity.scale_units(torch.ones_like(outputs), torch.eye(layout.units)[unit])
        (gradient,) = torch.autograd.grad(
            (outputs * chosen).sum(), [layer.kernel.value], retain_graph=True
        )
        rows = layout.matrix(gradient).abs().sum(1)
        assert rows.nonzero().flatten().tolist() == [unit]


@pytest.mark.parametrize("name", CASES)
def test_a_feature_column_is_what_multiplies_one_input(name: str) -> None:
    layer, inputs = built(name)
    layout, activity = kernel_layout(layer, layer.kernel), kernel_activity(layer)
    assert layout is not None
    assert activity is not None
    axes = [axis + inputs.ndim for axis in activity.feature_axes]
    rest = [axis for axis in range(inputs.ndim) if axis not in axes]
    for feature in range(layout.features):
        silenced = inputs.clone().permute(*axes, *rest)
        sizes = silenced.shape[: len(axes)]
        silenced[tuple(int(i) for i in torch.unravel_index(torch.tensor(feature), sizes))] = 0.0
        inverse = torch.argsort(torch.tensor([*axes, *rest])).tolist()
        layer.kernel.value.grad = None
        layer(silenced.permute(inverse)).square().sum().backward()
        columns = layout.blocks(layer.kernel.value.grad).abs().sum((1, 3)).flatten()
        assert (columns == 0).nonzero().flatten().tolist() == [feature]


@pytest.mark.parametrize("name", CASES)
def test_matrices_go_there_and_back(name: str) -> None:
    layer, _ = built(name)
    layout = kernel_layout(layer, layer.kernel)
    assert layout is not None
    kernel = layer.kernel.value.detach()
    assert torch.equal(layout.from_matrix(layout.matrix(kernel)), kernel)
    assert tuple(layout.matrix(kernel).shape) == layout.matrix_shape


def test_separable_and_embedding_tables_have_layouts() -> None:
    separable = layers.SeparableConv2D(6, 3, depth_multiplier=2)
    separable.build((None, 5, 5, 4))
    depthwise = kernel_layout(separable, separable.depthwise_kernel)
    pointwise = kernel_layout(separable, separable.pointwise_kernel)
    assert depthwise is not None
    assert pointwise is not None
    assert (depthwise.units, depthwise.features, depthwise.groups) == (8, 4, 4)
    assert (pointwise.units, pointwise.features) == (6, 8)
    embedding = layers.Embedding(10, 3)
    embedding.build()
    table = kernel_layout(embedding, embedding.embeddings)
    assert table is not None
    assert (table.units, table.features) == (3, 10)


def test_what_is_no_linear_map_has_no_layout() -> None:
    several = layers.EinsumDense("abcd,bcde->abce", (3, 4, 2))
    several.build((None, 3, 4, 5))
    assert kernel_layout(several, several.kernel) is None
    assert kernel_activity(several) is None
    hidden = layers.EinsumDense("ab...,bc->ac...", 3)
    assert kernel_activity(hidden) is None
    assert kernel_activity(keras.layers.LayerNormalization()) is None
