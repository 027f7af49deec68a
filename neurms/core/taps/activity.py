"""Which axes of a layer's input and error signal count features and units.

A weight's :class:`~neurms.core.ground.layout.Layout` says how the parameter is seen as units x
features; an :class:`Activity` says the same of the two tensors that backpropagation shows the
layer: H, whose remaining axes are the rows that the layer read, and D, whose remaining axes are the
rows it wrote.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neurms.compiled.reductions import axes_square_sum
from neurms.core.ground.layout import is_features_first

__all__ = ["Activity", "activity_of"]


@dataclass(frozen=True)
class Activity:
    """The rows x channels view of a layer's H and D.

    Axes count from the end, so that batched and unbatched calls of one layer share an activity.

    Args:
        unit_axes: Axes of D over units, in the weight's order of units.
        feature_axes: Axes of H over features, in the weight's order of features.
        tokens: Number of features where H holds token indices, that is one-hot rows in short
            (an embedding); None for an ordinary H.

    Example:
        >>> import torch
        >>> from neurms.compiled.reductions import axes_square_sum
        >>> activity = activity_of(torch.nn.Conv2d(3, 8, 3))
        >>> sums, rows = axes_square_sum(torch.ones(2, 8, 5, 5), activity.unit_axes)
        >>> sums.shape, sums[0].item(), rows
        (torch.Size([8]), 50.0, 50)
    """

    unit_axes: tuple[int, ...] = (-1,)
    feature_axes: tuple[int, ...] = (-1,)
    tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("unit_axes", "feature_axes"):
            axes = getattr(self, name)
            if not axes or any(axis >= 0 for axis in axes):
                raise ValueError(
                    f"{name}={axes!r} must count from the end; write -1 for the last axis"
                )

    def feature_square_sum(self, inputs: Tensor, backend: str = "auto") -> tuple[Tensor, int]:
        """Return ``sum_rows h_j^2`` of shape (features,) and the number of rows.

        Args:
            inputs: H; token indices where ``tokens`` is set.
            backend: How the kernel runs.
        """
        if self.tokens is not None:
            counts = torch.bincount(inputs.reshape(-1), minlength=self.tokens)
            return counts.float(), inputs.numel()
        return axes_square_sum(inputs, self.feature_axes, None, backend)

    def scale_units(self, errors: Tensor, factors: Tensor) -> Tensor:
        """Return D with every unit multiplied by its factor, in D's own dtype and shape."""
        axes = [axis + errors.ndim for axis in self.unit_axes]
        sizes = [errors.shape[axis] for axis in axes]
        ordered = factors.reshape(sizes).permute([axes.index(axis) for axis in sorted(axes)])
        shape = [size if axis in axes else 1 for axis, size in enumerate(errors.shape)]
        # In float32 for half-precision signals: a large factor alone may not fit their range.
        return (errors * ordered.reshape(shape)).to(errors.dtype)


def activity_of(module: nn.Module) -> Activity | None:
    """Return the activity of a Linear, a convolution of 1 to 3 dimensions or an Embedding.

    Hugging Face's ``Conv1D`` is a linear layer, too.

    Args:
        module: The module; subclasses count as what they derive from.

    Returns:
        The activity, or None where none is known.
    """
    if isinstance(module, nn.Linear) or is_features_first(module):
        return Activity()
    if isinstance(module, nn.Embedding):
        return Activity(tokens=module.num_embeddings)
    convolutions = (
        (nn.Conv1d, nn.ConvTranspose1d),
        (nn.Conv2d, nn.ConvTranspose2d),
        (nn.Conv3d, nn.ConvTranspose3d),
    )
    for spatial, kinds in enumerate(convolutions, start=1):
        if isinstance(module, kinds):
            return Activity((-1 - spatial,), (-1 - spatial,))
    return None
