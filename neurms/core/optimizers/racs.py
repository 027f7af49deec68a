"""RACS: row and column scaled SGD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Unpack

from neurms.compiled.backends import current_backend
from neurms.compiled.growth import growth_factors
from neurms.compiled.two_sided_steps import two_sided_steps_
from neurms.compiled.update import apply_updates_
from neurms.core.ground.errors import check_real
from neurms.core.ground.spans import span
from neurms.core.ground.sums import Summing
from neurms.core.optimizers.base import Params, PreconditionedOptimizer
from neurms.core.optimizers.recipe import FusedStep, Recipe
from neurms.core.optimizers.settings import CommonSettings
from neurms.core.structures.two_sided import Fit, Scales, TwoSidedDiagonal
from neurms.core.transforms.safeguards import NormGrowthLimiter

__all__ = ["RACS"]


class RACS(PreconditionedOptimizer):
    """Row and column scaled SGD: the best S (x) Q fit of the Fisher matrix with diagonal factors.

    Each step fits q s^T to G.^2 by power iteration, averages both, and moves W by
    -lr alpha eta G_ij / sqrt(q_i s_j), where eta lets the update's norm grow by at most ``gamma``.
    State: m + n + 1 numbers for an m x n matrix, no momentum.

    Args:
        params: A model (routed by module kind), parameters, or parameter groups.
        lr: Learning rate.
        beta: Decay of the averages of q and s.
        alpha: Constant factor of the update (the paper uses .05, and .02 for its 1.3B model).
        gamma: Bound on the growth of the update's norm from step to step.
        iterations: Rounds of power iteration, for ``fit="power"``.
        bias_correction: Correct the averages for their start at zero; False is the paper.
        fit: How q and s are found: ``"power"`` is the paper's power iteration from q = 1,
            ``"tracked"`` one round that starts from the last step's average, ``"sums"`` the means
            of G.^2 over columns and rows, for G_ij sqrt(T / (q_i s_j)) with T the mean of s. The
            last two read the gradient once to find them.
        **common: :class:`~neurms.core.optimizers.settings.CommonSettings`.

    Raises:
        ValueError: A setting is out of its range.
        TypeError: An unknown setting, or a parameter that is not real floating point.

    Reference:
        "Towards Efficient Optimizer Design for LLM via Structured Fisher Approximation with a
        Low-Rank Extension", Algorithm 1, eq. 16. Settled here: zero rows and columns get zero
        updates; the limiter restarts after an all-zero update. ``fit`` is an addition.

    Example:
        >>> import torch, neurms
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> optimizer = neurms.RACS(model, lr=0.02)
        >>> model(torch.randn(3, 4)).square().mean().backward()
        >>> optimizer.step()
    """

    rule = "racs"

    def __init__(
        self,
        params: Params,
        lr: float = 0.02,
        beta: float = 0.9,
        alpha: float = 0.05,
        gamma: float = 1.01,
        iterations: int = 5,
        bias_correction: bool = False,
        fit: Fit = "power",
        **common: Unpack[CommonSettings],
    ) -> None:
        settings = {
            "lr": lr,
            "beta": beta,
            "alpha": alpha,
            "gamma": gamma,
            "iterations": iterations,
            "bias_correction": bias_correction,
            "fit": fit,
        }
        super().__init__(params, settings, common)

    @classmethod
    def recipe(cls, settings: Mapping[str, Any]) -> Recipe:
        """Return S (x) Q scaling followed by the norm-growth limiter."""
        structure = TwoSidedDiagonal(
            settings["beta"], settings["iterations"], settings["bias_correction"], settings["fit"]
        )
        limiter = NormGrowthLimiter(settings["gamma"])
        alpha = check_real("alpha", settings["alpha"])
        return Recipe(
            (structure, limiter),
            scale=alpha,
            fused=partial(_fused_steps, structure, limiter, alpha),
            judged=partial(_judged_steps, structure, limiter, alpha),
            fused_rows=partial(_fused_rows, structure, limiter, alpha),
        )


def _judged_steps(
    structure: TwoSidedDiagonal,
    limiter: NormGrowthLimiter,
    alpha: float,
    calls: Sequence[FusedStep],
) -> bool:
    """Take RACS's step in one native call, which changes nothing if a gradient is bad."""
    if current_backend() != "auto":
        return False
    return two_sided_steps_.natively(
        [call.weight for call in calls],
        [call.gradient for call in calls],
        [call.state["q"] for call in calls],
        [call.state["s"] for call in calls],
        [call.state["phi"] for call in calls],
        [call.context.step for call in calls],
        [structure.correction(call.context.step) for call in calls],
        [call.lr * alpha for call in calls],
        [call.decay for call in calls],
        structure.beta,
        structure.rounds,
        limiter.gamma,
    )


def _fused_steps(
    structure: TwoSidedDiagonal,
    limiter: NormGrowthLimiter,
    alpha: float,
    calls: Sequence[FusedStep],
) -> None:
    """Take RACS's step in a few passes over G, with nothing of its size allocated."""
    with span("reduce"):
        made = structure.scales(
            [call.gradient for call in calls],
            [call.state for call in calls],
            [call.context.step for call in calls],
        )
    _move(limiter, alpha, calls, made)


def _fused_rows(
    structure: TwoSidedDiagonal, limiter: NormGrowthLimiter, alpha: float, call: FusedStep
) -> Summing[None]:
    """Take the step of a rank's rows of a matrix."""
    made = yield from structure.scaling(call.gradient, call.state, call.context)
    _move(limiter, alpha, [call], [made])


def _move(
    limiter: NormGrowthLimiter, alpha: float, calls: Sequence[FusedStep], made: Sequence[Scales]
) -> None:
    etas = growth_factors(
        [norm for _, _, norm in made],
        [call.state["phi"] for call in calls],
        limiter.gamma,
        [call.context.step for call in calls],
    )
    apply_updates_(
        [call.weight for call in calls],
        [call.gradient for call in calls],
        [None] * len(calls),
        [left for left, _, _ in made],
        [right for _, right, _ in made],
        [eta * (call.lr * alpha) for call, eta in zip(calls, etas, strict=True)],
        [call.decay for call in calls],
    )
