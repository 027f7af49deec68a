"""A few numbers that tell how a model's scale factors are doing, for logs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurms.core.ground.shards import is_sharded
from neurms.core.structures.base import Context
from neurms.core.structures.gradient_moments import GradientMoments
from neurms.core.structures.unit_feature import UnitFeatureDiagonal
from neurms.core.unitwise.tapped import TappedLayer

__all__ = ["MomentLayer", "Side", "at_bounds", "moment_layers", "scale_summary"]


@dataclass(frozen=True, eq=False)
class Side:
    """Factors of a layer's units or features, and which of them stand at a bound."""

    factors: Tensor
    clipped: Tensor


@dataclass(frozen=True, eq=False)
class MomentLayer:
    """A matrix under variant P: its settings and its state, which has been committed."""

    weight: Tensor
    structure: GradientMoments
    state: Mapping[str, Any]

    def sides(self) -> tuple[Side, Side]:
        """Return the last step's sqrt(T / q_i) of units and 1 / sqrt(s_j) of features and bias."""
        state, step = {key: self.state[key] for key in "qs"}, int(self.state["step"])
        left, right = self.structure.factors(state, Context(step))
        # They come with the bias correction of all moments on the left side.
        root = math.sqrt(1.0 - self.structure.beta**step)
        kappa, one_sided = self.structure.kappa, self.structure.of_averages
        return (
            Side(left / root, _at_median_bounds(left, kappa, one_sided)),
            Side(right * root, _at_median_bounds(right, kappa, one_sided)),
        )


@torch.no_grad()
def scale_summary(layers: Iterable[TappedLayer | MomentLayer]) -> dict[str, Tensor]:
    """Return the median unit factor and the share of clipped factors over all layers.

    Args:
        layers: Layers; those without committed statistics are left out.

    Returns:
        0-d tensors, empty without any statistics: ``scale_median`` over all units,
        ``feature_scale_median`` over all features (variants F and P), ``clipped_fraction`` of all
        factors that stand at a bound. P's units have ``sqrt(T / q_i)``, its features
        ``1 / sqrt(s_j)``: their product scales G_ij.
    """
    units: list[Side] = []
    features: list[Side] = []
    for layer in layers:
        own = layer.sides() if isinstance(layer, MomentLayer) else _tapped_sides(layer)
        units += own[:1]
        features += own[1:]
    if not units:
        return {}
    summary = {
        "clipped_fraction": torch.cat([s.clipped for s in (*units, *features)]).float().mean(),
        "scale_median": torch.cat([side.factors for side in units]).median(),
    }
    if features:
        summary["feature_scale_median"] = torch.cat([s.factors for s in features]).median()
    return summary


def moment_layers(
    found: Iterable[tuple[Tensor, GradientMoments, Mapping[str, Any]]],
) -> Iterator[MomentLayer]:
    """Yield the matrices that have taken a step, out of (weight, settings, state).

    A weight that ranks share is left out: its factors are those of all of its rows, which no rank
    has, and a log is no reason to exchange them.
    """
    for weight, structure, state in found:
        if weight.ndim >= 2 and state.get("step") and not is_sharded(weight):
            yield MomentLayer(weight, structure, state)


def at_bounds(
    factors: Tensor, structure: UnitFeatureDiagonal, bounds: tuple[float, float]
) -> Tensor:
    """Return which factors stand at a bound of their clip."""
    low, high = bounds
    if structure.clip == "absolute":
        return (factors >= high) | (factors <= low)
    return _at_median_bounds(factors, structure.kappa)


def _tapped_sides(layer: TappedLayer) -> tuple[Side, ...]:
    if not layer.state.get("step"):
        return ()
    structure = layer.rule.structure
    s, c = layer.factors()
    units = Side(s, at_bounds(s, structure, (structure.s_min, structure.s_max)))
    if c is None:
        return (units,)
    return units, Side(c, at_bounds(c, structure, (structure.c_min, structure.c_max)))


def _at_median_bounds(factors: Tensor, kappa: float, one_sided: bool = False) -> Tensor:
    """Return which factors stand at kappa times the median, or a kappa-th of it if that is a bound.

    Zeros are no factors: their units are dead, and have no part in the median.
    """
    alive = factors > 0
    # The median is itself one of the factors and never clipped, so it is the bounds' own median.
    ratio = factors / factors.masked_fill(~alive, float("nan")).nanmedian()
    low = (ratio * kappa <= 1 + 1e-6) & (not one_sided)
    return alive & ((ratio >= kappa * (1 - 1e-6)) | low)
