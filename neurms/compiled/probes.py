"""Products of a gradient with probes, from its two factors: the gradient itself is not formed."""

from __future__ import annotations

import torch
from torch import Tensor

from neurms.compiled.backends import kernel
from neurms.compiled.native import LEAST_ELEMENTS, fits, library, threads

__all__ = ["mean_squares", "probe_products"]


@kernel
def probe_products(
    errors: Tensor, activations: Tensor, right: Tensor, left: Tensor
) -> tuple[Tensor, Tensor]:
    """Multiply ``G = D^T H`` by probes from both sides: ``G z = D^T (H z)``, ``G^T y = H^T (D y)``.

    Four thin products, natively in one pass over D and H; nothing of the size of G is made. Where
    ``right`` has one row more than H has features, H has a column of ones beside it, so that G has
    the bias's gradient ``D^T 1``.

    Args:
        errors: D, shape (rows, m), any floating dtype.
        activations: H, shape (rows, n), the same dtype.
        right: Probes z, shape (n, k) or (n + 1, k).
        left: Probes y, shape (m, l).

    Returns:
        ``G z``, shape (m, k), and ``G^T y``, as many rows as ``right``, shape (n [+ 1], l), both in
        the dtype of D.

    Reference:
        NeuRMS, variant P with ``update="backward"``. Both are linear in G, so that those of parts
        of a batch add up.

    Example:
        >>> import torch
        >>> d, h = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> probe_products(d, h, torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0], [1.0]]))
        (tensor([[-1.],
                [-2.]]), tensor([[ 9.],
                [12.]]))
    """
    features = activations.size(1)
    right, left = right.to(errors.dtype), left.to(errors.dtype)
    seen, back = activations @ right[:features], errors @ left
    products = activations.mT @ back
    if right.size(0) > features:
        seen = seen + right[features]
        products = torch.cat([products, back.sum(0, keepdim=True)])
    return errors.mT @ seen, products


def _fits(errors: Tensor, activations: Tensor, right: Tensor, left: Tensor) -> bool:
    alike = right.size(1) == left.size(1) > 0 and errors.dim() == activations.dim() == 2
    return alike and errors.size(0) > 0 and fits(errors, activations, right, left)


def _suits(errors: Tensor, activations: Tensor, right: Tensor, left: Tensor) -> bool:
    worth = errors.numel() + activations.numel() >= LEAST_ELEMENTS
    return worth and _fits(errors, activations, right, left)


@probe_products.native(_suits, fits=_fits)
def _probe_products(
    errors: Tensor, activations: Tensor, right: Tensor, left: Tensor
) -> tuple[Tensor, Tensor]:
    kernels = library()
    assert kernels is not None
    (rows, m), n, k = errors.shape, activations.size(1), left.size(1)
    forth, back = errors.new_empty(m, k), errors.new_empty(right.size(0), k)
    kernels.neurms_probe_products(
        errors.data_ptr(),
        activations.data_ptr(),
        rows,
        m,
        n,
        right.data_ptr(),
        left.data_ptr(),
        k,
        int(right.size(0) > n),
        forth.data_ptr(),
        back.data_ptr(),
        threads(),
    )
    return forth, back


def mean_squares(products: Tensor) -> Tensor:
    """Return the mean of squares over probes, an estimate of G's sums of squares by row.

    Args:
        products: ``G z``, shape (m, k).

    Returns:
        ``sum_k (G z_k)_i^2 / k``, shape (m,), float64. With independent entries of +-1 in z its
        expectation is ``sum_j G_ij^2``; with a full set of orthogonal ones, it is that.

    Example:
        >>> import torch
        >>> mean_squares(torch.tensor([[1.0, 3.0]]))
        tensor([5.], dtype=torch.float64)
    """
    return products.to(torch.float64).square().mean(-1)
