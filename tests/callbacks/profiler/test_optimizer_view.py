"""What the profiler reads off optimizers whose layers have no taps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import neurms
from neurms.callbacks.profiler import Profiler
from neurms.core.unitwise.preconditioner import GradientPreconditioner
from tests.callbacks.profiler import truth


@pytest.mark.parametrize("beside", [False, True])
def test_variant_p_shows_its_clipped_units_and_its_variant(beside: bool) -> None:
    model, kappa = truth.mlp(), 1.5
    settings: dict[str, Any] = {"variant": "P", "kappa": kappa}
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    preconditioner = GradientPreconditioner(model, **settings) if beside else None
    optimizer = sgd if beside else neurms.NeuRMS(model, lr=0.01, **settings)
    common: dict[str, Any] = {"every_n_steps": 1, "warmup_steps": 0}
    with Profiler(model, optimizer, preconditioner=preconditioner, **common) as profiler:
        for _ in range(3):
            logits = model(torch.randn(8, 12))
            nn.functional.cross_entropy(logits, torch.randint(4, (8,))).backward()
            if preconditioner is not None:
                preconditioner.precondition_(sgd)
            optimizer.step()
            optimizer.zero_grad()
    source = preconditioner or optimizer
    for row, matrix in zip(profiler.report(), source.moment_layers(), strict=True):
        # The state keeps roots of moments; outliers of their inverse are what a clip meets.
        inverse = 1.0 / matrix.state["q"].double()
        ratio = inverse / inverse.sort().values[(inverse.numel() - 1) // 2]
        assert row.clipped_units == int(((ratio > kappa) | (ratio < 1 / kappa)).sum())
        assert row.predicted_overhead is None
        assert profiler.report().run.header["layers"][row.layer]["variant"] == "P"
    assert sum(row.clipped_units or 0 for row in profiler.report()) > 0
