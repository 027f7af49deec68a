"""I (x) M with a full matrix M over units, estimated from one sample: whitening."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from neurms.compiled.native import bfloat16_engine
from neurms.compiled.orthogonalization import newton_schulz, whiten
from neurms.core.ground.errors import check_choice, check_positive_int, check_real
from neurms.core.structures.base import Context, State, Structure
from neurms.core.structures.norms import frobenius

__all__ = ["MUON_COEFFICIENTS", "Orthogonalized", "Precision", "Whitened"]

Precision = Literal["float32", "bfloat16"]

MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Muon's quintic: the steepest at 0 whose range stays near 1."""


@dataclass(frozen=True)
class Orthogonalized(Structure):
    """U V^T of the matrix U S V^T, approximately, by Newton-Schulz rounds.

    The best F ~ I (x) M for F = vec(G) vec(G)^T of the current matrix alone has M = G G^T / n, and
    M^(-1/2) G = sqrt(n) U V^T. It keeps no state.

    Args:
        steps: Rounds of the iteration.
        coefficients: a, b, c of X <- a X + (b A + c A^2) X, A = X X^T.
        precision: Of the products: ``"float32"`` is the matrix's own, ``"bfloat16"`` the
            reference's. A CPU that has no products of bfloat16 numbers makes them of float32 ones.

    Reference:
        Jordan et al., "Muon", 2024. See
        :func:`neurms.compiled.orthogonalization.newton_schulz`.
    """

    steps: int = 5
    coefficients: tuple[float, float, float] = MUON_COEFFICIENTS
    precision: Precision = "float32"
    any_scale = True

    def __post_init__(self) -> None:
        check_positive_int("steps", self.steps)
        if len(self.coefficients) != 3:
            raise ValueError(f"coefficients={self.coefficients!r} must hold three numbers a, b, c")
        for position, value in enumerate(self.coefficients):
            check_real(f"coefficients[{position}]", value, low=-1e6)
        check_choice("precision", self.precision, get_args(Precision))

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Do nothing: one sample is all there is."""

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return the orthogonalised matrix (..., m, n)."""
        low = 0
        if self.precision == "bfloat16":
            # Torch's own products of bfloat16 are 30 times slower than float32's where the
            # processor has none (512 x 1376, AVX2).
            low = 1 if gradient.device.type != "cpu" or bfloat16_engine() else 2
        return newton_schulz(gradient, self.steps, *self.coefficients, low)


@dataclass(frozen=True)
class Whitened(Structure):
    """(G G^T)^(-1/2) G by the coupled Newton-Schulz iteration, at the norm of G on request.

    F ~ I (x) M as in :class:`Orthogonalized`, with another iteration. It keeps no state.

    Args:
        steps: Rounds of the iteration.
        beta: Relaxation in (0, 1]; 1/2 converges, see
            :func:`neurms.compiled.orthogonalization.whiten`.
        rescale: Give the result the Frobenius norm of what came in.

    Reference:
        Ma et al., "SWAN", arXiv 2412.13148, Algorithm 2 (GradWhitening).
    """

    steps: int = 10
    beta: float = 0.8
    rescale: bool = True

    def __post_init__(self) -> None:
        check_positive_int("steps", self.steps)
        check_real("beta", self.beta, strict=True)
        if self.beta > 1.0:
            raise ValueError(f"beta={self.beta!r} must be at most 1, else the iteration diverges")

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Do nothing: one sample is all there is."""

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return the whitened matrix (..., m, n)."""
        white = whiten(gradient, self.steps, self.beta)
        if not self.rescale:
            return white
        norm = frobenius(white)
        ratio = frobenius(gradient) / norm.where(norm > 0, 1.0)
        return white * ratio[..., None, None]
