"""Gradients that are computed anew, in a closure, after they were scaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neurms


def network() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))


@pytest.mark.parametrize("variant", ["U", "P"])
def test_gradients_that_a_closure_computes_after_they_were_scaled_are_missed(variant: Any) -> None:
    model, data = network(), torch.ones(2, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    preconditioner = neurms.GradientPreconditioner(model, variant=variant)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(data).square().mean()
        loss.backward()
        return loss

    closure()
    preconditioner.precondition_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    closure()
    preconditioner.precondition_(optimizer)
    with pytest.warns(UserWarning, match=r"computed 4 gradients anew after precondition_"):
        optimizer.step(closure)


def test_scaling_in_the_closure_is_right() -> None:
    models = network(), network()
    data = torch.ones(2, 5)
    for model, inside in zip(models, (True, False), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        preconditioner = neurms.GradientPreconditioner(model, variant="U")

        def closure(net: Any = model, own: Any = optimizer, scale: Any = preconditioner) -> Tensor:
            own.zero_grad()
            loss: Tensor = net(data).square().mean()
            loss.backward()
            scale.precondition_(own)
            return loss

        for _ in range(3):
            if inside:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    first, second = (list(model.parameters()) for model in models)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
