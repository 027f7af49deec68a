"""One row for each layer: medians and means over the steps that were looked at."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neurms.core.diagnostics.dominance import Dominance

__all__ = ["TIMES", "LayerRow", "law_share", "rows_of"]

Values = Mapping[str, Any]

TIMES = ("forward_us", "backward_us", "reduce_us", "scale_us", "update_us", "bookkeeping_us")
"""The times that make up a layer's step; they do not overlap."""

_LAW = ("U", "B", "F")
"""The variants that the cost law is of."""

_MEANS = (
    "rho", "rho_batch", "rho_expected", "rho_gradient", "rho_gradient_expected",
    "factorization_error", "subspace_energy",
)  # fmt: skip


@dataclass(frozen=True)
class LayerRow:
    """What a layer cost and how well its statistics describe it.

    Times are medians over the steps looked at, in microseconds for a whole optimizer step;
    correlations, errors and dominance are means over them; counts, quantiles and bytes are the last
    ones seen. None says that there was nothing to measure.

    Args:
        layer: The module's qualified name.
        kind: Its class.
        shape: The weight's shape.
        rows: Rows of D in a step: batch x positions, over all micro-batches and ranks.
        forward_us: Forward, without statistics.
        backward_us: Backward, without statistics.
        gemm_us: D^T H alone, timed by running it once more; a part of ``backward_us``.
        reduce_us: The kernels that gather statistics.
        scale_us: Those that form factors, and apply them where that is a pass of its own; with
            ``update="backward"`` the same pass sums up D and H.
        update_us: The optimizer's pass over the weight and bias. NeuRMS scales in this same pass.
            For another library's optimizer: its step, shared out by number of elements.
        bookkeeping_us: What calls those kernels, checks and adds up, without them.
        overhead: (reduce + scale) / (all of these times but ``gemm_us``).
        predicted_overhead: The share of operations, by NeuRMS's cost law; None for other rules and
            for variant P, whose sums are the gradient's.
        rho: corr(G_ij^2, v_i u_j) with averaged v and u.
        clipped_units: Units whose factor stands at a bound.
        dominance: r_avg, r_min, r_max of the momentum's rows (of the gradient's without one).
        state_bytes: Measured optimizer state of weight and bias.
        rule: What moves the weight.
        rho_batch: The same correlation with the batch's own sums of D_i^2 and H_j^2.
        rho_expected: The rho to expect if v u^T were exact and the gradient normal: a typical
            value, not a bound.
        rho_gradient: corr(G_ij^2, r_i c_j) with margins of *earlier* gradients, which variant P and
            RACS live on.
        rho_gradient_expected: As ``rho_expected``, for those margins.
        factorization_error: ||E[d^2 h^2] - E[d^2] E[h^2]|| / ||E[d^2 h^2]||.
        unit_levels: Quantiles 0, .05, .25, .5, .75, .95, 1 of v.
        feature_levels: The same of u.
        units: Number of units m.
        features: Number of features n.
        width: min(units, features per group x taps), the law's min(m, n).
        dead_units: Units without any error signal in the step.
        dominance_of: ``"momentum"`` or ``"gradient"``.
        subspace_energy: Share of the gradient's energy that a low-rank method keeps.
        limiter_hits: Share of steps in which a norm-growth limiter cut the update.
        predicted_state_bytes: Bytes that were predicted; None for another library's optimizer.
        samples: Number of steps looked at.
        steps: First and last of them.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    rows: int
    forward_us: float
    backward_us: float
    gemm_us: float | None
    reduce_us: float
    scale_us: float
    update_us: float
    bookkeeping_us: float
    overhead: float
    predicted_overhead: float | None
    rho: float | None
    clipped_units: int | None
    dominance: Dominance | None
    state_bytes: int
    rule: str
    rho_batch: float | None
    rho_expected: float | None
    rho_gradient: float | None
    rho_gradient_expected: float | None
    factorization_error: float | None
    unit_levels: tuple[float, ...] | None
    feature_levels: tuple[float, ...] | None
    units: int
    features: int
    width: int
    dead_units: int | None
    dominance_of: str | None
    subspace_energy: float | None
    limiter_hits: float | None
    predicted_state_bytes: int | None
    samples: int
    steps: tuple[int, int]

    @property
    def total_us(self) -> float:
        """The layer's step time."""
        return sum(float(getattr(self, part)) for part in TIMES)

    @property
    def overhead_with_bookkeeping(self) -> float:
        """(reduce + scale + bookkeeping) / the layer's step time."""
        spent = self.reduce_us + self.scale_us + self.bookkeeping_us
        return spent / self.total_us if self.total_us else 0.0

    @property
    def fidelity(self) -> float | None:
        """Rho / rho_expected: about 1 where the factorisation holds, or a little more."""
        return _quotient(self.rho, self.rho_expected)

    @property
    def gradient_fidelity(self) -> float | None:
        """The same quotient for the gradient's own margins."""
        return _quotient(self.rho_gradient, self.rho_gradient_expected)

    @property
    def unit_spread(self) -> float | None:
        """Quotient of the .95 and .05 quantiles of v."""
        if self.unit_levels is None or not self.unit_levels[1] > 0:
            return None
        return self.unit_levels[5] / self.unit_levels[1]


def rows_of(layers: Mapping[str, Values], samples: Sequence[Values]) -> list[LayerRow]:
    """Return one row for each layer that the header of a run describes."""
    found = []
    for name, static in layers.items():
        own = [s["layers"][name] for s in samples if name in s["layers"]]
        steps = [int(s["step"]) for s in samples if name in s["layers"]]
        if own:
            found.append(_row(name, static, own, (steps[0], steps[-1])))
    return found


def law_share(units: int, features: int, variant: str) -> float:
    """Return the share of operations that NeuRMS's reductions and scalings take.

    Three products of 2 N m n operations each, beside 3 N m for D (square, sum, scale) and, for F,
    3 N n for H: 1/(2n), or (m + n)/(2 m n), which is 1/min(m, n) for a square matrix.

    Args:
        units: m.
        features: n, kernel taps included.
        variant: ``"U"``, ``"B"`` or ``"F"``.

    Reference:
        NeuRMS draft, cost O(rows (m + n)) beside O(rows m n). A share of operations, not of time:
        reductions move much memory for each operation, products little.

    Example:
        >>> law_share(100, 100, "F")
        0.01
    """
    rows = units + (features if variant == "F" else 0)
    return rows / (2.0 * units * features)


def _row(name: str, static: Values, own: Sequence[Values], steps: tuple[int, int]) -> LayerRow:
    times = {key: _averaged(own, key, statistics.median) or 0.0 for key in TIMES}
    means: dict[str, Any] = {key: _averaged(own, key) for key in _MEANS}
    total = sum(times.values())
    last = _last(own)
    m, n = static["matrix_shape"]
    variant = static.get("variant")
    dominance = [v["dominance"] for v in own if v.get("dominance") is not None]
    return LayerRow(
        layer=name,
        kind=static["kind"],
        shape=tuple(static["shape"]),
        rows=int(last("rows") or 0),
        **times,
        **means,
        gemm_us=_averaged(own, "gemm_us", statistics.median),
        overhead=(times["reduce_us"] + times["scale_us"]) / total if total else 0.0,
        predicted_overhead=law_share(m, n, variant) if variant in _LAW else None,
        clipped_units=last("clipped_units"),
        dominance=_dominance(dominance),
        state_bytes=int(last("state_bytes") or 0),
        rule=static["rule"],
        unit_levels=_tuple(last("v")),
        feature_levels=_tuple(last("u")),
        units=static["units"],
        features=static["features"],
        width=min(m, n),
        dead_units=last("dead_units"),
        dominance_of=last("dominance_of"),
        limiter_hits=_averaged(own, "limiter_hit"),
        predicted_state_bytes=static.get("predicted_state_bytes"),
        samples=len(own),
        steps=steps,
    )


def _averaged(
    own: Iterable[Values],
    key: str,
    average: Callable[[Sequence[float]], float] = statistics.fmean,
) -> float | None:
    found = [float(v[key]) for v in own if v.get(key) is not None and not math.isnan(v[key])]
    return average(found) if found else None


def _last(own: Sequence[Values]) -> Any:
    def last(key: str) -> Any:
        return next((v[key] for v in reversed(own) if v.get(key) is not None), None)

    return last


def _dominance(found: Sequence[Sequence[float]]) -> Dominance | None:
    if not found:
        return None
    averages, least, greatest, rows = zip(*found, strict=True)
    return Dominance(statistics.fmean(averages), min(least), max(greatest), int(rows[-1]))


def _tuple(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values)


def _quotient(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b is not None and b > 0 else None
