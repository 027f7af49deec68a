"""Quantiles, kept energy, limiter hits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neurms.core.diagnostics.unit_statistics import (
    LEVELS,
    dead_units,
    levels,
    limiter_hit,
    subspace_energy,
)
from neurms.core.transforms.safeguards import limited


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_levels_are_numpys_quantiles(count: int) -> None:
    values = torch.randn(count).exp()
    assert levels(values) == pytest.approx(np.quantile(values.double().numpy(), LEVELS))


def test_dead_units_have_no_signal_at_all() -> None:
    assert dead_units(torch.tensor([0.0, 1e-30, 0.0])) == 2


def test_energy_of_a_projection() -> None:
    g = torch.randn(6, 4)
    u, _ = torch.linalg.qr(torch.randn(6, 2))
    kept = (u @ u.T @ g).square().sum() / g.square().sum()
    assert subspace_energy(g, u, on_features=False) == pytest.approx(kept.item(), rel=1e-5)
    assert subspace_energy(g.T, u, on_features=True) == pytest.approx(kept.item(), rel=1e-5)
    assert subspace_energy(torch.zeros(6, 4), u, on_features=False) is None


@pytest.mark.parametrize(
    ("growth", "hit"), [(0.5, False), (1.0, False), (1.005, False), (3.0, True)]
)
def test_limiter_hits_are_told_from_its_norms(growth: float, hit: bool) -> None:
    phi, update = torch.zeros(()), torch.randn(4, 4)
    limited(update, phi, 1.01, 1)
    before = float(phi)
    shortened = limited(update * growth, phi, 1.01, 2)
    assert limiter_hit(before, float(phi), 1.01) is hit
    assert (shortened.norm() < (update * growth).norm() * 0.999) == hit
    assert limiter_hit(0.0, 1.0, 1.01) is None
