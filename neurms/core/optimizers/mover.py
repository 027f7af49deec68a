"""What moves the parameters of one rule, and is asked about them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from neurms.core.optimizers.view import View
from neurms.core.routing import Route

__all__ = ["Mover", "Share"]

State = dict[str, Any]


class Mover(ABC):
    """A part of an optimizer: the step of all parameters that one rule takes.

    A step asks its movers in turn: :meth:`prepare` all, then what they will :meth:`look_at`, so
    that one look judges everything before anything changes; then :meth:`move`. One mover may judge
    its own gradients as it moves, and spares the look at them: it goes first, by :meth:`attempt`.
    """

    divided: ClassVar[bool] = False
    """Whether several ranks may divide the parameters, each owned by one of them."""

    @abstractmethod
    def prepare(self, views: Sequence[View]) -> None:
        """Get ready for a step; nothing that a refused step would have to take back."""

    def judges(self, views: Sequence[View]) -> bool:
        """Return whether :meth:`attempt` may take this step, whose state is all there."""
        return False

    def attempt(self, views: Sequence[View]) -> bool:
        """Take the step if what it reads anyway shows that gradients are good.

        Returns:
            False if it does not, or cannot be told; then nothing has changed, and somebody has to
            look at the gradients before :meth:`move`.
        """
        return False

    def look_at(self) -> tuple[list[Tensor], list[float]]:
        """Return what beside gradients has to be good in this step, and the bound of each."""
        return [], []

    def bad_names(self) -> list[str]:
        """Return the names of what :meth:`look_at` shows and is not good."""
        return []

    @abstractmethod
    def move(self, views: Sequence[View]) -> None:
        """Take the step of parameters whose gradients are good, and whose state is there."""

    @abstractmethod
    def state_for(self, like: Tensor, route: Route, group: Mapping[str, Any]) -> State:
        """Return fresh state for a parameter like ``like``, which may be on the meta device."""

    def expected_state(
        self, like: Tensor, route: Route, group: Mapping[str, Any], saved: Mapping[str, Any]
    ) -> State:
        """Return state with the keys, shapes and dtypes that a checkpoint must hold."""
        return self.state_for(like, route, group)


Share = tuple[Mover, Sequence[View]]
"""A mover, and what it moves in one step."""
