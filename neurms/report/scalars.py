"""A profiled step as the flat numbers that loggers take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from neurms.report.rows import TIMES

__all__ = ["MEANS", "layer_scalars"]

MEANS = frozenset(("neurms/rho", "neurms/overhead"))
"""The two that say most of all layers together."""


_NAMES = (
    "forward_us", "backward_us", "gemm_us", "reduce_us", "scale_us", "update_us",
    "bookkeeping_us", "rho", "rho_batch", "rho_expected", "rho_gradient", "factorization_error",
    "clipped_units", "dead_units", "subspace_energy", "limiter_hit", "state_bytes",
)  # fmt: skip


def layer_scalars(sample: Mapping[str, Any]) -> dict[str, float]:
    """Return ``neurms/<layer>/<what>`` -> number, and over all layers ``neurms/<what>``.

    Args:
        sample: One entry of a run's samples.

    Returns:
        Finite numbers only; dots in layer names stay.

    Example:
        >>> layer_scalars({"layers": {"fc": {"rho": 0.5}}})
        {'neurms/fc/rho': 0.5, 'neurms/rho': 0.5}
    """
    found: dict[str, float] = {}
    for layer, values in sample["layers"].items():
        numbers = {name: values.get(name) for name in _NAMES}
        if values.get("dominance") is not None:
            numbers |= dict(zip(("r_avg", "r_min", "r_max"), values["dominance"], strict=False))
        spent = sum(values.get(name) or 0.0 for name in TIMES)
        if spent:
            numbers["overhead"] = (values["reduce_us"] + values["scale_us"]) / spent
        for name, value in numbers.items():
            if value is not None and math.isfinite(value):
                found[f"neurms/{layer}/{name}"] = float(value)
    return found | _means(sample, found)


def _means(sample: Mapping[str, Any], found: Mapping[str, float]) -> dict[str, float]:
    means: dict[str, float] = {}
    rho = [
        found[f"neurms/{layer}/rho"] for layer in sample["layers"] if f"neurms/{layer}/rho" in found
    ]
    if rho:
        means["neurms/rho"] = statistics.fmean(rho)
    values = list(sample["layers"].values())
    spent = sum(v.get(name) or 0.0 for v in values for name in TIMES)
    if spent:
        extra = sum(v.get(name) or 0.0 for v in values for name in ("reduce_us", "scale_us"))
        means["neurms/overhead"] = extra / spent
    for name in ("step_ms", "profiler_ms", "rss_bytes", "state_bytes"):
        if sample.get(name) is not None:
            means[f"neurms/{name}"] = float(sample[name])
    return means
