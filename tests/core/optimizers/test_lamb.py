"""LAMB against torch's Adam with the trust ratio put on by hand."""

from __future__ import annotations

import pytest
import torch

from neurms import LAMB
from neurms.core.optimizers.plan import tensor_bytes
from neurms.testing import gradients


def test_equations() -> None:
    weight = torch.nn.Parameter(gradients(5, 3, steps=1, seed=5)[0])
    truth = weight.detach().clone()
    probe = torch.nn.Parameter(torch.zeros_like(truth))
    adam = torch.optim.Adam([probe], lr=1.0, betas=(0.8, 0.9), eps=1e-6)
    optimizer = LAMB([weight], lr=0.1, betas=(0.8, 0.9), weight_decay=0.2)
    for gradient in gradients(5, 3, steps=5):
        weight.grad, probe.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        probe.data.zero_()
        adam.step()
        u = -probe.detach() + 0.2 * truth
        truth = truth - 0.1 * truth.norm() / u.norm() * u
    torch.testing.assert_close(weight.detach(), truth)


def test_state_bytes() -> None:
    weight = torch.nn.Parameter(torch.zeros(8, 2))
    optimizer = LAMB([weight])
    weight.grad = torch.randn(8, 2)
    optimizer.step()
    assert tensor_bytes(optimizer.state[weight]) == 2 * 16 * 4


@pytest.mark.parametrize(
    ("settings", "message"), [({"betas": (0.9,)}, "betas="), ({"eps": -1.0}, r"eps=-1\.0")]
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAMB([torch.nn.Parameter(torch.zeros(2, 2))], **settings)  # type: ignore[arg-type]
