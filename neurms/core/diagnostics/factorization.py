"""Whether a layer's second moment factors: rho, what rho to expect, the factorisation's error."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from neurms.compiled.correlation import correlation_from_sums, correlation_sums
from neurms.core.ground.layout import Layout
from neurms.core.taps.activity import Activity

__all__ = [
    "expected_correlation",
    "factor_correlation",
    "factor_sums",
    "factorization_error",
    "gradient_margins",
    "row_products",
    "signal_rows",
    "spaced",
    "square_products",
]


@torch.no_grad()
def factor_correlation(
    gradient: Tensor, layout: Layout, v: Tensor, u: Tensor, backend: str = "auto"
) -> Tensor:
    """Return rho = corr over ij of G_ij^2 and v_i u_j, without forming v u^T.

    Args:
        gradient: G in the parameter's shape.
        layout: How G is seen as units x features.
        v: Unit second moments (units,); any positive factor drops out.
        u: Feature second moments (features,), likewise.
        backend: How the kernel runs.

    Returns:
        0-d float64 in [-1, 1]; NaN where one side is constant.

    Reference:
        NeuRMS draft, diagnostic rho.

    Example:
        >>> g = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
        >>> v, u = torch.tensor([1.0, 9.0]), torch.tensor([1.0, 4.0])
        >>> factor_correlation(g, Layout((2, 2), (0,), (1,)), v, u)
        tensor(1., dtype=torch.float64)
    """
    return correlation_from_sums(factor_sums(gradient, layout, v, u, backend), gradient.numel())


@torch.no_grad()
def factor_sums(
    gradient: Tensor, layout: Layout, v: Tensor, u: Tensor, backend: str = "auto"
) -> Tensor:
    """Return the five sums that rho is made of; those of row blocks, or of steps, add up.

    Args:
        gradient: G in the parameter's shape.
        layout: How G is seen as units x features.
        v: Unit second moments (units,).
        u: Feature second moments (features,).
        backend: How the kernel runs.
    """
    plain = layout.groups == layout.taps == 1
    g = layout.matrix(gradient) if plain else layout.blocks(gradient)
    return correlation_sums.on(backend)(g, v, u)


@torch.no_grad()
def expected_correlation(layout: Layout, v: Tensor, u: Tensor) -> Tensor:
    """Return the rho that a layer would typically show if its second moment did factor exactly.

    One gradient is a noisy sight of E[G^2]. For independent normal entries of variance y_ij = v_i
    u_j, G_ij^2 / y_ij is chi-squared with one degree of freedom, and over many entries

        corr(G^2, y) = sqrt((E[y^2] - E[y]^2) / (3 E[y^2] - E[y]^2)),

    below 1/sqrt(3) = .577 however well y describes G. rho is therefore judged against this number,
    not against 1. It is no bound: single gradients scatter around it, those of small layers widely.

    Args:
        layout: Gives the groups, within which units and features meet.
        v: Unit second moments (units,).
        u: Feature second moments (features,).

    Returns:
        0-d float64 in [0, .577]; NaN for an all-zero v or u.

    Reference:
        Not in the NeuRMS draft. Settled here because rho near .5 was read as a bad fit when it is
        nearly the best that can be seen.

    Example:
        >>> v, u = torch.tensor([1.0, 100.0]), torch.ones(3)
        >>> round(expected_correlation(Layout((2, 3), (0,), (1,)), v, u).item(), 3)
        0.444
    """
    v, u = _relative(v).view(layout.groups, -1), _relative(u).view(layout.groups, -1)
    mean = (v.mean(1) * u.mean(1)).mean()
    square = (v.square().mean(1) * u.square().mean(1)).mean()
    spread = (square - mean.square()).clamp(min=0.0)
    return (spread / (3.0 * square - mean.square())).sqrt()


@torch.no_grad()
def gradient_margins(gradient: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the means of G^2 over each unit's and each feature's entries, float64.

    Their product is the rank-one fit of G^2 in I-divergence (Adafactor's), the one-pass relative of
    what RACS iterates to.

    Args:
        gradient: G in the parameter's shape.
        layout: How G is seen as units x features.

    Returns:
        Shapes (units,) and (features,).
    """
    squares = layout.blocks(gradient.contiguous()).double().square()
    return squares.mean((2, 3)).reshape(-1), squares.mean((1, 3)).reshape(-1)


@torch.no_grad()
def square_products(
    module: nn.Module,
    layout: Layout,
    activity: Activity,
    errors: Tensor,
    inputs: Tensor,
    units: Tensor | None = None,
) -> Tensor | None:
    """Return sum_rows d_i^2 h_j^2: the weight gradient of inputs H^2 and error signals D^2.

    Args:
        module: The layer; torch's convolutions are known, and every layer that is one product.
        layout: How its weight is seen as units x features.
        activity: Axes of D and H.
        errors: D as the module's output has it.
        inputs: H as the module's input has it.
        units: Indices of the units to keep, None for all.

    Returns:
        Shape (groups, units/groups, features/groups, taps), float64 on the CPU, float32 elsewhere;
        None for other modules, and for a part of the units of a grouped or transposed convolution.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        d, h = _squares(errors), _squares(inputs)
        products = _convolution_products(module, d, h, units)
        if products is None or units is not None:
            return None if products is None else products.flatten(2)[None]
        return layout.blocks(products.contiguous())
    if layout.groups > 1 or layout.taps > 1 or activity.tokens is not None:
        return None
    d = signal_rows(errors, activity.unit_axes)
    d = d if units is None else d[:, units]
    return row_products(d, signal_rows(inputs, activity.feature_axes))


def row_products(errors: Tensor, inputs: Tensor) -> Tensor:
    """Return sum_rows d_i^2 h_j^2 of D (rows, units) and H (rows, features) as one group's.

    Returns:
        Shape (1, units, features, 1), as :func:`square_products`.
    """
    return (_squares(errors).T @ _squares(inputs))[None, :, :, None]


def _squares(signal: Tensor) -> Tensor:
    return signal.to(torch.float64 if signal.device.type == "cpu" else torch.float32).square()


def signal_rows(signal: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return D or H as (rows, channels).

    Args:
        signal: The tensor.
        axes: Its axes over channels, counted from the end.
    """
    last = tuple(range(-len(axes), 0))
    moved = signal if axes == last else signal.movedim(axes, last)
    return moved.reshape(-1, math.prod(signal.shape[axis] for axis in axes))


def _convolution_products(
    module: nn.modules.conv._ConvNd, d: Tensor, h: Tensor, units: Tensor | None
) -> Tensor | None:
    if units is not None and (module.groups > 1 or module.transposed):
        return None
    spatial = len(module.kernel_size)
    if d.ndim == spatial + 1:
        d, h = d[None], h[None]
    padding = module.padding
    if not module.transposed:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        h = nn.functional.pad(h, module._reversed_padding_repeated_twice, mode=mode)
        padding = (0,) * spatial
    shape = list(module.weight.shape)
    if units is not None:
        d, shape[0] = d.index_select(1, units), len(units)
    products: Tensor = torch.ops.aten.convolution_backward(
        d,
        h,
        torch.zeros(shape, dtype=d.dtype, device=d.device),
        None,
        module.stride,
        padding,
        module.dilation,
        module.transposed,
        module.output_padding,
        module.groups,
        [False, True, False],
    )[1]
    return products


@torch.no_grad()
def factorization_error(
    products: Tensor,
    unit_sums: Tensor,
    feature_sums: Tensor,
    rows: int,
    feature_rows: int,
    units: Tensor | None = None,
) -> Tensor:
    """Return || E[d^2 h^2] - E[d^2] E[h^2] ||_F / || E[d^2 h^2] ||_F.

    The factorisation assumes that a row's d_i^2 and h_j^2 are uncorrelated; this is by how much
    they are not, measured on the rows themselves and free of the gradient's noise.

    Args:
        products: sum_rows d_i^2 h_j^2 from :func:`square_products`.
        unit_sums: sum_rows d_i^2, shape (units,).
        feature_sums: sum_rows h_j^2, shape (features,).
        rows: Rows of D.
        feature_rows: Rows of H.
        units: The units that ``products`` holds, None for all.

    Returns:
        0-d float64, 0 where the factorisation is exact; NaN for an all-zero product.
    """
    v = unit_sums.double() / rows
    v = (v if units is None else v[units]).view(products.shape[0], -1, 1, 1)
    u = (feature_sums.double() / feature_rows).view(products.shape[0], 1, -1, 1)
    joint = products.double() / rows
    error: Tensor = torch.linalg.vector_norm(joint - v * u) / torch.linalg.vector_norm(joint)
    return error


def spaced(count: int, limit: int, device: torch.device) -> Tensor | None:
    """Return ``limit`` indices spread evenly over ``count``, None if all of them fit."""
    if count <= limit:
        return None
    steps = torch.arange(limit, dtype=torch.float64, device="cpu") * (count / limit)
    return steps.floor().long().to(device)


def _relative(moments: Tensor) -> Tensor:
    # Fourth powers of small error signals leave even float64's range.
    wide = moments.double()
    scale = wide.max()
    return wide / scale if math.isfinite(float(scale)) else wide
