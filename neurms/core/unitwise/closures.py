"""Whether an optimizer steps on the gradients that were scaled for it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from neurms.core.ground.warn import warn_user

__all__ = ["ScaledGradients"]


class ScaledGradients:
    """Remembers which gradients were scaled, and looks after the step whether they were taken.

    A closure that an optimizer calls in its step computes gradients anew, which nobody has scaled.
    Gradients are told by their identity: clipping, which writes into them, is no new gradient.
    """

    def __init__(self) -> None:
        self._seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._scaled: dict[Tensor, weakref.ref[Tensor]] = {}
        self._warned = False

    def are(self, parameters: Iterable[Tensor], target: Any) -> None:
        """Note that the gradients of parameters have been scaled for an optimizer's next step."""
        if self._warned or not isinstance(target, Optimizer):
            return
        self._scaled = {p: weakref.ref(p.grad) for p in parameters if p.grad is not None}
        if target not in self._seen:
            self._seen.add(target)
            # Held weakly: an optimizer must not keep a model's preconditioner alive.
            own = weakref.ref(self)
            target.register_step_post_hook(lambda *_: _look(own))

    def look(self) -> None:
        """Warn, once, if an optimizer has stepped on other gradients."""
        anew = [p for p, of in self._scaled.items() if p.grad is not None and p.grad is not of()]
        self._scaled = {}
        if anew and not self._warned:
            self._warned = True
            warn_user(
                f"the optimizer's step computed {len(anew)} gradients anew after precondition_ had "
                "scaled them, and took them unscaled (was it given a closure?); call "
                "precondition_(optimizer) in the closure, after backward()"
            )


def _look(own: weakref.ref[ScaledGradients]) -> None:
    scaled = own()
    if scaled is not None:
        scaled.look()
