"""What the entries of a layer's statistics look like: spread, dead units, bounds, kept energy."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LEVELS", "dead_units", "levels", "limiter_hit", "subspace_energies", "subspace_energy"]

LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
"""The quantiles that :func:`levels` gives."""


@torch.no_grad()
def levels(moments: Tensor) -> list[float]:
    """Return the quantiles :data:`LEVELS` of a vector, linearly interpolated.

    Args:
        moments: Shape (count,), at least one entry.
    """
    ordered = moments.double().sort().values
    at = torch.tensor(LEVELS, dtype=torch.float64, device=ordered.device) * (len(ordered) - 1)
    low, high = ordered[at.floor().long()], ordered[at.ceil().long()]
    quantiles: list[float] = (low + (high - low) * at.frac()).tolist()
    return quantiles


@torch.no_grad()
def dead_units(unit_sums: Tensor) -> int:
    """Return the number of units whose error signal was exactly zero on every row.

    Args:
        unit_sums: sum_rows d_i^2, shape (units,).
    """
    return int((unit_sums == 0).sum())


@torch.no_grad()
def subspace_energy(gradient: Tensor, basis: Tensor, *, on_features: bool) -> float | None:
    """Return the share of a gradient's energy that an orthonormal basis keeps.

    ||U^T G||_F^2 / ||G||_F^2, or ||G U||_F^2 / ||G||_F^2 for a basis over features.

    Args:
        gradient: G, shape (m, n).
        basis: U, shape (m, r) or (n, r), orthonormal columns.
        on_features: Which of the two.

    Returns:
        A number in [0, 1], None for an all-zero gradient.
    """
    kept, total = subspace_energies(gradient, basis, on_features=on_features)
    return float(kept) / float(total) if total > 0 else None


@torch.no_grad()
def subspace_energies(
    gradient: Tensor, basis: Tensor, *, on_features: bool
) -> tuple[Tensor, Tensor]:
    """Return the energy that a basis keeps of a gradient, and all of it; 0-d float64.

    Args:
        gradient: G, shape (m, n).
        basis: U, shape (m, r) or (n, r), orthonormal columns.
        on_features: Which of the two.
    """
    g, u = gradient.double(), basis.double()
    return (g @ u if on_features else u.T @ g).square().sum(), g.square().sum()


def limiter_hit(before: float, after: float, gamma: float) -> bool | None:
    """Return whether a norm-growth limiter shortened the update between two values of its ``phi``.

    The limiter lets phi grow by gamma at most, so that a step in which it did grow by gamma was
    cut.

    Args:
        before: phi before the step; 0 in the first, which is never limited.
        after: phi after it.
        gamma: The limiter's factor.

    Returns:
        None if there is nothing to compare with.
    """
    if before <= 0:
        return None
    return after >= before * gamma * (1.0 - 1e-5)
