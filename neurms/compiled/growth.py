"""By how much an update is shortened whose norm has grown since the last step."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

__all__ = ["growth_factor", "growth_factors"]

_is_cpu = attrgetter("is_cpu")


def growth_factor(norm: Tensor, phi: Tensor, gamma: float, step: int) -> Tensor:
    """Return eta (...) by which an update of norm ``norm`` is shortened; ``phi`` advances in place.

    eta = gamma / max(||U|| / phi, gamma) from the second step on, else 1; phi <- eta ||U||. A
    ``phi`` of 0 (nothing moved so far) counts as a first step: the formula would hold the layer
    still for ever.
    """
    if norm.ndim == 0 and norm.is_cpu:
        # In plain numbers: eight calls on 0-d tensors cost as much as a pass over a small matrix.
        size = float(norm)
        short = _shortened(size, float(phi), gamma, step)
        phi.fill_(short * size)
        return norm.new_tensor(short)
    fresh = (phi == 0) | (step == 1)
    ratio = norm / torch.where(fresh, 1.0, phi)
    eta = torch.where(fresh, 1.0, gamma / ratio.clamp(min=gamma))
    phi.copy_(eta * norm)
    return eta


def _shortened(size: float, last: float, gamma: float, step: int) -> float:
    return 1.0 if last == 0 or step == 1 else gamma / max(size / last, gamma)


def growth_factors(
    norms: Sequence[Tensor], phis: Sequence[Tensor], gamma: float, steps: Sequence[int]
) -> Sequence[float | Tensor]:
    """Return the :func:`growth_factor` of several updates, as float64; every ``phi`` advances.

    Args:
        norms: Norms of the updates, 0-d.
        phis: The last norms, 0-d, likewise; overwritten.
        gamma: Bound on the growth, at least 1.
        steps: Number of each one's step.

    Returns:
        Numbers on a CPU; else 0-d tensors, which are not waited for.
    """
    if not all(map(_is_cpu, norms)):
        pairs = zip(norms, phis, steps, strict=True)
        return [growth_factor(norm, phi, gamma, step).double() for norm, phi, step in pairs]
    sizes, last = map(Tensor.item, norms), map(Tensor.item, phis)
    # All of them in the same few calls, which cost as much as a pass over a small matrix.
    each = list(zip(sizes, last, steps, strict=True))
    short = [_shortened(size, before, gamma, step) for size, before, step in each]
    moved = [eta * size for eta, (size, *_) in zip(short, each, strict=True)]
    like = phis[0]
    torch._foreach_copy_(list(phis), list(like.new_tensor(moved).unbind()))
    # Rounded as one by itself is.
    rounded: list[float] = norms[0].new_tensor(short).tolist()
    return rounded
