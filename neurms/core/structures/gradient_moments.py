"""S (x) Q, both diagonal, from moments of the gradient's rows and columns: NeuRMS's variant P."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from neurms.compiled.backends import PROMPT, current_backend, scalar
from neurms.compiled.gradient_factors import (
    factors_of_moments,
    gradient_factors,
    moved_moments,
)
from neurms.compiled.gradient_steps import mixture
from neurms.compiled.native import LEAST_ELEMENTS
from neurms.compiled.square_sums import square_sums
from neurms.core.ground.errors import check_choice, check_fraction, check_real
from neurms.core.ground.spans import span
from neurms.core.ground.sums import Summing
from neurms.core.structures.base import Context, State, Structure

__all__ = ["OF_AVERAGES", "GradientMoments", "Measured"]

Measured = Literal["gradient", "average"]
"""What squares are summed up: the gradient's own, or those of what moves the weight."""

OF_AVERAGES: Mapping[str, Any] = {"nesterov": False, "moments": "gradient"}
"""Settings that only an average of gradients gives a meaning, and what leaves them out."""


@dataclass(frozen=True)
class GradientMoments(Structure):
    """F ~ S (x) Q, where Q and S are the moving averages of G's row and column sums of squares.

    q_i <- beta q_i + (1 - beta) sum_j G_ij^2 and s_j <- beta s_j + (1 - beta) sum_i G_ij^2; with
    both over 1 - beta^t, T = (sum_i q_i + sum_j s_j) / 2 and U_ij = X_ij sqrt(T / (q_i s_j)). X is
    G or, with ``momentum``, M <- mu M + (1 - mu) G, or with ``nesterov``, too, mu M + (1 - mu) G of
    the new M. q_i s_j / T is the rank-one fit of E[G_ij^2], so that U has an RMS of about 1, and
    the learning rate AdamW's scale.

    With ``of="average"`` q and s are of X's squares in the place of G's. Momentum that averages
    much noise away then makes no shorter steps, and a ``beta`` of 0 serves: it is X that is
    averaged. Factors are then bounded from above alone: one that is raised makes a step longer.
    With ``damping``, too, a step has a bound: without a second average the RMS of U is at most
    sqrt((1 + delta) / delta).

    With ``damping`` (s_j + delta mean(s)) / (1 + delta) stands for s_j: columns that seldom have a
    gradient are scaled up less, and in the limit only rows are scaled.

    Each side's factors, 1/sqrt(q_i) and 1/sqrt(s_j), are kept within ``kappa`` times the lower
    median of its factors; T is of the moments as they are. The current gradient belongs to the
    moments that scale it. Zero rows and columns have the factor zero and no part in the median.

    Nothing depends on the gradient's scale, in float32 as far as its own numbers reach: sums are in
    float64, and the state keeps the *roots* of q and s.

    Where ranks share a matrix by rows, one step makes one exchange, of m + n numbers in float64:
    G's column sums, and beside them q, for the median and T are those of all rows. ``observe`` and
    ``precondition`` by themselves make one each.

    Args:
        beta: Decay of both averages.
        kappa: Width of the clip, at least 1.
        momentum: mu, the decay of the gradient's average; 0 keeps none.
        nesterov: Whether the gradient enters X once more; wants momentum.
        of: What moments are of, ``"gradient"`` or ``"average"``; the latter wants momentum.
        damping: delta, at least 0; the larger, the less columns are scaled against each other.

    Raises:
        TypeError: A number is none.
        ValueError: A number is out of its range; what wants momentum has none.

    Reference:
        The fit is Adafactor's (Shazeer and Stern, 2018, algorithm 4), here with both sides clipped
        and bias corrected. NeuRMS's variant P, an addition to the draft. RMNP divides by the norms
        of X's rows where ``of="average"`` with a beta of 0 divides by those of its columns, too.

    Example:
        >>> import torch
        >>> structure = GradientMoments()
        >>> gradient = torch.tensor([[3.0, 3.0], [3.0, -3.0]])
        >>> structure(gradient, structure.init(gradient), Context(step=1)).round(decimals=4)
        tensor([[ 1.,  1.],
                [ 1., -1.]])
    """

    beta: float = 0.95
    kappa: float = 10.0
    momentum: float = 0.0
    nesterov: bool = False
    of: Measured = "gradient"
    damping: float = 0.0
    row_local = True
    any_scale = True

    def __post_init__(self) -> None:
        check_fraction("beta", self.beta)
        check_real("kappa", self.kappa, low=1.0)
        check_fraction("momentum", self.momentum)
        check_real("damping", self.damping)
        check_choice("nesterov", self.nesterov, (False, True))
        check_choice("moments", self.of, ("gradient", "average"))
        for name, value in (("nesterov", self.nesterov), ("moments", self.of)):
            if value != (plain := OF_AVERAGES[name]) and not self.momentum:
                raise ValueError(
                    f"{name}={value!r} needs an average of gradients, and momentum=0 keeps none; "
                    f"set a momentum, such as 0.8, or {name}={plain!r}"
                )

    @property
    def of_averages(self) -> bool:
        """Whether moments are those of what moves the weight."""
        return self.of == "average"

    @property
    def bounds(self) -> tuple[float, float, float, bool]:
        """Decay, kappa, damping and whether factors are bounded from above alone, for kernels."""
        return self.beta, self.kappa, self.damping, self.of_averages

    @property
    def mixture(self) -> tuple[float, float]:
        """How much of G, and of M before it, X is made of."""
        return mixture(self.momentum, self.nesterov) if self.momentum else (1.0, 0.0)

    def init(self, matrix: Tensor) -> State:
        """Return the roots ``q`` (..., m) and ``s`` (..., n), and M (..., m, n) if kept; zero."""
        state = {
            "q": matrix.new_zeros(matrix.shape[:-1]),
            "s": matrix.new_zeros((*matrix.shape[:-2], matrix.shape[-1])),
        }
        return {**state, "momentum": torch.zeros_like(matrix)} if self.momentum else state

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Observe the gradient (..., m, n) and return it, or its average, scaled by the result."""
        moving = self.averaged(update, state)
        with span("reduce"):
            sums = self.sums(moving if self.of_averages else update)
            left, right = self.scales(*sums, state, context)
        return moving * left[..., :, None] * right[..., None, :]

    def summing(self, update: Tensor, state: State, context: Context) -> Summing[Tensor]:
        """Do what a call does to a rank's rows, one sum over rows later."""
        moving = self.averaged(update, state)
        sums = self.sums(moving if self.of_averages else update)
        left, right = yield from self.scaling(*sums, state, context)
        return moving * left[..., :, None] * right[..., None, :]

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Average the sums of squares into ``q`` and ``s``, and the gradient into M."""
        moving = self.averaged(gradient, state)
        rows, columns = self.sums(moving if self.of_averages else gradient)
        self._move(rows, state["q"])
        self._move(context.summed(columns), state["s"])

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return U (..., m, n), of the state's M where there is ``momentum``."""
        left, right = self.factors(state, context)
        scaled = self.moving(gradient, state["momentum"]) if self.momentum else gradient
        return scaled * left[..., :, None] * right[..., None, :]

    # ------------------------------------------------------------ without a matrix

    @staticmethod
    def sums(gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return sum_j G_ij^2 (..., m) and sum_i G_ij^2 (..., n), float64, in one read of G."""
        (rows,), (columns,) = square_sums([gradient])
        return rows, columns

    def scales(
        self, rows: Tensor, columns: Tensor, state: State, context: Context
    ) -> tuple[Tensor, Tensor]:
        """Bring the averages up to date and return the factors that they then give.

        The sums may be exact, or estimates from probes: whatever has the gradient's row and column
        sums of squares as its expectation.

        Args:
            rows: Sums by row, shape (..., m), of the rows that are here.
            columns: Sums by column over the rows that are here, shape (..., n).
            state: ``q`` and ``s``; brought up to date.
            context: The step's number, and which rows these are.

        Returns:
            left (..., m) and right (..., n): U_ij = left_i X_ij right_j.
        """
        if context.shard is None:
            averages = [rows], [columns], [state["q"]], [state["s"]], [self._correction(context)]
            # Vectors of a large matrix: not their own size is what a native call must be worth.
            large = rows.dim() == 1 and rows.numel() * columns.numel() >= LEAST_ELEMENTS
            prompt = large and current_backend() == "auto"
            form = gradient_factors.on(PROMPT) if prompt else gradient_factors
            made = form(*averages, *self.bounds)
            q, s, left, right = (item for (item,) in made)
            state["q"].copy_(q)
            state["s"].copy_(s)
            return left, right
        return context.finished(self.scaling(rows, columns, state, context))

    def scaling(
        self, rows: Tensor, columns: Tensor, state: State, context: Context
    ) -> Summing[tuple[Tensor, Tensor]]:
        """Do what :meth:`scales` does to a rank's rows, one sum over rows later."""
        assert context.shard is not None
        # One exchange instead of two: the rows of all ranks travel with the column sums.
        own = _placed(self._move(rows, state["q"]), context)
        both = yield torch.cat([own, columns.double()], -1)
        squares, columns = both.split([context.shard.total, columns.shape[-1]], -1)
        return self._factors(squares, self._move(columns, state["s"]), state, context)

    def factors(self, state: State, context: Context) -> tuple[Tensor, Tensor]:
        """Return left (..., m) and right (..., n) of the averages as they are."""
        q, s = (state[key].double().square() for key in "qs")
        if context.shard is not None:
            q = context.summed(_placed(q, context))
        return self._factors(q, s, state, context)

    def _move(self, squares: Tensor, roots: Tensor) -> Tensor:
        moved = moved_moments(roots, squares, self.beta)
        roots.copy_(moved.sqrt())
        return moved

    def _correction(self, context: Context) -> float:
        return 1.0 - self.beta**context.step

    def _factors(
        self, q: Tensor, s: Tensor, state: State, context: Context
    ) -> tuple[Tensor, Tensor]:
        """Return the factors of the rows that are here, from q of all rows and s."""
        _, kappa, damping, one_sided = self.bounds
        correction = scalar(self._correction(context))
        left, right = factors_of_moments(q, s, correction, kappa, damping, one_sided)
        if context.shard is not None:
            left = left[..., context.shard.slice]
        return left.to(state["q"].dtype), right.to(state["s"].dtype)

    def averaged(self, gradient: Tensor, state: State) -> Tensor:
        """Return X (..., m, n): G itself, or with ``momentum`` its average after this gradient."""
        if not self.momentum:
            return gradient
        return self.moving(gradient, state["momentum"].lerp_(gradient, 1.0 - self.momentum))

    def moving(self, gradient: Tensor, average: Tensor) -> Tensor:
        """Return X of a gradient and of the average that it has entered."""
        return average.lerp(gradient, 1.0 - self.momentum) if self.nesterov else average


def _placed(own: Tensor, context: Context) -> Tensor:
    """Return a vector over all rows that has this rank's numbers in place and is zero elsewhere."""
    assert context.shard is not None
    whole = own.new_zeros((*own.shape[:-1], context.shard.total))
    whole[..., context.shard.slice] = own
    return whole
