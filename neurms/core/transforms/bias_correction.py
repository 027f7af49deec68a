"""Adam's bias correction as a factor of the finished update."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from neurms.core.ground.errors import check_betas
from neurms.core.structures.base import Context, State, Transform

__all__ = ["BiasCorrection"]


@dataclass(frozen=True)
class BiasCorrection(Transform):
    """Multiply by sqrt(1 - b2^t) / (1 - b1^t).

    Correcting both of Adam's averages before the quotient does the same, but for the eps in
    between. The low-rank methods' code corrects at the end, after their residuals and limiters,
    which therefore see the uncorrected update.

    Args:
        betas: b1 and b2, both in [0, 1).

    Raises:
        ValueError: A beta is out of its range.

    Reference:
        Kingma and Ba, "Adam", 2015, section 2 (the form with the corrected step size).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    row_local = True

    def __post_init__(self) -> None:
        check_betas("betas", self.betas, 2)

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Return the corrected update (..., m, n)."""
        b1, b2 = self.betas
        return update * (math.sqrt(1.0 - b2**context.step) / (1.0 - b1**context.step))
