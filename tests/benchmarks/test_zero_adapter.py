"""The ways to the gradient's moments that are timed give what they say."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.zero_adapter import PROBES, AdaptedLinear, exact


def case() -> tuple[nn.Parameter, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    inputs, errors = torch.randn(7, 3).double(), torch.randn(7, 5).double()
    return weight, inputs, errors, errors.mT @ inputs


def test_an_adapter_at_zero_has_the_probed_gradient_as_its_own() -> None:
    weight, inputs, errors, gradient = case()
    right, left = torch.randn(3, PROBES).double(), torch.randn(5, PROBES).double()
    layer = AdaptedLinear(weight, right, left).double()
    outputs = layer(inputs)
    torch.testing.assert_close(outputs, inputs @ weight.mT)
    outputs.backward(errors)
    rows, columns = layer.sums()
    torch.testing.assert_close(weight.grad, gradient)
    torch.testing.assert_close(rows, (gradient @ right).square().mean(1))
    torch.testing.assert_close(columns, (gradient.mT @ left).square().mean(1))


def test_exact_sums_are_those_of_the_gradient() -> None:
    weight, inputs, errors, gradient = case()
    rows, columns = exact(weight, inputs, errors)
    torch.testing.assert_close(rows, gradient.square().sum(1))
    torch.testing.assert_close(columns, gradient.square().sum(0))
