"""Metrics over time against numpy on everything at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import neurms
from neurms.core.ground.layout import layout_of
from tests.callbacks.profiler import truth


def test_metrics_are_reached_from_the_package() -> None:
    metric = neurms.metrics.UnitMoments(3)
    metric.update(torch.ones(2, 3))
    assert metric.compute().tolist() == [1.0, 1.0, 1.0]
    metric.reset()
    assert metric.rows == 0


def test_correlation_over_time_pools_all_entries() -> None:
    metric, x, y = neurms.metrics.FactorizationCorrelation(), [], []
    for step in range(3):
        g, v, u = torch.randn(7, 5) * 10**step, torch.rand(7), torch.rand(5)
        per_step = metric(g, v, u)
        expected = truth.rho(g.double().numpy(), v.double().numpy(), u.double().numpy())
        assert float(per_step) == pytest.approx(expected, abs=1e-9)
        x.append(g.double().square().flatten().numpy())
        y.append(np.outer(v.double(), u.double()).ravel())
    expected = np.corrcoef(np.concatenate(x), np.concatenate(y))[0, 1]
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-9)


def test_correlation_takes_a_grouped_convolution() -> None:
    layer = torch.nn.Conv2d(4, 6, 3, groups=2)
    g, v, u = torch.randn(6, 2, 3, 3), torch.rand(6), torch.rand(4)
    metric = neurms.metrics.FactorizationCorrelation(layout_of(layer, "weight"))
    metric.update(g, v, u)
    y = torch.stack([v[i] * u[(i // 3) * 2 : (i // 3) * 2 + 2] for i in range(6)])
    y = y[:, :, None, None].expand_as(g)
    expected = np.corrcoef(g.double().square().flatten(), y.double().flatten())[0, 1]
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-6)


def test_error_over_time_is_that_of_all_rows() -> None:
    metric, windows = neurms.metrics.FactorizationError(6, 4), []
    for _ in range(3):
        errors, inputs = torch.randn(2, 5, 6), torch.randn(2, 5, 4)
        metric.update(errors, inputs)
        windows.append((errors.reshape(-1, 6).double(), inputs.reshape(-1, 4).double()))
    d, h = (np.concatenate([pair[i] for pair in windows]) for i in (0, 1))
    assert float(metric.compute()) == pytest.approx(truth.error({"d": d, "h": h}), rel=1e-9)


def test_dominance_over_time_keeps_the_extremes() -> None:
    metric = neurms.metrics.RowDominance()
    matrices = [torch.randn(9, 5) for _ in range(3)]
    for matrix in matrices:
        metric.update(matrix)
    metric.update(torch.zeros(3, 3))
    averages, least, greatest = zip(
        *[truth.dominance(m.double().numpy()) for m in matrices], strict=True
    )
    found = {name: float(value) for name, value in metric.compute().items()}
    expected = {"r_avg": np.mean(averages), "r_min": min(least), "r_max": max(greatest)}
    assert found == pytest.approx(expected, rel=1e-9)
