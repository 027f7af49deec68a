"""Notice that gradients were changed between backward and the optimizer's step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from neurms.core.ground.errors import UnsupportedTrainingError

__all__ = ["GradientGuard"]


class GradientGuard:
    """Tells whether ``.grad`` was changed after backward put it there.

    Global-norm clipping acts on gradients between backward and the step. With ``update="backward"``
    the tapped weights have none, so it would act on a part of the model and nobody would know.
    Autograd counts in-place writes of every tensor; the guard keeps the count. (A GradScaler's
    unscaling is not counted; it has to be refused elsewhere.)

    Args:
        parameters: Parameters whose gradients do exist.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._seen: list[tuple[weakref.ref[Tensor], weakref.ref[Tensor], int]] = []
        self._handles: list[RemovableHandle] = []
        for parameter in parameters:
            if parameter.requires_grad:
                hook = _recorder(weakref.ref(self))
                handle: Any = parameter.register_post_accumulate_grad_hook(hook)
                self._handles.append(handle)

    def check(self) -> None:
        """Raise if a gradient was written or replaced since backward; forget what was recorded.

        Raises:
            UnsupportedTrainingError: One was.
        """
        if all(
            [
                (own := parameter()) is not None
                and (now := own.grad) is not None
                and now is gradient()
                and now._version == version
                for parameter, gradient, version in self._seen
            ]
        ):
            self._seen = []
            return
        # The last record of a parameter counts: a later backward adds to its gradient.
        latest = {parameter(): (gradient(), version) for parameter, gradient, version in self._seen}
        self.forget()
        for parameter, (recorded, version) in latest.items():
            gradient = None if parameter is None else parameter.grad
            if gradient is None or (gradient is recorded and gradient._version == version):
                continue
            # zero_grad(set_to_none=False) writes, too; whoever changed a gradient left some of it.
            if bool(gradient.any()):
                raise UnsupportedTrainingError(
                    "gradients were changed between backward and step (clipping?), which "
                    'cannot reach weights that update="backward" moved without a gradient; use '
                    'update="step"'
                )

    def forget(self) -> None:
        """Drop what was recorded, as gradients are dropped."""
        self._seen = []

    def detach(self) -> None:
        """Remove the guard's hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __del__(self) -> None:
        self.detach()


def _recorder(guard: weakref.ref[GradientGuard]) -> Callable[[Tensor], None]:
    """Return a hook that does not keep the guard, and what it guards, alive."""

    def record(parameter: Tensor) -> None:
        alive, gradient = guard(), parameter.grad
        if alive is not None and gradient is not None:
            alive._seen.append((weakref.ref(parameter), weakref.ref(gradient), gradient._version))

    return record
