"""Finite gradients so large that their squares overflow, and so small that they vanish."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neurms
from neurms.core.ground.errors import NonFiniteError

HUGE = [1e16, 1e17, 5e17, 1e19, 1e25, 1e30, 1e38]
SHAPES = [(6, 4), (256, 160)]  # eager, and native where there is a compiler
TORCH = {"sgd", "rmsprop", "adam", "adamw", "adafactor"}
OWN = [name for name in neurms.available() if name not in {"neurms", *TORCH}]


def randn(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3)


def tensors(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Tensor]:
    own = {k: v for k, v in optimizer.state[weight].items() if isinstance(v, Tensor)}
    return {"weight": weight.detach(), **own}


def assert_finite(optimizer: torch.optim.Optimizer, weight: Tensor) -> None:
    for name, tensor in tensors(optimizer, weight).items():
        assert tensor.isfinite().all(), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", OWN)
@pytest.mark.parametrize("scale", [1e-42, *HUGE])
def test_state_and_weights_stay_finite(rule: str, shape: tuple[int, int], scale: float) -> None:
    weight = nn.Parameter(randn(shape, 0))
    optimizer = neurms.create(rule, [weight])
    weight.grad = randn(shape, 1)
    optimizer.step()
    before = {name: tensor.clone() for name, tensor in tensors(optimizer, weight).items()}
    weight.grad = randn(shape, 2) * scale
    try:
        optimizer.step()
    except NonFiniteError:
        assert scale > 1, "a small gradient was refused"
        for name, tensor in tensors(optimizer, weight).items():
            assert torch.equal(tensor, before[name]), name
    weight.grad = randn(shape, 3)
    optimizer.step()
    assert_finite(optimizer, weight)


@pytest.mark.parametrize("rule", ["racs", "shampoo", "soap", "alice", "lamb"])
def test_refusal_names_the_parameter_or_skips(rule: str) -> None:
    weight = nn.Parameter(randn((6, 4), 0))
    weight.grad = torch.full((6, 4), 1e25)
    with pytest.raises(NonFiniteError, match=r"'heavy'.* so large that what is kept of it"):
        neurms.create(rule, [("heavy", weight)]).step()
    optimizer: Any = neurms.create(rule, [weight], nonfinite="skip")
    before = weight.detach().clone()
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(weight, before)


@pytest.mark.parametrize("shape", [*SHAPES, (200, 300)], ids=str)
@pytest.mark.parametrize("scale", [1e17, 1e19, 1e25, 1e30])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_rmnp_is_exact(shape: tuple[int, int], scale: float, backend: str) -> None:
    weight = nn.Parameter(torch.zeros(shape))
    gradient = randn(shape, 1) * scale
    weight.grad = gradient.clone()
    neurms.RMNP([weight], lr=1.0, shape_scale=False, backend=backend).step()
    wide = gradient.double()
    truth = -wide / wide.norm(dim=1, keepdim=True)
    torch.testing.assert_close(weight.detach().double(), truth, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("variant", ["U", "B", "F"])
@pytest.mark.parametrize("scale", [1e-42, 1e17, 1e19, 1e20, 1e25, 1e38])
@pytest.mark.parametrize("width", [6, 256])
def test_neurms(update: Any, variant: Any, scale: float, width: int) -> None:
    layer = nn.Linear(width, width)
    optimizer = neurms.NeuRMS(layer, variant=variant, update=update, momentum=0.9)
    for factor in (1.0, scale, 1.0):
        optimizer.zero_grad()
        try:
            output = layer(randn((32, width), 1))
            output.backward(randn((32, width), 2) * (factor / 32))
            optimizer.step()
        except NonFiniteError:
            assert factor > 1, "a small gradient was refused"
    for parameter in layer.parameters():
        assert_finite(optimizer, parameter)


@pytest.mark.filterwarnings("ignore:.*applies to 0 of 1 parameters")
@pytest.mark.parametrize("scale", [1e19, 1e25, 1e37])
def test_fallback_does_as_torch_does(scale: float) -> None:
    ours, theirs = (nn.Parameter(torch.ones(5)) for _ in range(2))
    settings: dict[str, Any] = {"fallback_lr": 0.01, "fallback_weight_decay": 0.0}
    mine = neurms.RACS([ours], lr=0.01, **settings)
    other = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.0)
    for factor in (1.0, scale, 1.0):
        ours.grad = theirs.grad = torch.arange(1.0, 6.0) * factor
        mine.step()
        other.step()
    assert ours.isfinite().all()
    torch.testing.assert_close(ours, theirs)
