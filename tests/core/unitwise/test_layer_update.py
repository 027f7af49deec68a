"""How factors reach a weight: the two ways of writing agree, and write nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neurms.core.ground.layout import default_layout, layout_of
from neurms.core.optimizers.work import Item
from neurms.core.routing import Route
from neurms.core.unitwise.layer_update import Product, write_gemm_update_, write_update_

GROUP: dict[str, Any] = {
    "variant": "F",
    "lr": 0.1,
    "weight_decay": 0.0,
    "momentum": 0.0,
    "momentum_coupling": "gradient",
    "agc": None,
}


def item_of(parameter: Tensor, gradient: Tensor, module: nn.Module | None, **group: Any) -> Item:
    layout = layout_of(module, "weight") if module else None
    route = Route("w", parameter, "", "neurms", "", layout or default_layout(parameter), module)
    return Item(0, route, {**GROUP, **group}, gradient)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("variant", ["U", "B", "F"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("coupling", ["gradient", "gradient+velocity"])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_product_in_backward_is_the_gradient_at_the_step(
    decay: float, coupling: str, momentum: float, variant: str
) -> None:
    d, h, start = normal(6, 4), normal(6, 3), normal(4, 3)
    s, c = torch.rand(4).double(), torch.rand(3).double() if variant == "F" else None
    settings = {"momentum_coupling": coupling, "momentum": momentum, "weight_decay": decay}
    by_step, by_product = start.clone(), start.clone()
    velocities = normal(4, 3)
    states = [{"momentum": velocities.clone()} for _ in range(2)]
    item = item_of(by_step, d.T @ h, nn.Linear(3, 4).double(), variant=variant, **settings)
    write_update_(by_step, item, (s, c), states[0])
    write_gemm_update_(by_product, Product(d, h), (s, c), states[1], item.group)
    torch.testing.assert_close(by_step, by_product, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(states[0]["momentum"], states[1]["momentum"])
    assert not torch.equal(by_step, start)


@pytest.mark.parametrize("agc", [None, 0.01])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_gradients_and_factors_are_only_read(momentum: float, agc: float | None) -> None:
    weight, gradient, s, c = normal(4, 3), normal(4, 3), normal(4).abs(), normal(3).abs()
    kept = [t.clone() for t in (gradient, s, c)]
    state = {"momentum": torch.zeros_like(weight)}
    item = item_of(weight, gradient, nn.Linear(3, 4).double(), momentum=momentum, agc=agc)
    write_update_(weight, item, (s, c), state)
    assert all(map(torch.equal, kept, (gradient, s, c)))
    errors, inputs = normal(5, 4), normal(5, 3)
    kept = [t.clone() for t in (errors, inputs)]
    write_gemm_update_(weight, Product(errors, inputs), (s, c), state, item.group)
    assert all(map(torch.equal, kept, (errors, inputs)))


def test_agc_bounds_each_row_of_the_update_before_lr() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    gradient = torch.tensor([[6.0, 8.0], [6.0, 8.0], [0.3, 0.4]], dtype=torch.float64)
    before = weight.clone()
    ones = torch.ones(3, dtype=torch.float64)
    item = item_of(weight, gradient, nn.Linear(2, 3).double(), agc=0.5, variant="U")
    write_update_(weight, item, (ones, None), {})
    lengths = ((before - weight) / 0.1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([2.5, 0.5e-3, 0.5], dtype=torch.float64))


def test_a_bias_is_scaled_by_s_and_neither_clipped_nor_decayed() -> None:
    bias, gradient, s = torch.ones(4), torch.arange(4.0), torch.tensor([1.0, 2.0, 3.0, 4.0])
    item = item_of(bias, gradient, None, agc=1e-6, weight_decay=0.5)
    write_update_(bias, item, (s, None), {})
    torch.testing.assert_close(bias, 1 - 0.1 * s * gradient)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_odd_strides_are_written_through(kind: type[nn.Module], groups: int) -> None:
    module = kind(4, 6, (3, 2), groups=groups).double()
    start, gradient = module.weight.detach(), normal(*module.weight.shape)
    odd = start.transpose(2, 3).contiguous().transpose(2, 3)
    velocity = torch.zeros_like(odd)
    assert velocity.stride() == odd.stride() != start.stride()
    plain, state = start.clone(), {"momentum": torch.zeros_like(start)}
    s, c = torch.rand(6).double(), torch.rand(4).double()
    item = item_of(plain, gradient, module, momentum=0.9)
    for _ in range(2):
        write_update_(plain, item, (s, c), state)
        write_update_(odd, item, (s, c), {"momentum": velocity})
    torch.testing.assert_close(odd, plain)
    torch.testing.assert_close(velocity, state["momentum"])
    assert not torch.equal(plain, start)
