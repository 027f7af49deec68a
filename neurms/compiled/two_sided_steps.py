"""RACS's step of matrices: the fit of its averages, the bound on growth, and the moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from neurms.compiled.finite import within
from neurms.compiled.growth import growth_factors
from neurms.compiled.lists import list_kernel
from neurms.compiled.native import addresses, are_plain, library, numbers, threads
from neurms.compiled.two_sided import TOLERANCE, two_sided_scales
from neurms.compiled.two_sided_once import two_sided_once
from neurms.compiled.update import apply_updates_

__all__ = ["TRACKED", "two_sided_steps_"]

TRACKED = -1
"""Rounds that stand for one round from the last average; 0 stands for plain sums."""


@list_kernel
def two_sided_steps_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    q: Sequence[Tensor],
    s: Sequence[Tensor],
    phis: Sequence[Tensor],
    steps: Sequence[int],
    corrections: Sequence[float],
    rates: Sequence[float],
    decays: Sequence[float],
    beta: float,
    rounds: int,
    gamma: float,
) -> bool:
    """Move matrices by gradients that their own averages scale, in place, if those stay finite.

    The averages q and s move towards the fit of G.^2; with ``left`` and ``right`` what they give
    (:func:`~neurms.compiled.two_sided.two_sided_scales`), and eta the bound on the growth of
    ``||left_i G_ij right_j||`` (:func:`~neurms.compiled.growth.growth_factor`), ``W_ij <- decay
    W_ij - rate eta left_i G_ij right_j``.

    Args:
        weights: Shape (m, n) each; overwritten.
        gradients: The same shapes.
        q: Averages over units, shape (m,); overwritten.
        s: Averages over features, shape (n,); overwritten.
        phis: Last norms, 0-d; overwritten.
        steps: Number of each matrix's step, from 1.
        corrections: Factors of ``left``.
        rates: Learning rates.
        decays: What is kept of weights.
        beta: Decay of the averages, in [0, 1).
        rounds: Of power iteration; 0 for plain sums, :data:`TRACKED` for one round from s.
        gamma: Bound on the growth, at least 1.

    Returns:
        Whether all averages and norms are finite, as they are not where a gradient holds a NaN or
        an infinity, or numbers whose squares do not fit. Nothing is changed otherwise.

    Reference:
        RACS, Algorithm 1 of the structured-Fisher paper. The native form makes the same calls as
        this definition.

    Example:
        >>> import torch
        >>> w, g, q, s = torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(2), torch.zeros(2)
        >>> phi, one = torch.zeros(()), [1.0]
        >>> two_sided_steps_([w], [g], [q], [s], [phi], [1], one, one, one, 0.0, 0, 1.01)
        True
        >>> w
        tensor([[-1., -1.],
                [-1., -1.]])
    """
    if rounds > 0:
        made = two_sided_scales(gradients, q, s, corrections, rounds, 1.0 - beta)
    else:
        made = two_sided_once(gradients, q, s, corrections, beta, rounds == TRACKED)
    new_q, new_s, left, right, norms = made
    kept = [*new_q, *new_s, *norms]
    if not within(kept, [torch.finfo(x.dtype).max for x in kept]):
        return False
    torch._foreach_copy_([*q, *s], [*new_q, *new_s])
    etas = growth_factors(norms, phis, gamma, steps)
    apply_updates_(
        weights,
        gradients,
        [None] * len(weights),
        left,
        right,
        [eta * rate for eta, rate in zip(etas, rates, strict=True)],
        decays,
    )
    return True


def _are_plain(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    q: Sequence[Tensor],
    s: Sequence[Tensor],
    phis: Sequence[Tensor],
    *numbers_of_each: Sequence[float],
) -> list[bool]:
    """Return which items the native form serves; where they are plain, without a call for each."""
    own = weights, gradients, q, s, phis
    if not are_plain([x for column in own for x in column]):
        return [False] * len(weights)
    return [
        w.ndim == 2
        and w.numel() > 0
        and g.shape == w.shape
        and up.shape == w.shape[:1]
        and across.shape == w.shape[1:]
        and not phi.ndim
        for w, g, up, across, phi in zip(*own, strict=True)
    ]


def _step_natively(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    q: Sequence[Tensor],
    s: Sequence[Tensor],
    phis: Sequence[Tensor],
    steps: Sequence[int],
    corrections: Sequence[float],
    rates: Sequence[float],
    decays: Sequence[float],
    beta: float,
    rounds: int,
    gamma: float,
) -> bool:
    kernels = library()
    assert kernels is not None
    moved = kernels.neurms_two_sided_steps(
        len(weights),
        addresses((*weights, *gradients, *q, *s, *phis)),
        numbers("q", [w.shape[0] for w in weights]),
        numbers("q", [w.shape[1] for w in weights]),
        numbers("q", steps),
        numbers("f", corrections),
        numbers("d", rates),
        numbers("f", decays),
        beta,
        rounds,
        TOLERANCE,
        gamma,
        threads(),
    )
    if not moved:
        return False
    # Autograd must know, as of any write: a graph that is kept has saved these weights.
    increment_version([*weights, *q, *s, *phis])
    return True


# A graph holds the kernels of the definition.
two_sided_steps_.native(_are_plain, two_sided_steps_.eager)(_step_natively)
