"""Notice that gradients were changed between backward and the optimizer's step."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from neurms.core.errors import UnsupportedTrainingError

__all__ = ["GradientGuard"]


class GradientGuard:
    """Tells whether ``.grad`` was written in place after backward put it there.

    Global-norm clipping and a GradScaler act on gradients between backward and the step. With
    ``update="backward"`` the tapped weights have none, so both would act on a part of the model and
    nobody would know. Autograd counts in-place writes of every tensor; the guard keeps the count.

    Args:
        parameters: Parameters whose gradients do exist.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._versions: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._handles: list[RemovableHandle] = []
        for parameter in parameters:
            if parameter.requires_grad:
                handle: Any = parameter.register_post_accumulate_grad_hook(self._record)
                self._handles.append(handle)

    def _record(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._versions[id(parameter)] = (weakref.ref(parameter.grad), parameter.grad._version)

    def check(self) -> None:
        """Raise if a gradient was written since backward, then forget what was recorded.

        Raises:
            UnsupportedTrainingError: One was.
        """
        versions, self._versions = self._versions, {}
        for reference, version in versions.values():
            gradient = reference()
            if gradient is not None and gradient._version != version:
                raise UnsupportedTrainingError(
                    "gradients were changed in place between backward and step (clipping, or a "
                    'GradScaler), which cannot reach weights that update="backward" moved without a '
                    'gradient; use update="step"'
                )

    def detach(self) -> None:
        """Remove the guard's hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
