"""Safeguards: transforms that bound or rescale an update, whatever structure it came from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from neurms.compiled.growth import growth_factor
from neurms.core.ground.errors import check_choice, check_real
from neurms.core.ground.sums import Summing
from neurms.core.structures.base import Context, State, Transform
from neurms.core.structures.diagonal import Diagonal
from neurms.core.structures.norms import frobenius, norms_over_rows

__all__ = [
    "CoupledDecay",
    "Grafted",
    "Grafting",
    "NormGrowthLimiter",
    "RootMeanSquareClip",
    "RowClip",
    "TrustRatio",
    "frobenius",
    "limited",
]

Grafting = Literal["sgd", "adam", "rmsprop", "rmsprop_normalized"]

_MAGNITUDES: dict[str, Transform | None] = {
    "sgd": None,
    "adam": Diagonal((0.0, 0.999), 1e-8, bias_correction=True),
    "rmsprop": Diagonal((0.0, 0.99), 1e-8, bias_correction=False),
    "rmsprop_normalized": Diagonal((0.0, 0.99), 1e-8, bias_correction=False),
}
_PREFIX = "grafting_"


def limited(update: Tensor, phi: Tensor, gamma: float, step: int) -> Tensor:
    """Return ``update`` (..., m, n) shortened by its :func:`growth_factor`."""
    return update * growth_factor(frobenius(update), phi, gamma, step)[..., None, None]


@dataclass(frozen=True)
class NormGrowthLimiter(Transform):
    """Let the update's Frobenius norm grow by at most a factor ``gamma`` from step to step.

    Reference:
        "Fira", Chen et al., 2024; Algorithm 1, lines 9 and 10, of the structured-Fisher paper.
    """

    gamma: float = 1.01
    row_local = True

    def __post_init__(self) -> None:
        check_real("gamma", self.gamma, low=1.0)

    def init(self, matrix: Tensor) -> State:
        """Return the last norm ``phi`` (...), 0 before the first step."""
        return {"phi": matrix.new_zeros(matrix.shape[:-2])}

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return the limited update (..., m, n)."""
        return context.finished(self.summing(update, state, context))

    def summing(self, update: Tensor, state: State, context: Context) -> Summing[Tensor]:
        """Return the limited update (..., m, n), one sum over rows later."""
        (norm,) = yield from norms_over_rows(context, update)
        eta = growth_factor(norm, state["phi"], self.gamma, context.step)
        return update * eta[..., None, None]


@dataclass(frozen=True)
class TrustRatio(Transform):
    """Give the update a norm in proportion to the weight's: U <- coefficient ||W|| / ||U|| U.

    The ratio is 1 where either norm is 0, so that a layer that starts at zero can move.

    Args:
        trust_coefficient: The coefficient; LAMB has 1, LARS .001.

    Reference:
        You et al., "Large Batch Training of Convolutional Networks", 2017 (LARS), and "Large Batch
        Optimization for Deep Learning", 2020 (LAMB, with phi the identity). Departure: behind
        :class:`CoupledDecay` the denominator is the length of gradient plus decay, where LARS's
        paper adds the two lengths.
    """

    trust_coefficient: float = 1.0
    needs_weight = True
    row_local = True

    def __post_init__(self) -> None:
        check_real("trust_coefficient", self.trust_coefficient, strict=True)

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return the rescaled update (..., m, n)."""
        return context.finished(self.summing(update, state, context))

    def summing(self, update: Tensor, state: State, context: Context) -> Summing[Tensor]:
        """Return the rescaled update (..., m, n), one sum over rows later."""
        assert context.weight is not None
        norms = yield from norms_over_rows(context, context.weight, update)
        return update * self.ratio(*norms)[..., None, None]

    def ratio(self, weight: Tensor, update: Tensor) -> Tensor:
        """Return the factor (...) of an update, from the norms (...) of both."""
        ratio = _ratio(weight * self.trust_coefficient, update)
        return torch.where(ratio > 0, ratio, 1.0)


@dataclass(frozen=True)
class CoupledDecay(Transform):
    """Add weight decay to the update itself, U <- U + wd W, so that what follows acts on both.

    A recipe that holds it has ``decay="none"``.
    """

    weight_decay: float
    needs_weight = True
    row_local = True

    def __post_init__(self) -> None:
        check_real("weight_decay", self.weight_decay)

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return U + wd W, shape (..., m, n)."""
        assert context.weight is not None
        return update.add(context.weight, alpha=self.weight_decay) if self.weight_decay else update


@dataclass(frozen=True)
class RowClip(Transform):
    """Bound every unit's update by its weights: ||U_i|| <= clip max(||W_i||, floor).

    The bound is on the update before the learning rate, which therefore scales it too.

    Args:
        clip: The bound on the ratio of the norms.
        floor: Least norm that a unit's weights count as, so that zero rows can move.

    Reference:
        Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", 2021,
        eq. 3, adaptive gradient clipping. Departure: it bounds U before the learning rate, where
        that paper bounds the gradient; the weight's own move, lr U, is bounded by lr ``clip``
        max(||W_i||, floor), and a schedule of lr tightens the bound along with the step.
    """

    clip: float = 0.01
    floor: float = 1e-3
    needs_weight = True
    row_local = True

    def __post_init__(self) -> None:
        check_real("clip", self.clip, strict=True)
        check_real("floor", self.floor, strict=True)

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return the clipped update (..., m, n)."""
        assert context.weight is not None
        rows = torch.linalg.vector_norm(context.weight, dim=-1, keepdim=True)
        bound = rows.clamp_(min=self.floor).mul_(self.clip)
        lengths = torch.linalg.vector_norm(update, dim=-1, keepdim=True)
        return update * torch.where(lengths > bound, bound / lengths, 1.0)


@dataclass(frozen=True)
class RootMeanSquareClip(Transform):
    """Bound the root mean square of an update's entries: U <- U / max(1, RMS(U) / clip).

    Reference:
        Shazeer and Stern, "Adafactor", 2018, section 6, update clipping.
    """

    clip: float = 1.0
    row_local = True

    def __post_init__(self) -> None:
        check_real("clip", self.clip, strict=True)

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return the clipped update (..., m, n)."""
        return context.finished(self.summing(update, state, context))

    def summing(self, update: Tensor, state: State, context: Context) -> Summing[Tensor]:
        """Return the clipped update (..., m, n), one sum over rows later."""
        (norm,) = yield from norms_over_rows(context, update)
        rms = norm / math.sqrt(context.units(update) * update.shape[-1])
        return update / (rms / self.clip).clamp(min=1.0)[..., None, None]


@dataclass(frozen=True)
class Grafted(Transform):
    """Take a structure's direction and another method's length: U <- ||A|| / ||U|| U.

    ``grafting`` names the method that A comes from, which sees the same incoming matrix G:

    - ``None``: no grafting; the structure's own update.
    - ``"sgd"``: A = G.
    - ``"adam"``: A = G / (sqrt(V) + eps), V with decay .999 and bias correction.
    - ``"rmsprop"``: the same with decay .99 and without correction.
    - ``"rmsprop_normalized"``: RMSProp of G / ||G||.

    State: the structure's, and mn numbers for all but ``None`` and ``"sgd"``.

    Args:
        structure: What gives the direction.
        grafting: What gives the length.

    Raises:
        ValueError: Unknown ``grafting``.

    Reference:
        Agarwal et al., "Disentangling Adaptive Gradient Methods from Learning Rates", 2020; the
        names are those of Distributed Shampoo (Shi et al., 2023). No first moment enters the
        length.

    Example:
        >>> import torch
        >>> gradient = torch.tensor([[3.0, 4.0]])
        >>> grafted = Grafted(Diagonal(), "sgd")
        >>> update = grafted(gradient, grafted.init(gradient), Context(step=1))
        >>> round(float(update.norm()), 5)
        5.0
    """

    structure: Transform
    grafting: Grafting | None = None

    def __post_init__(self) -> None:
        check_choice("grafting", self.grafting, (None, *_MAGNITUDES))

    @property
    def needs_weight(self) -> bool:  # type: ignore[override]
        """Whether the structure reads the weight."""
        return self.structure.needs_weight

    def init(self, matrix: Tensor) -> State:
        """Return the structure's state and, prefixed, that of the grafted method."""
        state = self.structure.init(matrix)
        if magnitude := _MAGNITUDES.get(self.grafting or ""):
            state |= {_PREFIX + key: value for key, value in magnitude.init(matrix).items()}
        return state

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return the structure's update (..., m, n) at the other method's length."""
        direction = self.structure(update, state, context)
        if self.grafting is None:
            return direction
        length = self._length(update, state, context)
        return direction * _ratio(length, frobenius(direction))[..., None, None]

    def _length(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        magnitude = _MAGNITUDES[self.grafting or ""]
        if magnitude is None:
            return frobenius(gradient)
        if self.grafting == "rmsprop_normalized":
            norm = frobenius(gradient)
            gradient = gradient * _ratio(torch.ones_like(norm), norm)[..., None, None]
        own = {k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)}
        return frobenius(magnitude(gradient, own, context))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return numerator / denominator, and 0 where the denominator is 0."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)
