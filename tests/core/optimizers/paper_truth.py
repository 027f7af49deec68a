"""The papers' algorithms in dense numpy and float64, written from their equations, line by line.

Nothing here is fast, and nothing is shared with the package: every M_i, H_i and Q is formed.
"""

import mpmath
import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def skewed_gradients(units: int, features: int, steps: int = 25, seed: int = 0) -> list[Matrix]:
    """Gradients whose rows and columns differ by two orders of magnitude, heavy-tailed, growing."""
    random = np.random.default_rng(seed)
    rows = 10.0 ** random.uniform(-1, 1, (units, 1))
    columns = 10.0 ** random.uniform(-1, 1, (1, features))
    common = random.standard_normal((units, features))
    return [
        rows * columns * (common + random.standard_t(3, (units, features))) * (1 + 0.1 * step)
        for step in range(steps)
    ]


def _ordered_eigenvectors(symmetric: Matrix) -> Matrix:
    """Eigenvectors in the columns, the largest eigenvalue first."""
    values, vectors = np.linalg.eigh(symmetric)
    return vectors[:, np.argsort(values)[::-1]]


def _due(step: int, interval: int) -> bool:
    """Whether t = 1 or t mod K = 0."""
    return step == 1 or step % interval == 0


class _Limiter:
    """eta = gamma / max(||C|| / phi, gamma) from the second step on; phi = eta ||C||."""

    def __init__(self, gamma: float) -> None:
        self.gamma = gamma
        self.phi: float | None = None

    def __call__(self, update: Matrix) -> Matrix:
        norm = float(np.linalg.norm(update))
        eta = 1.0 if self.phi is None else self.gamma / max(norm / self.phi, self.gamma)
        self.phi = eta * norm
        return eta * update


class DenseEigenAdam:
    """Q <- b3 Q + (1 - b3) G G^T; U = eigh(Q) every K steps; update U ((U^T m) / sqrt(v))."""

    def __init__(self, betas: tuple[float, float, float], interval: int) -> None:
        self.betas, self.interval = betas, interval
        self.step = 0

    def update(self, gradient: Matrix) -> Matrix:
        first, second, third = self.betas
        if self.step == 0:
            self.q = np.zeros((gradient.shape[0],) * 2)
            self.m, self.v = np.zeros_like(gradient), np.zeros_like(gradient)
        self.q = third * self.q + (1 - third) * gradient @ gradient.T
        self.step += 1
        if _due(self.step, self.interval):
            self.basis = _ordered_eigenvectors(self.q)
        self.m = first * self.m + (1 - first) * gradient
        self.v = second * self.v + (1 - second) * (self.basis.T @ gradient) ** 2
        # A null space is 0 / 0: no update.
        null = self.v <= 1e-24 * self.v.sum(axis=0)
        return self.basis @ np.where(null, 0.0, (self.basis.T @ self.m) / np.sqrt(self.v + null))


class DenseAlice:
    """Algorithm 4 with `leading = rank`, so that nothing is drawn; `third=0` is Alice-0."""

    def __init__(
        self,
        betas: tuple[float, float, float],
        rank: int,
        interval: int,
        compensation: float,
        gamma: float,
        *,
        rotate: bool = False,
    ) -> None:
        self.betas, self.rank, self.interval = betas, rank, interval
        self.compensation, self.rotate = compensation, rotate
        self.limit = _Limiter(gamma)
        self.step = 0

    def _start(self, gradient: Matrix) -> None:
        self.basis = _ordered_eigenvectors(gradient @ gradient.T)[:, : self.rank]
        self.tracked = np.zeros((self.rank, self.rank))
        self.m = np.zeros((self.rank, gradient.shape[1]))
        self.v = np.zeros_like(self.m)
        self.p = np.zeros(gradient.shape[1])

    def _renew(self, gradient: Matrix) -> None:
        third = self.betas[2]
        q = third * self.basis @ self.tracked @ self.basis.T + (1 - third) * gradient @ gradient.T
        orthogonal, _ = np.linalg.qr(q @ self.basis)
        basis = orthogonal @ _ordered_eigenvectors(orthogonal.T @ q @ orthogonal)
        if self.rotate:
            turn = basis.T @ self.basis
            self.m, self.v = turn @ self.m, turn**2 @ self.v
            self.tracked = turn @ self.tracked @ turn.T
        self.basis = basis

    def update(self, gradient: Matrix) -> Matrix:
        first, second, third = self.betas
        if self.step == 0:
            self._start(gradient)
        self.step += 1
        if _due(self.step, self.interval):
            self._renew(gradient)
        z = self.basis.T @ gradient
        self.tracked = third * self.tracked + (1 - third) * z @ z.T
        self.m = first * self.m + (1 - first) * z
        self.v = second * self.v + (1 - second) * z**2
        residual = gradient - self.basis @ z
        # The residual's own column sums: colsum G^2 - colsum z^2 without the cancellation.
        self.p = first * self.p + (1 - first) * (residual**2).sum(axis=0)
        full = self.basis @ (self.m / np.sqrt(self.v))
        if self.compensation == 0.0 or gradient.shape[0] == self.rank:
            return full
        scaled = np.sqrt(gradient.shape[0] - self.rank) * residual / np.sqrt(self.p)
        return full + self.compensation * self.limit(scaled)


class DenseSharedBasis:
    """Algorithm 1 with every M_i formed; AdaGrad's sums (decay 1), no grafting, no momentum."""

    def __init__(
        self, first_basis: Matrix, units: int, rank: int, eps: float, iterations: int = 1
    ) -> None:
        self.basis, self.rank, self.eps, self.iterations = first_basis, rank, eps, iterations
        self.cores = [np.zeros((first_basis.shape[1],) * 2) for _ in range(units)]
        self.rho = np.zeros(units)
        features = first_basis.shape[0]
        self.sums = [np.zeros((features, features)) for _ in range(units)]  # what H_i is of AdaGrad

    def update(self, gradient: Matrix) -> Matrix:
        pairs = zip(self.cores, gradient, strict=True)
        dense = [self.basis @ core @ self.basis.T + np.outer(g, g) for core, g in pairs]
        total = np.sum([m @ m for m in dense], axis=0)
        oversampled = self.basis
        for _ in range(self.iterations):
            oversampled, _ = np.linalg.qr(total @ oversampled)
        self.basis = oversampled
        updates = np.empty_like(gradient)
        for unit, (m, g) in enumerate(zip(dense, gradient, strict=True)):
            core = self.basis.T @ m @ self.basis
            core -= np.linalg.eigvalsh(core)[0] * np.eye(len(core))
            self.rho[unit] += np.linalg.norm(m - self.basis @ core @ self.basis.T, 2)
            self.cores[unit] = core
            self.sums[unit] += np.outer(g, g)
            damped = self.bound(unit) + self.eps * np.eye(len(g))
            values, vectors = np.linalg.eigh(damped)
            updates[unit] = vectors @ ((vectors.T @ g) / np.sqrt(values))
        return updates

    def bound(self, unit: int) -> Matrix:
        """B R_i B^T + rho_i I, which bounds the sum of g_i g_i^T from above."""
        return self.basis @ self.cores[unit] @ self.basis.T + self.rho[unit] * np.eye(
            len(self.basis)
        )


def exact_first_update(
    gradient: Matrix, first_basis: Matrix, eps: float, iterations: int
) -> Matrix:
    """Algorithm 1's first step in 40 digits.

    Damped by eps alone, the smallest eigenvalues of float64's H_i are rounding errors of its
    largest: `DenseSharedBasis` is off by up to 1e-6 there.
    """
    with mpmath.workdps(40):
        rows = [mpmath.matrix(row.tolist()) for row in gradient]
        dense = [row * row.T for row in rows]
        total = mpmath.zeros(gradient.shape[1])
        for m in dense:
            total += m * m
        basis = mpmath.matrix(first_basis.tolist())
        for _ in range(iterations):
            basis, _ = mpmath.qr(total * basis, mode="skinny")
        updates = []
        for m, row in zip(dense, rows, strict=True):
            core = basis.T * m * basis
            core -= min(mpmath.eigsy(core, eigvals_only=True)) * mpmath.eye(core.rows)
            inside = basis * core * basis.T
            rho = max(map(abs, mpmath.eigsy(m - inside, eigvals_only=True)))
            values, vectors = mpmath.eigsy(inside + (rho + eps) * mpmath.eye(m.rows))
            along = vectors.T * row
            scaled = [y / mpmath.sqrt(value) for y, value in zip(along, values, strict=True)]
            updates.append([float(x) for x in vectors * mpmath.matrix(scaled)])
    return np.array(updates)
