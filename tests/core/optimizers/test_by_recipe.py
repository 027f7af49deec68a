"""What a step writes: for any memory layout, and in any precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from neurms import RMNP
from tests.core.optimizers.training import GRADIENT_RULES, make, matrix, random_gradients


class TestLayouts:
    @pytest.mark.parametrize("name", GRADIENT_RULES)
    def test_memory_layout_does_not_matter(self, name: str) -> None:
        """Transposed, strided, expanded and channels-last tensors move like contiguous ones."""
        # Square and of full rank: SOAP's bases are arbitrary where a gradient has no energy at all.
        plain = [matrix(6, 6), matrix(8, 2, 2, 2), matrix(6), matrix(6, 6)]
        settings = {"rank": 8, "leading": 8} if name == "low_rank_soap" else {}
        strange = [
            nn.Parameter(plain[0].detach().t().contiguous().t()),
            nn.Parameter(plain[1].detach().to(memory_format=torch.channels_last)),
            nn.Parameter(torch.zeros(12)[::2].copy_(plain[2].detach())),
            nn.Parameter(torch.zeros(6, 12)[:, ::2].copy_(plain[3].detach())),
        ]
        optimizers = [make_for(name, parameters, **settings) for parameters in (plain, strange)]
        for seed in range(3):
            for parameters, optimizer in zip((plain, strange), optimizers, strict=True):
                random_gradients(parameters, seed)
                if parameters is strange:
                    parameters[1].grad = parameters[1].grad.to(memory_format=torch.channels_last)
                    parameters[3].grad = parameters[3].grad.t().contiguous().t()
                optimizer.step()
        for a, b in zip(plain, strange, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("gradient", ["contiguous", "transposed", "expanded"])
    def test_fallback_reads_gradients_by_their_strides(self, gradient: str) -> None:
        first, second = matrix(4, 6), matrix(4, 6)
        second.data.copy_(first.data)
        value = torch.randn(4, 6)
        if gradient == "expanded":
            value = value[:, :1].expand(4, 6)
        elif gradient == "transposed":
            value = value.t().contiguous().t()
        ours = RMNP([{"params": [first], "rule": "fallback"}])
        theirs = torch.optim.AdamW([second], weight_decay=0.0, foreach=False, fused=False)
        first.grad, second.grad = value, value
        for optimizer in (ours, theirs):
            optimizer.step()
        torch.testing.assert_close(first, second)


def make_for(name: str, parameters: list[nn.Parameter], **settings: Any) -> Any:
    return make(name, parameters, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", GRADIENT_RULES)
def test_float64_stays_float64(name: str) -> None:
    parameter = matrix(dtype=torch.float64)
    optimizer = make_for(name, [parameter])
    for seed in range(3):
        random_gradients([parameter], seed)
        optimizer.step()
    for value in optimizer.state[parameter].values():
        assert not isinstance(value, torch.Tensor) or value.dtype != torch.float32
    assert parameter.isfinite().all()


@pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
@pytest.mark.parametrize("name", GRADIENT_RULES)
def test_bfloat16_follows_float32(name: str, low_precision: str) -> None:
    """Weights that bfloat16 holds exactly, steps far above its resolution: the same to 1 %."""
    wide = matrix(6, 4)
    wide.data.copy_(wide.detach().bfloat16())
    narrow = nn.Parameter(wide.detach().bfloat16())
    start = wide.detach().clone()
    settings = {"weight_decay": 0.1}
    optimizers = (
        make(name, [wide], **settings),
        make(  # type: ignore[arg-type]
            name,
            [narrow],  # type: ignore[arg-type]
            low_precision=low_precision,
            **settings,
        ),
    )
    for seed in range(2):
        random_gradients([narrow], seed)
        assert narrow.grad is not None
        wide.grad = narrow.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    bound = 0.02 * float(start.abs().max()) + 0.05 * float((wide.detach() - start).abs().max())
    assert float((narrow.detach().float() - wide.detach()).abs().max()) < bound
    master = optimizers[1].state[narrow].get("master")
    if low_precision == "master":
        assert torch.equal(master.bfloat16(), narrow)
        torch.testing.assert_close(master, wide.detach(), rtol=0.05, atol=bound)
    else:
        assert master is None


def test_master_keeps_what_bfloat16_loses() -> None:
    kept, lost = (nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16)) for _ in range(2))
    optimizers = (RMNP([kept], lr=1e-4, low_precision="master"), RMNP([lost], lr=1e-4))
    for parameter, optimizer in zip((kept, lost), optimizers, strict=True):
        for _ in range(100):
            parameter.grad = torch.ones(4, 3, dtype=torch.bfloat16)
            optimizer.step()
    assert torch.equal(lost, torch.ones_like(lost))
    assert (kept < 1).all()
