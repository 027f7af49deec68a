"""Products and errors of convolutions against explicit rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from neurms.core.diagnostics.factorization import (
    expected_correlation,
    factorization_error,
    gradient_margins,
    spaced,
    square_products,
)
from neurms.core.ground.layout import Layout, layout_of
from neurms.core.taps.activity import activity_of

LAYERS = [
    nn.Linear(5, 4),
    nn.Conv1d(4, 6, 3, padding=1),
    nn.Conv2d(4, 6, (3, 2), stride=2, padding="valid"),
    nn.Conv2d(4, 6, (3, 2), padding="same", dilation=2),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    nn.Conv2d(4, 6, 3, groups=2),
    nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_products_are_the_weight_gradient_of_squares(layer: nn.Module) -> None:
    """Autograd through the same module, fed with squares, is the definition."""
    layer = layer.double()
    spatial = {nn.Linear: (), nn.Conv1d: (9,)}.get(type(layer), (9, 8))
    inputs = torch.randn(3, *((7, 5) if not spatial else (4, *spatial)), dtype=torch.float64)
    bias, layer.bias = layer.bias, None
    outputs = layer(inputs.square())
    errors = torch.randn_like(outputs)
    (expected,) = torch.autograd.grad(outputs, layer.weight, errors.square())
    layer.bias = bias
    layout, activity = layout_of(layer, "weight"), activity_of(layer)
    assert layout is not None
    assert activity is not None
    found = square_products(layer, layout, activity, errors, inputs)
    assert found is not None
    assert torch.allclose(found, layout.blocks(expected))


def test_a_part_of_the_units() -> None:
    layer = nn.Conv2d(3, 8, 3).double()
    inputs, errors = torch.randn(2, 3, 6, 6).double(), torch.randn(2, 8, 4, 4).double()
    layout, activity = layout_of(layer, "weight"), activity_of(layer)
    assert layout is not None
    assert activity is not None
    units = spaced(8, 3, torch.device("cpu"))
    assert units is not None
    assert units.tolist() == [0, 2, 5]
    whole = square_products(layer, layout, activity, errors, inputs)
    part = square_products(layer, layout, activity, errors, inputs, units)
    assert whole is not None
    assert part is not None
    assert torch.allclose(part, whole[:, units])


def test_exactly_factoring_rows_have_no_error() -> None:
    d, h = torch.rand(6, 3).double(), torch.rand(5, 4).double()
    errors, inputs = d.repeat_interleave(5, 0), h.repeat(6, 1)
    layer = nn.Linear(4, 3)
    layout, activity = layout_of(layer, "weight"), activity_of(layer)
    assert layout is not None
    assert activity is not None
    products = square_products(layer, layout, activity, errors, inputs)
    assert products is not None
    sums = errors.square().sum(0), inputs.square().sum(0)
    assert float(factorization_error(products, *sums, 30, 30)) < 1e-12
    shuffled = errors[torch.randperm(30)], inputs.roll(7, 0) * errors[:, :1]
    products = square_products(layer, layout, activity, *shuffled)
    assert products is not None
    sums = shuffled[0].square().sum(0), shuffled[1].square().sum(0)
    assert float(factorization_error(products, *sums, 30, 30)) > 0.1


def test_margins_are_means_over_each_units_and_each_features_entries() -> None:
    g = torch.randn(6, 2, 3, 3)
    rows, columns = gradient_margins(g, Layout((6, 2, 3, 3), (0,), (1,), (2, 3), 2))
    squares = g.double().square()
    assert torch.allclose(rows, squares.mean((1, 2, 3)))
    expected = torch.cat([squares[:3].mean((0, 2, 3)), squares[3:].mean((0, 2, 3))])
    assert torch.allclose(columns, expected)


def test_the_expected_rho_does_not_depend_on_scale_and_survives_tiny_moments() -> None:
    layout, v, u = Layout((5, 4), (0,), (1,)), torch.rand(5).double(), torch.rand(4).double()
    expected = float(expected_correlation(layout, v, u))
    assert float(expected_correlation(layout, v * 1e-200, u * 1e-90)) == pytest.approx(expected)
    assert np.isnan(float(expected_correlation(layout, torch.zeros(5), u)))
    assert float(expected_correlation(layout, torch.ones(5), torch.ones(4))) == 0
