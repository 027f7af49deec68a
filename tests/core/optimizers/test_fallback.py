"""The fallback is torch.optim.AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from neurms import RMNP
from tests.core.optimizers.training import random_gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_adamw_bit_for_bit(dtype: torch.dtype) -> None:
    shapes: list[tuple[int, ...]] = [(5,), (), (4, 3), (2, 3, 4)]
    ours = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    group = {"params": ours, "rule": "fallback"}
    optimizer = RMNP(
        [group], fallback_lr=0.03, fallback_betas=(0.8, 0.95), fallback_weight_decay=0.2
    )
    adamw = torch.optim.AdamW(theirs, lr=0.03, betas=(0.8, 0.95), weight_decay=0.2, fused=True)
    for seed in range(5):
        random_gradients(ours, seed)
        random_gradients(theirs, seed)
        optimizer.step()
        adamw.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.filterwarnings("ignore:.*applies to 0 of 1 parameters")
def test_bfloat16_keeps_float32_moments() -> None:
    parameter = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    wide = nn.Parameter(torch.ones(8))
    optimizer = RMNP([parameter], fallback_lr=0.1, low_precision="master")
    adamw = torch.optim.AdamW([wide], lr=0.1, weight_decay=0.0)
    for seed in range(5):
        random_gradients([parameter], seed)
        assert parameter.grad is not None
        wide.grad = parameter.grad.float()
        optimizer.step()
        adamw.step()
    state = optimizer.state[parameter]
    torch.testing.assert_close(state["master"], wide.detach())
    torch.testing.assert_close(state["exp_avg"], adamw.state[wide]["exp_avg"])
    assert state["exp_avg_sq"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*applies to 0 of 1 parameters")
def test_weight_decay_of_the_rule_is_not_the_fallbacks() -> None:
    bias = nn.Parameter(torch.ones(3))
    optimizer = RMNP([bias], weight_decay=0.9)
    bias.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(bias, torch.ones(3))
