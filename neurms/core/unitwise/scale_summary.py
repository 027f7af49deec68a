"""A few numbers that tell how a model's scale factors are doing, for logs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.core.unitwise.tapped import TappedLayer

__all__ = ["at_bounds", "scale_summary"]


@torch.no_grad()
def scale_summary(layers: Iterable[TappedLayer]) -> dict[str, Tensor]:
    """Return the median unit factor and the share of clipped factors over all layers.

    Args:
        layers: Layers; those without committed statistics are left out.

    Returns:
        0-d tensors, empty without any statistics: ``scale_median`` over all units,
        ``feature_scale_median`` over all features (variant F), ``clipped_fraction`` of all factors
        that stand at a bound.
    """
    units, features, clipped = [], [], []
    for layer in layers:
        if not layer.state.get("step"):
            continue
        structure = layer.rule.structure
        s, c = layer.factors()
        units.append(s)
        clipped.append(at_bounds(s, structure, (structure.s_min, structure.s_max)))
        if c is not None:
            features.append(c)
            clipped.append(at_bounds(c, structure, (structure.c_min, structure.c_max)))
    if not units:
        return {}
    summary = {
        "clipped_fraction": torch.cat(clipped).float().mean(),
        "scale_median": torch.cat(units).median(),
    }
    if features:
        summary["feature_scale_median"] = torch.cat(features).median()
    return summary


def at_bounds(
    factors: Tensor, structure: UnitFeatureDiagonal, bounds: tuple[float, float]
) -> Tensor:
    """Return which factors stand at a bound of their clip."""
    low, high = bounds
    if structure.clip == "absolute":
        return (factors >= high) | (factors <= low)
    # The median is itself one of the factors and never clipped, so it is the bounds' own median.
    ratio = factors / factors.median()
    return (ratio >= structure.kappa * (1 - 1e-6)) | (ratio * structure.kappa <= 1 + 1e-6)
