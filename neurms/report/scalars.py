"""A profiled step as the flat numbers that loggers take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
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

_WHOLE = ("step_ms", "profiler_ms", "rss_bytes", "state_bytes")


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
    found: dict[str, float | None] = {}
    rows = sample["layers"]
    for layer, values in rows.items():
        numbers = {name: values.get(name) for name in _NAMES}
        numbers |= zip(("r_avg", "r_min", "r_max"), values.get("dominance") or (), strict=False)
        numbers["overhead"] = _overhead([values])
        found |= {f"neurms/{layer}/{name}": value for name, value in numbers.items()}
    rho = [found[f"neurms/{layer}/rho"] for layer in rows]
    seen = [value for value in rho if value is not None and math.isfinite(value)]
    found |= {f"neurms/{name}": sample.get(name) for name in _WHOLE}
    found["neurms/rho"] = statistics.fmean(seen) if seen else None
    found["neurms/overhead"] = _overhead(list(rows.values()))
    numbers = {name: v for name, v in found.items() if v is not None and math.isfinite(v)}
    return {name: float(value) for name, value in numbers.items()}


def _overhead(rows: Sequence[Mapping[str, Any]]) -> float | None:
    def spent(*names: str) -> float:
        return sum(row.get(name) or 0.0 for row in rows for name in names)

    total = spent(*TIMES)
    return spent("reduce_us", "scale_us") / total if total else None
