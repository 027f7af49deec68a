"""C (x) S from backpropagation's own signals: the structure of NeuRMS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from neurms.compiled.moments import ema_, moment_factors
from neurms.core.ground.errors import check_choice, check_fraction, check_interval, check_real
from neurms.core.structures.base import Context, State, Structure

__all__ = ["Clip", "UnitFeatureDiagonal"]

Clip = Literal["absolute", "relative"]


@dataclass(frozen=True)
class UnitFeatureDiagonal(Structure):
    """F^(1/2) ~ C^(-1) (x) S^(-1), both diagonal, from second moments of D and H.

    v_i <- beta v_i + (1 - beta) mean_rows(D_i^2) for units and, if ``factored``, u_j <- beta u_j +
    (1 - beta) mean_rows(H_j^2) for features. Then s_i = clip(max(v_i + eps, v_min)^(-1/2), s_min,
    s_max), c_j likewise, and the preconditioned gradient is S G C. As G = D^T H averages over rows,
    |s_i G_ij c_j| <= 1 for fresh, unclipped statistics by Cauchy and Schwarz.

    It differs from the other structures in what it observes: :attr:`Context.moments` rather than
    the gradient, so that a layer's statistics cost O(m + n) beside its O(rows m n) products.

    Args:
        beta: Decay of both averages.
        eps: Added to a second moment before its root.
        v_min: Floor of a second moment.
        s_min: Least unit factor; Theorem 1 wants it positive (but see Reference).
        s_max: Greatest unit factor.
        c_min: Least feature factor.
        c_max: Greatest feature factor.
        bias_correction: Divide the averages by 1 - beta^t; False is the draft's Algorithm 1, whose
            first steps are 1/sqrt(1 - beta) times as long and lean on ``s_max``.
        factored: Whether features are scaled too (variant F).
        clip: ``"absolute"`` bounds as above; ``"relative"`` bounds factors to within ``kappa``
            times the layer's own median factor, which means the same in every layer and for every
            loss.
        kappa: Width of the relative clip.

    Reference:
        "Unitwise RMS preconditioning via buffer scaling", draft: Algorithm 1 (B, U) and its
        factored form (F). Settled here: bias correction is on by default; relative clipping is an
        addition.

        Theorem 1 does not hold for Algorithm 1 as written, whatever s_min and s_max are. Its proof
        takes S out of the mean, E[S G] = S E[G], but S is made from a v that has seen the batch
        that it scales. A unit whose D is 4 in every fourth batch and -1 in the others has a mean
        gradient of 1/4 (H = 1); with beta = 0 its mean update is 4/4 / 4 - 3/4 = -1/2, uphill. Any
        beta below 1 has such a case, with rarer and larger D. Scaled by the v of earlier batches
        alone, the mean update is s E[G], and the theorem's step holds.

    Example:
        >>> import torch
        >>> from neurms.core.structures.base import Moments
        >>> structure = UnitFeatureDiagonal(beta=0.0, s_min=0.1, s_max=10.0)
        >>> def update(d):
        ...     gradient, moments = torch.tensor([[d]]), Moments(units=torch.tensor([d * d]))
        ...     state = structure.init(gradient)
        ...     return structure(gradient, state, Context(1, moments=moments)).item()
        >>> round(4.0 / 4 - 3 * 1.0 / 4, 3), round(update(4.0) / 4 + 3 * update(-1.0) / 4, 3)
        (0.25, -0.5)
    """

    beta: float = 0.99
    eps: float = 1e-8
    v_min: float = 1e-12
    s_min: float = 0.0
    s_max: float = 100.0
    c_min: float = 0.0
    c_max: float = 100.0
    bias_correction: bool = True
    factored: bool = False
    clip: Clip = "absolute"
    kappa: float = 10.0
    any_scale = True  # of a gradient; what it averages is judged by itself

    def __post_init__(self) -> None:
        check_fraction("beta", self.beta)
        check_real("eps", self.eps)
        check_real("v_min", self.v_min)
        if self.eps == 0 and self.v_min == 0:
            raise ValueError("eps=0 and v_min=0 would divide by zero; make one of them positive")
        check_interval("s_min", self.s_min, "s_max", self.s_max)
        check_interval("c_min", self.c_min, "c_max", self.c_max)
        check_choice("clip", self.clip, ("absolute", "relative"))
        check_real("kappa", self.kappa, low=1.0)

    def init(self, matrix: Tensor) -> State:
        """Return ``v`` (..., m) and for ``factored`` ``u`` (..., n), zero."""
        batch, units, features = matrix.shape[:-2], matrix.shape[-2], matrix.shape[-1]
        state = {"v": matrix.new_zeros((*batch, units))}
        if self.factored:
            state["u"] = matrix.new_zeros((*batch, features))
        return state

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Average the context's moments into ``v`` and ``u``; the gradient is not read."""
        moments = context.moments
        if moments is None:
            raise ValueError("UnitFeatureDiagonal observes moments of D and H; none were given")
        if moments.units is not None:
            ema_(state["v"], moments.units, self.beta)
        if self.factored and moments.features is not None:
            ema_(state["u"], moments.features, self.beta)

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return S G C (..., m, n)."""
        s, c = self.factors(state, context.step)
        scaled = gradient * s[..., :, None]
        return scaled if c is None else scaled * c[..., None, :]

    def divisor(self, step: int) -> float:
        """Return what the averages are divided by after ``step`` steps: 1 - beta^t, or 1."""
        return 1.0 - self.beta**step if self.bias_correction else 1.0

    def factors(
        self, state: State, step: int, backend: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return s (..., m) and c (..., n), the latter None unless ``factored``.

        Args:
            state: ``v`` and ``u``.
            step: Number of steps that the averages have seen, for their bias correction.
            backend: How kernels run; None follows ``use_backend``.
        """
        correction = self.divisor(step)
        s = self._scale(state["v"], correction, (self.s_min, self.s_max), backend)
        if not self.factored:
            return s, None
        return s, self._scale(state["u"], correction, (self.c_min, self.c_max), backend)

    def _scale(
        self, moment: Tensor, correction: float, bounds: tuple[float, float], backend: str | None
    ) -> Tensor:
        factors = moment_factors.on(backend) if backend else moment_factors
        kappa = self.kappa if self.clip == "relative" else None
        return factors([moment], [correction], self.eps, self.v_min, *bounds, kappa)[0]
