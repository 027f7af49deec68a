"""Variant P's step of matrices and their biases: sums over gradients, factors and moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from neurms.compiled.gradient_factors import gradient_factors
from neurms.compiled.lists import list_kernel
from neurms.compiled.native import addresses, are_plain, library, numbers, threads
from neurms.compiled.square_sums import average_square_sums, joint_square_sums
from neurms.compiled.update import apply_updates_

__all__ = ["PLAINLY_GOOD", "are_good", "gradient_steps_", "mixture"]

PLAINLY_GOOD = 1e60
"""A sum of squares of numbers that are all far below the bound of any matrix. Gradients that have a
larger one are looked at by themselves: the root of the sum might still be beyond float32."""


def are_good(rows: Sequence[Tensor]) -> bool:
    """Return whether sums by row show that gradients are finite, and plainly not too large.

    Sums of squares of float32 never leave float64, and a NaN is no less than anything.

    Args:
        rows: Sums of squares by row of every matrix, shape (m,), float64.

    Example:
        >>> import torch
        >>> are_good([torch.tensor([1.0, 4.0])]), are_good([torch.tensor([1.0, float("nan")])])
        (True, False)
    """
    whole = torch.cat([own.to(rows[0].device) for own in rows])
    return bool((whole <= PLAINLY_GOOD).all())


def mixture(momentum: float, nesterov: bool) -> tuple[float, float]:
    """Return how much of a gradient and of the average so far is in what moves a weight.

    The average, ``(1 - mu) G + mu M``, or Nesterov's, ``(1 - mu) G + mu ((1 - mu) G + mu M)``.

    Args:
        momentum: mu, the decay of the average.
        nesterov: Which of the two it is.

    Example:
        >>> mixture(0.5, False), mixture(0.5, True)
        ((0.5, 0.5), (0.75, 0.25))
    """
    fresh = 1.0 - momentum
    return (fresh * (1.0 + momentum), momentum**2) if nesterov else (fresh, momentum)


@list_kernel
def gradient_steps_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    velocities: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    bias_gradients: Sequence[Tensor | None],
    bias_velocities: Sequence[Tensor | None],
    q: Sequence[Tensor],
    s: Sequence[Tensor],
    corrections: Sequence[float],
    rates: Sequence[float],
    decays: Sequence[float],
    bias_rates: Sequence[float],
    bias_decays: Sequence[float],
    beta: float,
    kappa: float,
    damping: float,
    momentum: float,
    nesterov: bool = False,
    of_averages: bool = False,
) -> bool:
    """Move matrices and biases by their scaled gradients, in place, if gradients are good.

    With ``L, R`` the factors that :func:`~neurms.compiled.gradient_factors.gradient_factors` makes
    of the sums of squares of [G | g], ``W <- decay W - rate L G R`` and ``b <- decay b - rate (L
    r) g``, r the last of R; with ``momentum`` by the averages of G and g instead, and
    ``of_averages`` of sums of their squares.

    Args:
        weights: Shape (m, n) each; overwritten.
        gradients: The same shapes.
        velocities: The same shapes, overwritten; None for all without momentum.
        biases: Shape (m,) each, overwritten, or None.
        bias_gradients: The same shapes, None where there is no bias.
        bias_velocities: The same shapes, overwritten; None without a bias or momentum.
        q: Roots of averages by row, shape (m,); overwritten.
        s: Roots of averages by column, shape (n,), or (n + 1,) with a column for a bias.
        corrections: ``1 - beta^t`` of every matrix.
        rates: Learning rates of weights.
        decays: What is kept of weights.
        bias_rates: Learning rates of biases, any number for None.
        bias_decays: What is kept of biases, likewise.
        beta: Decay of the averages, in [0, 1).
        kappa: Width of the clip, at least 1.
        damping: How much of their mean averages by column are taken for.
        momentum: What is kept of velocities, 0 for none.
        nesterov: Whether weights move by Nesterov's averages, see :func:`mixture`.
        of_averages: Whether sums are those of what moves the weights, and factors are bounded from
            above alone; wants momentum.

    Returns:
        Whether the sums by row are all at most :data:`PLAINLY_GOOD`. Nothing is changed otherwise:
        a gradient is NaN, infinite, or so large that somebody has to look at it.

    Reference:
        NeuRMS's variant P. The native form makes the same calls as this definition.

    Example:
        >>> import torch
        >>> w, g, q, s = torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(2), torch.zeros(2)
        >>> no, one = [None], [1.0]
        >>> gradient_steps_([w], [g], no, no, no, no, [q], [s], *[one] * 5, 0.0, 10.0, 0.0, 0.0)
        True
        >>> w.round(decimals=4)
        tensor([[-1., -1.],
                [-1., -1.]])
    """
    widths = [x.size(0) for x in s]
    if of_averages:
        averages, parts = (velocities, bias_gradients, bias_velocities), mixture(momentum, nesterov)
        rows, columns = average_square_sums(gradients, *averages, widths, *parts)  # type: ignore[arg-type]
    else:
        rows, columns = joint_square_sums(gradients, bias_gradients, widths)
    if not are_good(rows):
        return False
    new_q, new_s, left, right = gradient_factors(
        rows, columns, q, s, corrections, beta, kappa, damping, of_averages
    )
    torch._foreach_copy_([*q, *s], [*new_q, *new_s])
    there = [k for k, bias in enumerate(biases) if bias is not None]
    apply_updates_(
        [*weights, *_chosen(biases, there)],
        [*gradients, *_chosen(bias_gradients, there)],
        [*velocities, *_chosen(bias_velocities, there)],
        [*left, *[left[k] * right[k][-1] for k in there]],
        [*[y[: w.size(1)] for y, w in zip(right, weights, strict=True)], *[None] * len(there)],
        [*rates, *_chosen(bias_rates, there)],
        [*decays, *_chosen(bias_decays, there)],
        momentum,
        1.0 - momentum,
        not momentum,
        bool(momentum),
        nesterov,
    )
    return True


def _chosen(items: Sequence[Any], there: Sequence[int]) -> list[Any]:
    return [items[k] for k in there]


def _are_plain(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    velocities: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    bias_gradients: Sequence[Tensor | None],
    bias_velocities: Sequence[Tensor | None],
    q: Sequence[Tensor],
    s: Sequence[Tensor],
    *numbers_of_each: Sequence[float],
) -> list[bool]:
    """Return which items the native form serves; where they are plain, without a call for each."""
    own = weights, gradients, velocities, biases, bias_gradients, bias_velocities, q, s
    if not are_plain([x for column in own for x in column if x is not None]):
        return [False] * len(weights)
    return [
        w.ndim == 2
        and g.shape == w.shape
        and (v is None or v.shape == w.shape)
        and up.shape == w.shape[:1]
        and across.ndim == 1
        and w.shape[1] + (b is not None) <= across.shape[0] <= w.shape[1] + 1
        and (x is None if b is None else x is not None and x.shape == b.shape == w.shape[:1])
        and (y is None if v is None or b is None else y is not None and y.shape == b.shape)
        for w, g, v, b, x, y, up, across in zip(*own, strict=True)
    ]


def _step_natively(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    velocities: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    bias_gradients: Sequence[Tensor | None],
    bias_velocities: Sequence[Tensor | None],
    q: Sequence[Tensor],
    s: Sequence[Tensor],
    corrections: Sequence[float],
    rates: Sequence[float],
    decays: Sequence[float],
    bias_rates: Sequence[float],
    bias_decays: Sequence[float],
    beta: float,
    kappa: float,
    damping: float,
    momentum: float,
    nesterov: bool = False,
    of_averages: bool = False,
) -> bool:
    kernels = library()
    assert kernels is not None
    first = *weights, *gradients, *velocities, *biases
    last = *bias_gradients, *bias_velocities, *q, *s
    moved = kernels.neurms_gradient_steps(
        len(weights),
        addresses((*first, *last)),
        numbers("q", [w.shape[0] for w in weights]),
        numbers("q", [w.shape[1] for w in weights]),
        numbers("q", [x.shape[0] for x in s]),
        numbers("d", corrections),
        numbers("f", (*rates, *decays, *bias_rates, *bias_decays)),
        beta,
        kappa,
        damping,
        momentum,
        nesterov,
        of_averages,
        PLAINLY_GOOD,
        threads(),
    )
    if not moved:
        return False
    # Autograd must know, as of any write: a graph that is kept has saved these weights.
    written = *weights, *velocities, *biases, *bias_velocities, *q, *s
    increment_version([x for x in written if x is not None])
    return True


# A graph holds the kernels of the definition.
gradient_steps_.native(_are_plain, gradient_steps_.eager)(_step_natively)
