"""The profiler's statistics as torchmetrics Metrics: over time, and over ranks.

Each is usable alone, in any loop: ``update`` with what a step shows, ``compute`` for everything
seen so far on all ranks, ``reset`` to begin anew.

====================================  ============================================================
:class:`FactorizationCorrelation`     rho = corr(G_ij^2, v_i u_j)
:class:`FactorizationError`           ||E[d^2 h^2] - E[d^2] E[h^2]|| / ||E[d^2 h^2]||
:class:`UnitMoments`                  mean square of every unit (or feature), dead ones
:class:`RowDominance`                 r_avg, r_min, r_max of a momentum
:class:`ClippedFraction`              share of factors at a bound
:class:`SubspaceEnergy`               share of the gradient's energy in a subspace
====================================  ============================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurms.compiled.correlation import correlation_from_sums
from neurms.core.diagnostics.dominance import row_dominance
from neurms.core.diagnostics.factorization import (
    factor_sums,
    factorization_error,
    row_products,
    signal_rows,
)
from neurms.core.diagnostics.unit_statistics import dead_units, subspace_energies
from neurms.core.ground.extras import require
from neurms.core.ground.layout import Layout, default_layout
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.core.unitwise.scale_summary import at_bounds

require("torchmetrics", extra="report")

from torchmetrics import Metric  # noqa: E402

__all__ = [
    "ClippedFraction",
    "FactorizationCorrelation",
    "FactorizationError",
    "RowDominance",
    "SubspaceEnergy",
    "UnitMoments",
]


class _Statistic(Metric):
    """A metric made of sums; ``settings`` are those of ``torchmetrics.Metric``."""

    is_differentiable = False
    full_state_update = False

    def _sums(self, **shapes: tuple[int, ...]) -> None:
        """Begin sums over steps and ranks, float64."""
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")


class FactorizationCorrelation(_Statistic):
    """Pearson's correlation of G_ij^2 and v_i u_j over all entries of all updates.

    Five sums in float64, from one pass over G without ever forming v u^T. Sums of row blocks of G
    add up to those of G, so that ranks may hold different rows; ranks with the same G change
    nothing. Over time all entries of all steps count as one population, large gradients weighing
    more; for a mean of per-step correlations average the values of ``forward``.

    Args:
        layout: How G is seen as units x features; None takes axis 0 as units.
        **settings: For ``torchmetrics.Metric``.

    Example:
        >>> metric = FactorizationCorrelation()
        >>> g = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
        >>> metric.update(g, torch.tensor([1.0, 9.0]), torch.tensor([1.0, 4.0]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    higher_is_better = True
    sums: Tensor
    count: Tensor

    def __init__(self, layout: Layout | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.layout = layout
        self._sums(sums=(5,), count=())

    def update(self, gradient: Tensor, v: Tensor, u: Tensor) -> None:
        """Take one gradient.

        Args:
            gradient: G in the parameter's shape.
            v: Unit second moments (units,), any positive factor drops out within a step.
            u: Feature second moments (features,).
        """
        layout = self.layout or default_layout(gradient)
        self.sums += factor_sums(gradient, layout, v, u).to(self.sums)
        self.count += gradient.numel()

    def compute(self) -> Tensor:
        """Return rho, 0-d float64; NaN where one side is constant."""
        return correlation_from_sums(self.sums, int(self.count))


class FactorizationError(_Statistic):
    """|| E[d^2 h^2] - E[d^2] E[h^2] ||_F / || E[d^2 h^2] ||_F over all rows seen.

    Args:
        units: m.
        features: n.
        **settings: For ``torchmetrics.Metric``.

    Example:
        >>> metric = FactorizationError(2, 1)
        >>> metric.update(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[1.0], [3.0]]))
        >>> metric.compute()
        tensor(0., dtype=torch.float64)
    """

    higher_is_better = False
    joint: Tensor
    unit_sums: Tensor
    feature_sums: Tensor
    rows: Tensor

    def __init__(self, units: int, features: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._sums(
            joint=(1, units, features, 1), unit_sums=(units,), feature_sums=(features,), rows=()
        )

    def update(self, errors: Tensor, inputs: Tensor) -> None:
        """Take rows of D (..., units) and H (..., features), their leading axes alike."""
        d = signal_rows(errors.detach(), (-1,))
        h = signal_rows(inputs.detach(), (-1,))
        self.joint += row_products(d, h)
        self.unit_sums += d.double().square().sum(0)
        self.feature_sums += h.double().square().sum(0)
        self.rows += d.shape[0]

    def compute(self) -> Tensor:
        """Return the error, 0-d float64; NaN before anything was seen."""
        rows = int(self.rows)
        return factorization_error(self.joint, self.unit_sums, self.feature_sums, rows, rows)


class UnitMoments(_Statistic):
    """Mean square of every unit's error signal, or of every feature's input.

    Args:
        count: Number of units or features.
        **settings: For ``torchmetrics.Metric``.

    Example:
        >>> metric = UnitMoments(2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        >>> metric.compute(), metric.dead()
        (tensor([5., 0.], dtype=torch.float64), 1)
    """

    sums: Tensor
    rows: Tensor

    def __init__(self, count: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._sums(sums=(count,), rows=())

    def update(self, signals: Tensor) -> None:
        """Take rows of D or H, shape (..., count)."""
        rows = signal_rows(signals.detach(), (-1,)).double()
        self.sums += rows.square().sum(0)
        self.rows += rows.shape[0]

    def compute(self) -> Tensor:
        """Return the mean squares, shape (count,), float64."""
        return self.sums / self.rows

    def dead(self) -> int:
        """Return the number of units that never had a signal on this rank."""
        return dead_units(self.sums)


class RowDominance(_Statistic):
    """r_i = (V V^T)_ii / mean_{j != i} |(V V^T)_ij|: mean of r_avg, least r_min, greatest r_max.

    Args:
        **settings: For ``torchmetrics.Metric``.

    Example:
        >>> metric = RowDominance()
        >>> metric.update(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        >>> {name: value.item() for name, value in metric.compute().items()}
        {'r_avg': 1.5, 'r_min': 1.0, 'r_max': 2.0}
    """

    total: Tensor
    seen: Tensor
    least: Tensor
    greatest: Tensor

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._sums(total=(), seen=())
        infinity = torch.tensor(torch.inf, dtype=torch.float64)
        self.add_state("least", infinity, dist_reduce_fx="min")
        self.add_state("greatest", -infinity, dist_reduce_fx="max")

    def update(self, matrix: Tensor) -> None:
        """Take a momentum V (m, n); one without two rows that are not zero is passed over."""
        found = row_dominance(matrix.detach())
        if found is None:
            return
        self.total += found.r_avg
        self.seen += 1
        self.least = self.least.clamp(max=found.r_min)
        self.greatest = self.greatest.clamp(min=found.r_max)

    def compute(self) -> dict[str, Tensor]:
        """Return ``r_avg``, ``r_min`` and ``r_max``, each 0-d float64."""
        return {"r_avg": self.total / self.seen, "r_min": self.least, "r_max": self.greatest}


class ClippedFraction(_Statistic):
    """Share of factors that stand at a bound.

    Args:
        low: Lower bound.
        high: Upper bound.
        **settings: For ``torchmetrics.Metric``.

    Example:
        >>> metric = ClippedFraction(0.0, 100.0)
        >>> metric.update(torch.tensor([1.0, 100.0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    clipped: Tensor
    seen: Tensor

    def __init__(self, low: float, high: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.bounds = low, high
        self.structure = UnitFeatureDiagonal(s_min=low, s_max=high)
        self._sums(clipped=(), seen=())

    def update(self, factors: Tensor) -> None:
        """Take a layer's factors, any shape."""
        self.clipped += at_bounds(factors, self.structure, self.bounds).sum()
        self.seen += factors.numel()

    def compute(self) -> Tensor:
        """Return the share, 0-d float64."""
        return self.clipped / self.seen


class SubspaceEnergy(_Statistic):
    """||U^T G||^2 / ||G||^2 over all updates: what a low-rank method keeps of the gradients.

    Args:
        on_features: Whether U spans features, (n, r), instead of units, (m, r).
        **settings: For ``torchmetrics.Metric``.

    Example:
        >>> metric = SubspaceEnergy()
        >>> metric.update(torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0], [0.0]]))
        >>> metric.compute()
        tensor(0.3600, dtype=torch.float64)
    """

    kept: Tensor
    total: Tensor

    def __init__(self, on_features: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        self.on_features = on_features
        self._sums(kept=(), total=())

    def update(self, gradient: Tensor, basis: Tensor) -> None:
        """Take G (m, n) and an orthonormal basis U."""
        kept, total = subspace_energies(gradient, basis, on_features=self.on_features)
        self.kept += kept
        self.total += total

    def compute(self) -> Tensor:
        """Return the share, 0-d float64."""
        return self.kept / self.total
