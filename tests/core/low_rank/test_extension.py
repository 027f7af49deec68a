"""The low-rank extension over several structures, against the full-rank ones and Algorithm 4."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neurms.core.low_rank.extension import LowRank, Transpose, flips
from neurms.core.low_rank.residuals import OptimalCompensation, ScaledResidual
from neurms.core.low_rank.subspaces import RandomSubspace, SingularSubspace, TrackedSubspace
from neurms.core.optimizers.plan import tensor_bytes
from neurms.core.structures.base import Context, Structure
from neurms.core.structures.eigen_basis import EigenBasis
from neurms.core.structures.projected_diagonal import ProjectedDiagonal
from neurms.core.structures.two_sided import TwoSidedDiagonal
from neurms.core.structures.two_sided_eigen import TwoSidedEigen
from neurms.testing import TransformContract, gradients, run

ALICE = TrackedSubspace(3, interval=3, leading=3, beta=0.9)


class TestAlice(TransformContract):
    transform = LowRank(ProjectedDiagonal((0.9, 0.9)), ALICE, OptimalCompensation(), "tall")
    scale_invariant = True
    # LAPACK's choice of an eigenvector's sign does not follow a permutation, and moments that are
    # not rotated keep the signs of the last basis.
    permutes_units = permutes_features = False


class TestAliceInOneBasis(TransformContract):
    transform = LowRank(
        ProjectedDiagonal((0.9, 0.9)),
        TrackedSubspace(3, interval=9, leading=3),
        OptimalCompensation(),
        "tall",
    )
    scale_invariant = True
    tolerance = 1e-6


class TestAliceWithRotatedMoments(TransformContract):
    transform = LowRank(
        ProjectedDiagonal((0.9, 0.9)), ALICE, OptimalCompensation(), "tall", rotate_moments=True
    )
    scale_invariant = True
    tolerance = 1e-6


class TestAliceWithDraws(TransformContract):
    transform = LowRank(
        ProjectedDiagonal((0.9, 0.9)),
        TrackedSubspace(3, interval=2, leading=1),
        OptimalCompensation(),
        "tall",
        rotate_moments=True,
    )
    scale_invariant = True
    # The draws know positions, not rows.
    permutes_units = permutes_features = False


class TestAliceOfTheFullBasis(TransformContract):
    transform = LowRank(
        ProjectedDiagonal((0.9, 0.9)),
        TrackedSubspace(3, interval=2, leading=1, switching="full_basis"),
        OptimalCompensation(),
        "tall",
        rotate_moments=True,
    )
    scale_invariant = True
    permutes_units = permutes_features = False


class TestAliceOfGaussianColumns(TransformContract):
    transform = LowRank(
        ProjectedDiagonal((0.9, 0.9)),
        TrackedSubspace(3, interval=2, leading=1, switching="gaussian_mix"),
        ScaledResidual(compensation=0.4),
        "tall",
    )
    scale_invariant = True
    permutes_units = permutes_features = False


class TestGaLore(TransformContract):
    transform = LowRank(
        ProjectedDiagonal((0.9, 0.999)), SingularSubspace(2), None, "tall or square", scale=0.25
    )
    scale_invariant = True
    tolerance = 1e-6


class TestFira(TransformContract):
    transform = LowRank(
        ProjectedDiagonal((0.9, 0.999), 1e-6),
        SingularSubspace(2),
        ScaledResidual(),
        "tall or square",
    )
    tolerance = 1e-6


class TestOverRacs(TransformContract):
    transform = LowRank(TwoSidedDiagonal(), ALICE, OptimalCompensation(), "tall")
    scale_invariant = True
    tolerance = 1e-6


def alice_transcription(steps: Tensor, rank: int, interval: int, b3: float) -> list[Tensor]:
    """Return the updates of Algorithm 4 with leading = rank, every matrix dense."""
    m, n = steps.shape[-2:]
    b1, b2 = 0.9, 0.8
    basis = torch.zeros(m, rank, dtype=torch.float64)
    tracked = torch.zeros(rank, rank, dtype=torch.float64)
    mean = second = torch.zeros(rank, n, dtype=torch.float64)
    p, phi, updates = torch.zeros(n, dtype=torch.float64), 0.0, []
    for t, g in enumerate(steps, 1):
        if t == 1:
            basis = torch.linalg.eigh(g @ g.mT)[1].flip(1)[:, :rank]
        elif t % interval == 0:
            q = b3 * basis @ tracked @ basis.mT + (1 - b3) * g @ g.mT
            span = torch.linalg.qr(q @ basis)[0]
            basis = span @ torch.linalg.eigh(span.mT @ q @ span)[1].flip(1)
        z = basis.mT @ g
        tracked = b3 * tracked + (1 - b3) * z @ z.mT
        mean, second = b1 * mean + (1 - b1) * z, b2 * second + (1 - b2) * z**2
        p = b1 * p + (1 - b1) * (g.square().sum(0) - z.square().sum(0))
        c = (m - rank) ** 0.5 * (g - basis @ z) / p.sqrt()
        eta = 1.01 / max(float(c.norm()) / phi, 1.01) if t > 1 else 1.0
        phi = eta * float(c.norm())
        updates.append(basis @ (mean / second.sqrt()) + 0.4 * eta * c)
    return updates


@pytest.mark.parametrize(("shape", "b3"), [((5, 7), 0.9), ((4, 4), 0.99), ((5, 7), 0.0)])
def test_equals_a_dense_transcription_of_algorithm_4(shape: tuple[int, int], b3: float) -> None:
    steps = gradients(*shape, steps=9)
    subspace = TrackedSubspace(3, 4, 3, b3, tracking=b3 > 0)
    extension = LowRank(
        ProjectedDiagonal((0.9, 0.8)), subspace, OptimalCompensation(0.4, 0.9, floor=0.0)
    )
    updates, _ = run(extension, steps)
    for ours, theirs in zip(updates, alice_transcription(steps, 3, 4, b3), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("transpose", ["tall", "tall or square"])
def test_tall_matrices_are_their_transposes(transpose: Transpose) -> None:
    steps = gradients(7, 5, steps=6)
    extension = LowRank(ProjectedDiagonal((0.9, 0.9)), ALICE, OptimalCompensation(), transpose)
    tall, state = run(extension, steps)
    flat, _ = run(extension, steps.mT)
    assert state["basis"].shape == (5, 3)
    for a, b in zip(tall, flat, strict=True):
        torch.testing.assert_close(a, b.mT)


def test_transposition_rules() -> None:
    shapes = [(3, 2), (2, 2), (2, 3)]
    matrices = [torch.empty(shape) for shape in shapes]
    assert [flips(m, "never") for m in matrices] == [False, False, False]
    assert [flips(m, "tall") for m in matrices] == [True, False, False]
    assert [flips(m, "tall or square") for m in matrices] == [True, True, False]


@pytest.mark.parametrize("shape", [(4, 7), (4, 4)])
@pytest.mark.parametrize("interval", [1, 100])
def test_full_rank_extension_is_eigen_adam(shape: tuple[int, int], interval: int) -> None:
    steps = gradients(*shape, steps=5)
    # With momentum the two differ once U moves: Eigen-Adam's M does not live in its coordinates.
    b1 = 0.9 if interval > 5 else 0.0
    subspace = TrackedSubspace(4, interval, 4, tracking=False)
    extended, _ = run(LowRank(ProjectedDiagonal((b1, 0.9)), subspace), steps)
    full, _ = run(EigenBasis((b1, 0.9, 0.0), interval, eps=0.0), steps)
    for a, b in zip(extended, full, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


def test_full_rank_extension_of_soap_is_soap() -> None:
    steps = gradients(4, 4, steps=7)
    soap = TwoSidedEigen(interval=2)
    extended, _ = run(LowRank(soap, TrackedSubspace(4, leading=4)), steps)
    full, _ = run(soap, steps)
    for a, b in zip(extended, full, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_precondition_is_a_dense_matrix_of_rank_r() -> None:
    steps = gradients(5, 3, steps=4)
    extension = LowRank(ProjectedDiagonal((0.0, 0.9), 1e-3), ALICE)
    _, state = run(extension, steps)
    basis, second = state["basis"], state["exp_avg_sq"]
    blocks = [basis @ torch.diag(1 / (v.sqrt() + 1e-3)) @ basis.mT for v in second.mT]
    gradient = gradients(5, 3, steps=1, seed=9)[0]
    dense = (torch.block_diag(*blocks) @ gradient.mT.reshape(-1)).reshape(3, 5).mT
    torch.testing.assert_close(extension.precondition(gradient, state, Context(5)), dense)


def test_observe_then_precondition_is_the_step_without_momentum() -> None:
    steps = gradients(5, 7, steps=4)
    extension = LowRank(ProjectedDiagonal((0.0, 0.9)), ALICE, transpose="tall", scale=0.5)
    updates, _ = run(extension, steps)
    state = extension.init(steps[0])
    for number, (gradient, update) in enumerate(zip(steps, updates, strict=True), 1):
        extension.observe(gradient, state, Context(number))
        torch.testing.assert_close(extension.precondition(gradient, state, Context(number)), update)


def test_rotated_moments_do_not_notice_a_full_rank_change_of_basis() -> None:
    steps = gradients(4, 6, steps=5)
    mean = gram = torch.zeros(())
    for gradient in steps:
        mean, gram = 0.9 * mean + 0.1 * gradient, 0.8 * gram + 0.2 * gradient @ gradient.mT
    subspace = TrackedSubspace(4, interval=1, leading=2, beta=0.8)
    for rotate in (True, False):
        extension = LowRank(ProjectedDiagonal((0.9, 0.9)), subspace, rotate_moments=rotate)
        _, state = run(extension, steps)
        basis = state["basis"]
        same = torch.allclose(basis @ state["exp_avg"], mean, rtol=1e-8)
        tracked = torch.allclose(basis @ state["tracked"] @ basis.mT, gram, rtol=1e-8)
        assert (same, tracked) == (rotate, rotate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gradient_rank", [1, 2])
def test_gradients_of_lower_rank_than_the_subspace_stay_bounded(
    dtype: torch.dtype, gradient_rank: int
) -> None:
    left = gradients(12, gradient_rank, steps=1)
    steps = (left @ gradients(gradient_rank, 20, steps=8, seed=1)).to(dtype)
    extension = LowRank(
        ProjectedDiagonal((0.9, 0.9)),
        TrackedSubspace(6, 3, 4),
        OptimalCompensation(),
        "tall",
    )
    updates, _ = run(extension, steps)
    outside = torch.linalg.qr(left[0], mode="complete")[0][:, gradient_rank:].to(dtype)
    for update in updates:
        # |m / sqrt(v)| <= (1 - b1) / sqrt(1 - b2) times a geometric sum that stays below 2.
        assert update.abs().max() < 5
        assert (outside.mT @ update).norm() < 1e-3 * update.norm()


def test_state_bytes_of_alice_and_alice0() -> None:
    m, n, r = 6, 10, 3
    for shape in ((m, n), (n, m)):
        meta = torch.empty(shape, device="meta")
        for tracking in (True, False):
            subspace = TrackedSubspace(r, leading=2, tracking=tracking)
            alice = LowRank(ProjectedDiagonal(), subspace, OptimalCompensation(), "tall")
            floats = 2 * n * r + m * r + r * r * tracking + n + 1
            assert tensor_bytes(alice.init(meta)) == 4 * floats


def test_other_structures_keep_the_energy_of_their_columns() -> None:
    extension = LowRank(TwoSidedDiagonal(), ALICE, OptimalCompensation())
    assert extension.init(torch.empty(5, 7))["inside_energy"].shape == (7,)


class NeedsWeight(TwoSidedDiagonal):
    needs_weight = True


def test_bad_combinations() -> None:
    with pytest.raises(ValueError, match="needs weights"):
        LowRank(NeedsWeight(), ALICE)
    with pytest.raises(ValueError, match=r"needs a structure with rotate_\(\)"):
        LowRank(TwoSidedDiagonal(), ALICE, rotate_moments=True)
    gaussian = TrackedSubspace(3, leading=2, switching="gaussian_mix")
    for subspace in (RandomSubspace(3), gaussian):
        with pytest.raises(ValueError, match="orthonormal"):
            LowRank(ProjectedDiagonal(), subspace, rotate_moments=True)
    with pytest.raises(ValueError, match="transpose='wide'"):
        LowRank(ProjectedDiagonal(), ALICE, transpose="wide")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale=-1"):
        LowRank(ProjectedDiagonal(), ALICE, scale=-1.0)
    nested: Structure = LowRank(ProjectedDiagonal(), ALICE)
    with pytest.raises(ValueError, match="all keep"):
        LowRank(nested, ALICE).init(torch.empty(5, 7))
