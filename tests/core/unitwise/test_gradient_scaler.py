"""Variant P beside another optimizer is variant P."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from neurms import GradientPreconditioner, NeuRMS
from tests.core.unitwise.neurms_models import cnn, images, mlp, transposed, vectors
from tests.core.unitwise.test_gradient_mover import Attention, assert_equal, backward, tokens

CASES: Any = {
    "mlp": (mlp, vectors),
    "cnn": (cnn, images),
    "transposed": (transposed, images),
    "attention": (Attention, tokens),
}


HOW: list[dict[str, Any]] = [
    {},
    {"momentum": 0.6},
    {"momentum": 0.6, "nesterov": True, "moments": "average", "damping": 0.5},
]


def train(model: nn.Module, scaler: GradientPreconditioner, batch: Any, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for _ in range(steps):
        backward(model, batch)
        assert scaler.precondition_(optimizer)
        optimizer.step()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", CASES)
def test_sgd_beside_it_is_the_optimizer(case: str, how: dict[str, Any]) -> None:
    make, batch = CASES[case]
    model, other = make().double(), make().double()
    settings: Any = {"variant": "P", "weight_decay": 0.1, **how}
    scaler, optimizer = (
        GradientPreconditioner(model, **settings),
        NeuRMS(other, lr=0.02, **settings),
    )
    train(model, scaler, batch(), 6)
    for _ in range(6):
        backward(other, batch())
        optimizer.step()
    assert_equal(model, other)
    assert scaler.state_bytes() == scaler.plan().state_bytes == optimizer.state_bytes()


@pytest.mark.parametrize("how", HOW)
def test_resumes_bit_for_bit(how: dict[str, Any]) -> None:
    model = mlp().double()
    scaler = GradientPreconditioner(model, variant="P", **how)
    train(model, scaler, vectors(), 3)
    twin = copy.deepcopy(model)
    other = GradientPreconditioner(twin, variant="P", **how)
    other.load_state_dict(copy.deepcopy(scaler.state_dict()))
    train(model, scaler, vectors(), 3)
    train(twin, other, vectors(), 3)
    assert_equal(model, twin, 0, 0)


def test_a_bad_gradient_is_left_out() -> None:
    model = mlp().double()
    scaler = GradientPreconditioner(model, variant="P", nonfinite="skip")
    backward(model, vectors())
    assert model[0].weight.grad is not None
    model[0].weight.grad[0] = float("nan")
    before = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    assert not scaler.precondition_(model.parameters())
    for p, gradient in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=0, atol=0, equal_nan=True)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="as the optimizer itself"):
        GradientPreconditioner(mlp(), variant="P", update="backward")
    with pytest.raises(ValueError, match="agc="):
        GradientPreconditioner(mlp(), variant="P", agc=0.1)


# ---------------------------------------------------------------- the rate beside it

LONG = r"SGD\(lr=0.1, momentum=0.9\) would move every weight by about 1 .* lower lr"


def test_an_sgd_with_long_steps_is_warned_of() -> None:
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.warns(UserWarning, match=LONG):
        GradientPreconditioner(model, optimizers=[sgd])


def test_a_schedule_that_begins_low_hides_no_long_steps() -> None:
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.LinearLR(sgd, start_factor=1e-3)
    with pytest.warns(UserWarning, match=LONG):
        GradientPreconditioner(model, optimizers=[sgd])


@pytest.mark.parametrize(
    "make",
    [
        lambda own: torch.optim.SGD(own, lr=0.05),
        lambda own: torch.optim.SGD(own, lr=0.04, momentum=0.9, dampening=0.9),
        lambda own: torch.optim.AdamW(own, lr=0.1),
        lambda own: torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0),
    ],
)
def test_others_are_not_warned_of(make: Any) -> None:
    model = mlp()
    GradientPreconditioner(model, optimizers=[make(model.parameters())])


def test_other_variants_keep_sgds_scale() -> None:
    model = mlp()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    GradientPreconditioner(model, optimizers=[sgd], variant="U").detach()


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_one_native_call_scales_as_the_definitions_do(momentum: float) -> None:
    """Large enough for it; the last bias is frozen, and weights must stay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 190), nn.Tanh(), nn.Linear(190, 10))
    model[2].bias.requires_grad_(False)
    twin = copy.deepcopy(model)
    made = [
        GradientPreconditioner(own, variant="P", momentum=momentum, backend=backend)
        for own, backend in ((model, "auto"), (twin, "eager"))
    ]
    for seed in range(4):
        for own, scaler in zip((model, twin), made, strict=True):
            for number, parameter in enumerate(own.parameters()):
                if parameter.requires_grad:
                    generator = torch.Generator().manual_seed(10 * seed + number)
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
            assert scaler.precondition_(own.parameters())
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)
