"""One block per unit, all blocks low-rank in one basis: H_i ~ B R_i B^T."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neurms.compiled.bases import descending_eigenvectors
from neurms.compiled.products import addmm_, product
from neurms.compiled.roots import eigh, orthonormal, positive_qr
from neurms.compiled.unit_blocks import mover, rooted
from neurms.core.ground.errors import check_fraction, check_positive_int, check_real
from neurms.core.structures.base import Context, State, Structure

__all__ = ["SharedBasisBlocks"]

_PART = 256
"""Units at a time: 1 MB of float32 for each set of their 32 x 32 matrices."""


@dataclass(frozen=True)
class SharedBasisBlocks(Structure):
    """F ~ blockdiag_i(B R_i B^T + rho_i I): an n x n block for each unit i in k dimensions.

    With g_i the i-th row of G and M_i = decay B R_i B^T + g_i g_i^T, one step is

        B' = orth((sum_i M_i M_i^T) B)          R_i' = B'^T M_i B'
        R_i <- R_i' - sigma_min(R_i') I         rho_i <- decay rho_i + ||M_i - B' R_i B'^T||_2
        u_i = (B' R_i B'^T + (rho_i + eps) I)^(-1/2) g_i

    So B R_i B^T + rho_i I is at least the (decayed) sum of g_i g_i^T, and with k = n equal to it:
    then this is block-diagonal AdaGrad. Neither M_i nor any other n x n matrix is formed: products
    with M_i come from its factors, with c_i = B^T g_i,

        (sum_i M_i^2) Y = B sum_i (R_i^2 B^T Y + R_i c_i g_i^T Y)
                        + sum_i g_i (c_i^T R_i B^T Y + |g_i|^2 g_i^T Y),

    the root from k x k eigenproblems, and the spectral norm by Lanczos iteration in an orthonormal
    basis of span(B', B, g_i), whose vectors have 2k + 1 entries instead of n.

    Args:
        rank: k; at most n, reduced to n for matrices with fewer features.
        decay: Factor of the old statistics; 1 sums them as AdaGrad does.
        eps: Added to every eigenvalue.
        norm_iterations: Products for the spectral norm, which it approaches from below: 8 come
            within about a percent, 16 within rounding, at half as much time again for a step.
        oversampling: Further directions p that are iterated along with the k and from which the k
            of largest Ritz value are taken; n p numbers of state.
        iterations: Rounds of subspace iteration in each step.

    Reference:
        "Block Low-Rank Preconditioner with Shared Basis for Stochastic Optimization", Yen et al.,
        NeurIPS 2023, Algorithm 1. Settled here:

        - The first basis spans the k rows of largest norm of the first gradient that is not zero
          (the paper starts at random): no draw, and no direction is spent on features that are
          always zero.
        - With ``oversampling`` the basis of k + p directions is turned to their Ritz vectors; the
          first k of them are B', and all of them start the next iteration.
        - The largest Ritz value of what the power iteration's vectors span is taken (Lanczos):
          plain, it is still off by percents after 30 rounds, as the residual's leading eigenvalues
          are close.
        - Eigenvalues below rounding (k ulp of a unit's largest) count as that much, or rounding
          errors of the gradient would be blown up by eps^(-1/2).
    """

    rank: int = 32
    decay: float = 1.0
    eps: float = 1e-6
    norm_iterations: int = 8
    oversampling: int = 0
    iterations: int = 1

    def __post_init__(self) -> None:
        check_positive_int("rank", self.rank)
        check_fraction("decay", self.decay, closed=True)
        check_real("eps", self.eps, strict=True)
        check_positive_int("norm_iterations", self.norm_iterations)
        check_positive_int("oversampling", self.oversampling, low=0)
        check_positive_int("iterations", self.iterations)

    def init(self, matrix: Tensor) -> State:
        """Return ``basis`` (..., n, k + p), ``blocks`` (..., m, k, k), ``rho`` (..., m), zero."""
        *batch, m, n = matrix.shape
        k = min(self.rank, n)
        return {
            "basis": matrix.new_zeros((*batch, n, min(k + self.oversampling, n))),
            "blocks": matrix.new_zeros((*batch, m, k, k)),
            "rho": matrix.new_zeros((*batch, m)),
        }

    def observe(self, gradient: Tensor, state: State, context: Context) -> None:
        """Bring B, R_i and rho_i up to date with one gradient."""
        self._observe(gradient, state)

    def precondition(self, gradient: Tensor, state: State, context: Context) -> Tensor:
        """Return u (..., m, n), row by row (B R_i B^T + (rho_i + eps) I)^(-1/2) g_i."""
        basis = _first(state["basis"], state["blocks"].shape[-1])
        update = torch.empty_like(gradient)
        for part in _parts(gradient.shape[-2]):
            values, vectors = eigh(state["blocks"][..., part, :, :])
            ridge = state["rho"][..., part, None] + self.eps
            coordinates, outside = _split(gradient[..., part, :], basis)
            inside, factor = rooted(values, vectors, coordinates, ridge)
            update[..., part, :] = _assembled(inside, factor, basis, outside)
        return update

    def __call__(self, update: Tensor, state: State, context: Context) -> Tensor:
        """Observe and precondition with one eigendecomposition for both."""
        result = torch.empty_like(update)
        self._observe(update, state, result)
        return result

    def _observe(self, gradient: Tensor, state: State, result: Tensor | None = None) -> None:
        """Bring the state up to date and, with ``result`` (..., m, n), write the update to it."""
        blocks, rho = state["blocks"], state["rho"]
        unseen = (blocks.diagonal(dim1=-2, dim2=-1).sum((-2, -1)) == 0) & (rho.sum(-1) == 0)
        begun = _started(state["basis"], gradient, unseen)
        if self.decay != 1.0:
            blocks.mul_(self.decay)
            rho.mul_(self.decay)
        old = _first(begun, blocks.shape[-1])
        found = self._iterated(begun, _Squares.of(old, blocks, gradient))
        new = _first(found, blocks.shape[-1])
        frame = None if old.shape[-1] == old.shape[-2] else _Frame.of(old, new)
        to_old = new.mT @ old if frame is None else frame.to_old
        move_ = mover(blocks)
        for part in _parts(gradient.shape[-2]):
            coordinates, outside = _split(gradient[..., part, :], new)
            further = beyond = None
            if frame is not None and outside is not None:
                further, beyond = frame.split(outside)
            inside, factor = move_(
                blocks[..., part, :, :],
                rho[..., part],
                to_old,
                coordinates,
                further,
                beyond,
                self.eps,
                self.norm_iterations,
            )
            if result is not None:
                result[..., part, :] = _assembled(inside, factor, new, outside)
        state["basis"].copy_(found)

    def _iterated(self, basis: Tensor, squares: _Squares) -> Tensor:
        """Return k + p orthonormal directions after the rounds of subspace iteration."""
        for _ in range(self.iterations):
            basis = orthonormal(squares @ basis)
        if self.oversampling and basis.shape[-1] > squares.basis.shape[-1]:
            ritz = basis.mT @ (squares @ basis)
            basis = basis @ descending_eigenvectors((ritz + ritz.mT) / 2)
        return basis


def _first(basis: Tensor, k: int) -> Tensor:
    """Return B, the first k of the directions (..., n, k + p)."""
    return basis if basis.shape[-1] == k else basis[..., :k]


def _parts(units: int) -> list[slice]:
    """Return slices of the units whose k x k matrices stay in a core's cache between products."""
    return [slice(start, start + _PART) for start in range(0, units, _PART)]


def _split(gradient: Tensor, basis: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return B^T g_i (..., m, k) and g_i - B B^T g_i (..., m, n), None where that is zero."""
    coordinates = product(gradient, basis)
    if basis.shape[-1] == basis.shape[-2]:
        return coordinates, None
    return coordinates, _less(gradient, coordinates, basis)


def _less(rows: Tensor, coordinates: Tensor, basis: Tensor) -> Tensor:
    """Return rows (..., m, n) less what coordinates (..., m, k) make of a basis (..., n, k)."""
    if rows.ndim == 2:
        return addmm_(rows.clone(), coordinates, basis.mT, 1.0, -1.0)
    return rows - coordinates @ basis.mT


def _assembled(inside: Tensor, factor: Tensor, basis: Tensor, outside: Tensor | None) -> Tensor:
    """Return B inside_i + factor_i outside_i, shape (..., m, n); ``outside`` is overwritten."""
    if outside is None:
        return inside @ basis.mT
    scaled = outside.mul_(factor)
    return (
        addmm_(scaled, inside, basis.mT, 1.0, 1.0)
        if scaled.ndim == 2
        else scaled + inside @ basis.mT
    )


def _started(basis: Tensor, gradient: Tensor, fresh: Tensor) -> Tensor:
    """Return the basis, laid through the gradient's largest rows where it is ``fresh`` (...)."""
    if not bool(fresh.any()):
        return basis
    k = basis.shape[-1]
    lengths = torch.linalg.vector_norm(gradient, dim=-1)
    largest = lengths.topk(min(k, lengths.shape[-1]), dim=-1).indices
    rows = gradient.gather(-2, largest[..., None].expand(*largest.shape, gradient.shape[-1]))
    # Lengths decide only which rows are taken: normalised, a dtype's extremes stay harmless.
    rows = torch.nn.functional.normalize(rows, dim=-1, eps=torch.finfo(rows.dtype).tiny)
    missing = k - largest.shape[-1]
    span = torch.nn.functional.pad(rows.mT, (0, missing)) if missing else rows.mT
    return torch.where(fresh[..., None, None], orthonormal(span), basis)


@dataclass(frozen=True)
class _Squares:
    """sum_i M_i^2 up to a positive factor, with M_i = B R_i B^T + g_i g_i^T, never formed.

    Args:
        basis: B, shape (..., n, k).
        inner: sum_i R_i^2, shape (..., k, k).
        seen: B^T g_i, shape (..., m, k).
        moved: R_i B^T g_i, shape (..., m, k).
        gradient: The g_i, shape (..., m, n).
        lengths: |g_i|^2, shape (..., m, 1).
    """

    basis: Tensor
    inner: Tensor
    seen: Tensor
    moved: Tensor
    gradient: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, basis: Tensor, blocks: Tensor, gradient: Tensor) -> _Squares:
        """Return the operator of B, the R_i (..., m, k, k) and the g_i."""
        # Fourth powers of a gradient leave float32's range long before its square does: scale to 1.
        squares = torch.linalg.vector_norm(gradient, dim=-1).square_()
        peak = torch.maximum(squares.amax(-1), blocks.diagonal(dim1=-2, dim2=-1).amax((-2, -1)))
        scale = torch.where(peak > 0, peak, 1.0)[..., None]
        gradient = gradient / scale[..., None].sqrt()
        coordinates = product(gradient, basis)
        moved = torch.empty_like(coordinates)
        inner = basis.new_zeros((*basis.shape[:-2], basis.shape[-1], basis.shape[-1]))
        for part in _parts(gradient.shape[-2]):
            own = blocks[..., part, :, :] / scale[..., None, None]
            # A row times a matrix: a sixth of the time of a matrix times a column in batches.
            moved[..., part, :] = (coordinates[..., part, None, :] @ own)[..., 0, :]
            stacked = own.flatten(-3, -2)
            inner += product(stacked.mT, stacked)
        return cls(basis, inner, coordinates, moved, gradient, (squares / scale)[..., None])

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """Return the product with Y (..., n, l)."""
        # In the first round Y is B itself, whose coordinates are the identity.
        along = None if vectors is self.basis else self.basis.mT @ vectors
        seen = self.seen if along is None else product(self.gradient, vectors)
        inner = self.inner if along is None else self.inner @ along
        moved = self.moved if along is None else self.moved @ along
        inside = inner + product(self.moved.mT, seen)
        apart = product(self.gradient.mT, moved + self.lengths * seen)
        return product(self.basis, inside) + apart


@dataclass(frozen=True)
class _Frame:
    """An orthonormal basis of span(B', B) that begins with B': residuals are small matrices in it.

    Args:
        further: Its vectors after B', shape (..., n, d - k) with k < d <= 2k.
        to_old: B in it, (..., d, k); its first k rows are B'^T B.
    """

    further: Tensor
    to_old: Tensor

    @classmethod
    def of(cls, old: Tensor, new: Tensor) -> _Frame:
        """Return the frame of B and B', both orthonormal."""
        vectors, triangle = positive_qr(torch.cat([new, old], dim=-1))
        k = old.shape[-1]
        return cls(vectors[..., k:], triangle[..., k:].contiguous())

    def split(self, outside: Tensor) -> tuple[Tensor, Tensor]:
        """Return what lies along the vectors after B' (..., m, d - k), and the rest's length."""
        further = product(outside, self.further)
        rest = _less(outside, further, self.further)
        return further, torch.linalg.vector_norm(rest, dim=-1, keepdim=True)
