"""RMNP's step in one walk over the rows of weight, momentum and gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from neurms.compiled.backends import kernel, scalar
from neurms.compiled.lists import list_kernel
from neurms.compiled.native import addresses, are_plain, is_plain, library, numbers, suits, threads
from neurms.compiled.normalization import row_norms

__all__ = ["row_normalized_moves_", "row_normalized_update_", "row_normalized_updates_"]


def _move_rows_(w: Tensor, ahead: Tensor, step: Tensor, decay: Tensor, floor: float) -> Tensor:
    """Move every row of the weight along that of ``ahead``, by a vector of length ``step``."""
    unit = ahead / row_norms(ahead).clamp(min=floor)
    return w.mul_(decay).sub_(unit.mul_(step))


@kernel
def row_normalized_update_(
    w: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    mu: float,
    nesterov: bool,
    step: Tensor,
    decay: Tensor,
    floor: float,
) -> Tensor:
    """Average the gradient and move every row of the weight by a vector of length ``step``.

    ``M <- mu M + (1 - mu) G``; ``R = (1 - mu) G + mu M`` with ``nesterov``, else ``M``; then
    ``W_i <- decay W_i - step R_i / max(||R_i||, floor)``.

    Args:
        w: The weight, shape (m, n); overwritten.
        momentum: M, the same shape; overwritten.
        gradient: G, the same shape; left as it is.
        mu: Decay of the average.
        nesterov: Look ahead.
        step: 0-d tensor, the learning rate times any constant factor.
        decay: 0-d tensor, ``1 - lr * weight_decay``.
        floor: Least row norm; rows of zeros stay where they are.

    Returns:
        ``w``.

    Reference:
        RMNP, arXiv 2603.20527, and its authors' code. The native form reads each operand once: a
        row is still in cache when its norm is known. Where all three are stored by columns, as
        Keras has its kernels, it takes two walks.

    Example:
        >>> import torch
        >>> w, m, g = torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
        >>> row_normalized_update_(w, m, g, 0.5, True, torch.tensor(1.0), torch.tensor(1.0), 1e-12)
        tensor([[-0.6000, -0.8000]])
    """
    momentum.lerp_(gradient, 1.0 - mu)
    ahead = torch.lerp(gradient, momentum, mu) if nesterov else momentum
    return _move_rows_(w, ahead, step, decay, floor)


# torch 2.13's C++ code generator fails (KeyError: 'buf9') where one loop reads the old momentum and
# writes the weight; as_strided in between compiles, and gives wrong numbers for some strides.
row_normalized_update_.keep_eager_on_inductor()


def _suits(w: Tensor, momentum: Tensor, gradient: Tensor, *settings: object) -> bool:
    return suits(w, momentum, gradient) or suits(w.mT, momentum.mT, gradient.mT)


@row_normalized_update_.native(_suits, mutates=("w", "momentum"), returns="w")
def _row_normalized_update_(
    w: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    mu: float,
    nesterov: bool,
    step: Tensor,
    decay: Tensor,
    floor: float,
) -> Tensor:
    rates = [float(step)], [float(decay)]
    _row_normalized_updates_([w], [momentum], [gradient], *rates, mu, nesterov, floor)
    return w


@list_kernel
def row_normalized_updates_(
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rates: Sequence[float],
    decays: Sequence[float],
    mu: float,
    nesterov: bool,
    floor: float,
) -> None:
    """Do what :func:`row_normalized_update_` does to several weights.

    Args:
        weights: Shapes (m, n); overwritten.
        momenta: M, the same shapes; overwritten.
        gradients: G, the same shapes; left as they are.
        rates: Learning rates times any constant factors.
        decays: ``1 - lr * weight_decay`` of each.
        mu: Decay of the average.
        nesterov: Look ahead.
        floor: Least row norm; rows of zeros stay where they are.

    Example:
        >>> import torch
        >>> w, m, g = torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
        >>> row_normalized_updates_([w], [m], [g], [1.0], [1.0], 0.5, True, 1e-12)
        >>> w
        tensor([[-0.6000, -0.8000]])
    """
    for w, m, g, rate, decay in zip(weights, momenta, gradients, rates, decays, strict=True):
        row_normalized_update_(w, m, g, mu, nesterov, scalar(rate), scalar(decay), floor)


def _are_stored_alike(
    weights: Sequence[Tensor], momenta: Sequence[Tensor], gradients: Sequence[Tensor], *rest: object
) -> list[bool]:
    items = list(zip(weights, momenta, gradients, strict=True))
    alike = [w.dim() == 2 and w.shape == m.shape == g.shape for w, m, g in items]
    if are_plain([*weights, *momenta, *gradients]):
        return alike
    return [
        one and (are_plain(item) or are_plain([x.mT for x in item]))
        for one, item in zip(alike, items, strict=True)
    ]


@row_normalized_updates_.native(_are_stored_alike)
def _row_normalized_updates_(
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    gradients: Sequence[Tensor],
    rates: Sequence[float],
    decays: Sequence[float],
    mu: float,
    nesterov: bool,
    floor: float,
) -> None:
    _in_one_call(weights, momenta, addresses(gradients), rates, decays, mu, nesterov, floor)
    # Autograd must know, as of any write: a graph that is kept has saved these weights.
    increment_version((*weights, *momenta))


def _in_one_call(
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    gradients: bytes | None,
    rates: Sequence[float],
    decays: Sequence[float],
    mu: float,
    nesterov: bool,
    floor: float,
) -> None:
    kernels = library()
    assert kernels is not None
    kernels.neurms_row_normalized_updates(
        len(weights),
        addresses(weights),
        addresses(momenta),
        gradients,
        numbers("q", [w.shape[0] for w in weights]),
        numbers("q", [w.shape[1] for w in weights]),
        numbers("q", [not w.is_contiguous() for w in weights]),
        numbers("f", rates),
        numbers("f", decays),
        mu,
        nesterov,
        floor,
        threads(),
    )


@list_kernel
def row_normalized_moves_(
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    rates: Sequence[float],
    decays: Sequence[float],
    floor: float,
) -> None:
    """Move every row of several weights along its momentum, which holds the gradient already.

    ``W_i <- decay W_i - step M_i / max(||M_i||, floor)``: what :func:`row_normalized_updates_` does
    without ``nesterov`` once its average is made.

    Args:
        weights: Shapes (m, n); overwritten.
        momenta: M, the same shapes; left as they are.
        rates: Learning rates times any constant factors.
        decays: ``1 - lr * weight_decay`` of each.
        floor: Least row norm; rows of zeros stay where they are.

    Reference:
        RMNP, arXiv 2603.20527, with ``update="backward"``. The native form reads M once, and reads
        and writes W once.

    Example:
        >>> import torch
        >>> w = torch.zeros(1, 2)
        >>> row_normalized_moves_([w], [torch.tensor([[3.0, 4.0]])], [1.0], [1.0], 1e-12)
        >>> w
        tensor([[-0.6000, -0.8000]])
    """
    for w, m, rate, decay in zip(weights, momenta, rates, decays, strict=True):
        _move_rows_(w, m, scalar(rate), scalar(decay), floor)


def _are_plain_pairs(
    weights: Sequence[Tensor], momenta: Sequence[Tensor], *rest: object
) -> list[bool]:
    return [
        w.dim() == 2 and w.shape == m.shape and is_plain(w) and is_plain(m)
        for w, m in zip(weights, momenta, strict=True)
    ]


@row_normalized_moves_.native(_are_plain_pairs)
def _row_normalized_moves_(
    weights: Sequence[Tensor],
    momenta: Sequence[Tensor],
    rates: Sequence[float],
    decays: Sequence[float],
    floor: float,
) -> None:
    _in_one_call(weights, momenta, None, rates, decays, 0.0, False, floor)
    increment_version(weights)
