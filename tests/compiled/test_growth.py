"""The bound on growth: of many updates as of each."""

from __future__ import annotations

import pytest
import torch

from neurms.compiled.growth import growth_factor, growth_factors


def test_many_growth_factors_are_those_of_each() -> None:
    generator = torch.Generator().manual_seed(0)
    norms = [torch.rand((), generator=generator) * 10 for _ in range(6)]
    lasts = [torch.rand((), generator=generator) for _ in range(5)] + [torch.tensor(0.0)]
    steps, one_by_one = [1, 2, 3, 4, 5, 6], [phi.clone() for phi in lasts]
    together = growth_factors(norms, lasts, 1.1, steps)
    for norm, phi, step, eta, moved in zip(norms, one_by_one, steps, together, lasts, strict=True):
        fresh = step == 1 or phi == 0
        truth = 1.0 if fresh else 1.1 / max(norm.double() / phi.double(), 1.1)
        assert eta == pytest.approx(float(truth), rel=1e-7)
        assert eta == float(growth_factor(norm, phi, 1.1, step))
        assert torch.equal(moved, phi)
        assert float(moved) == pytest.approx(float(truth * norm), rel=1e-6)
