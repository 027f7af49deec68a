"""Momentum as a transform, so that a recipe says where it stands."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurms.core.ground.errors import check_fraction
from neurms.core.structures.base import Context, State, Transform

__all__ = ["Momentum"]


@dataclass(frozen=True)
class Momentum(Transform):
    """Exponential moving average or heavy-ball velocity of what reaches it.

    With ``average``: M <- mu M + (1 - mu) G, and G' = (1 - mu) G + mu M for ``nesterov``, else M.
    Without: M <- mu M + G, and G' = G + mu M for ``nesterov``, else M (torch.optim.SGD's form).

    Args:
        momentum: mu in [0, 1); 0 passes G through and keeps no state.
        nesterov: Look ahead.
        average: Weigh the incoming update by 1 - mu.
    """

    momentum: float
    nesterov: bool = False
    average: bool = True
    row_local = True
    any_scale = True

    def __post_init__(self) -> None:
        check_fraction("momentum", self.momentum)

    def init(self, matrix: Tensor) -> State:
        """Return the velocity (..., m, n), zero; nothing without momentum."""
        return {"momentum": torch.zeros_like(matrix)} if self.momentum else {}

    def velocity(self, state: State) -> Tensor:
        """Return M (..., m, n).

        Raises:
            ValueError: There is none.
        """
        if "momentum" not in state:
            raise ValueError(
                f"momentum={self.momentum!r} was 0 when the optimizer's state was made, so that no "
                "velocity exists; start with a small positive momentum, or make a new optimizer"
            )
        velocity: Tensor = state["momentum"]
        return velocity

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return the averaged update (..., m, n)."""
        if not self.momentum:
            return update
        velocity = self.velocity(state)
        if self.average:
            velocity.lerp_(update, 1.0 - self.momentum)
            return update.lerp(velocity, self.momentum) if self.nesterov else velocity
        velocity.mul_(self.momentum).add_(update)
        return update.add(velocity, alpha=self.momentum) if self.nesterov else velocity
