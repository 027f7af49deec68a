"""Muon against torch.optim.Muon, whose iteration runs in bfloat16."""

from __future__ import annotations

import pytest
import torch

from neurms import Muon


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_follows_torch(shape: tuple[int, int], adjust: str, nesterov: bool) -> None:
    ours, theirs = (torch.nn.Parameter(torch.ones(shape)) for _ in range(2))
    settings = {"lr": 0.01, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    optimizers = (
        Muon([ours], adjust_lr=adjust, **settings),  # type: ignore[arg-type]
        torch.optim.Muon([theirs], adjust_lr_fn=adjust, **settings),  # type: ignore[arg-type]
    )
    for _ in range(5):
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - 1).detach().norm()
    assert (ours - theirs).detach().norm() < 0.02 * moved


def test_more_steps_and_other_coefficients() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 6))
    weight.grad = torch.randn(4, 6)
    optimizer = Muon([weight], lr=1.0, momentum=0.0, steps=40, coefficients=(1.5, -0.5, 0.0))
    optimizer.step()
    product = weight.detach() @ weight.detach().mT
    torch.testing.assert_close(product, torch.eye(4), atol=1e-4, rtol=0)


def test_convolutions_are_flattened() -> None:
    conv = torch.nn.Conv2d(2, 4, 3)
    flat = torch.nn.Parameter(conv.weight.detach().flatten(1).clone())
    conv.weight.grad = torch.randn(4, 2, 3, 3)
    flat.grad = conv.weight.grad.flatten(1)
    for parameter in (conv.weight, flat):
        Muon([parameter]).step()
    torch.testing.assert_close(conv.weight.detach().flatten(1), flat.detach())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"adjust_lr": "x"}, "adjust_lr='x'"),
        ({"momentum": -1}, "momen"),
        ({"precision": "half"}, "precision=.half."),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))], **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_of_bfloat16_on_request(dtype: torch.dtype) -> None:
    gradient = torch.randn(24, 40, dtype=dtype)
    moved = []
    for precision in ("float32", "bfloat16"):
        weight = torch.nn.Parameter(torch.zeros(24, 40, dtype=dtype))
        weight.grad = gradient.clone()
        Muon([weight], lr=1.0, precision=precision).step()  # type: ignore[arg-type]
        assert weight.dtype is dtype
        moved.append(weight.detach().double())
    difference = float((moved[0] - moved[1]).norm() / moved[0].norm())
    assert 1e-3 < difference < 5e-2


def test_checkpoints_from_before_the_precision_load() -> None:
    def with_state() -> Muon:
        weight = torch.nn.Parameter(torch.ones(3, 4))
        weight.grad = torch.ones(3, 4)
        optimizer = Muon([weight])
        optimizer.step()
        return optimizer

    saved = with_state().state_dict()
    del saved["param_groups"][0]["precision"]
    restored = with_state()
    restored.load_state_dict(saved)
    assert restored.param_groups[0]["precision"] == "float32"
