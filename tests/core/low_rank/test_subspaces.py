"""Subspaces: tracked and switched, singular, random."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from neurms.compiled.bases import leading_basis
from neurms.core.low_rank.subspaces import (
    RandomSubspace,
    SingularSubspace,
    Subspace,
    Switching,
    TrackedSubspace,
)
from neurms.core.optimizers.plan import tensor_bytes
from neurms.core.structures.base import Context, State
from neurms.testing import gradients


def advance(subspace: Subspace, steps: Tensor, seeds: tuple[int, ...] = (7,)) -> list[State]:
    """Renew and track through gradients (steps, ..., m, n); return the state after each step."""
    state = subspace.init(steps[0])
    states = []
    for number, gradient in enumerate(steps, 1):
        context = Context(number, seeds=seeds)
        if subspace.due(number):
            subspace.renew(gradient, state, context, flipped=False)
        subspace.track(subspace.basis(gradient, state, context).mT @ gradient, state)
        states.append({key: value.clone() for key, value in state.items()})
    return states


def deviation(basis: Tensor) -> float:
    """Return how far U^T U is from the identity."""
    eye = torch.eye(basis.shape[-1], dtype=basis.dtype)
    return float((basis.mT @ basis - eye).abs().max())


def projector(basis: Tensor) -> Tensor:
    return basis @ basis.mT


def test_tracking_equals_the_dense_recursion() -> None:
    steps = gradients(5, 7, steps=7)
    subspace = TrackedSubspace(3, interval=3, leading=3, beta=0.8)
    states = advance(subspace, steps)
    basis = torch.linalg.eigh(steps[0] @ steps[0].mT)[1].flip(1)[:, :3]
    tracked = torch.zeros(3, 3, dtype=torch.float64)
    for number, (gradient, state) in enumerate(zip(steps, states, strict=True), 1):
        if number % 3 == 0:
            q = 0.8 * basis @ tracked @ basis.mT + 0.2 * gradient @ gradient.mT
            span = torch.linalg.qr(q @ basis)[0]
            basis = span @ torch.linalg.eigh(span.mT @ q @ span)[1].flip(1)
        z = basis.mT @ gradient
        tracked = 0.8 * tracked + 0.2 * z @ z.mT
        torch.testing.assert_close(state["basis"], basis)
        torch.testing.assert_close(state["tracked"], tracked)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_switch_keeps_the_leading_and_draws_the_others_from_their_complement(
    shape: tuple[int, int],
) -> None:
    gradient = gradients(*shape, steps=1)
    drawn = advance(TrackedSubspace(5, leading=2), gradient)[0]["basis"]
    other = advance(TrackedSubspace(5, leading=2), gradient, seeds=(8,))[0]["basis"]
    assert deviation(drawn) < 1e-12
    leading = leading_basis(gradient[0], 2)
    torch.testing.assert_close(drawn[:, :2], leading)
    torch.testing.assert_close(other[:, :2], leading)
    assert (drawn[:, 2:] - other[:, 2:]).abs().max() > 0.1


def test_draws_are_uniform_in_the_complement() -> None:
    count = 4000
    gradient = gradients(5, 8, steps=1)[0]
    batch = gradient.expand(count, 5, 8)[None]
    subspace = TrackedSubspace(3, leading=2)
    basis = advance(subspace, batch, seeds=tuple(range(count)))[0]["basis"]
    vectors = basis[:, :, 2]
    outside = torch.eye(5, dtype=torch.float64) - projector(leading_basis(gradient, 2))
    limit = 5 / count**0.5
    assert vectors.mean(0).abs().max() < limit
    covariance = vectors.mT @ vectors / count
    torch.testing.assert_close(covariance, outside / 3, rtol=0, atol=limit)


@pytest.mark.parametrize("shape", [(8, 12), (8, 8), (5, 9)])
def test_full_basis_picks_tracked_and_outer_directions_with_the_same_chance(
    shape: tuple[int, int],
) -> None:
    gradient, m = gradients(*shape, steps=1)[0], shape[0]
    subspace = TrackedSubspace(5, interval=1, leading=2, switching="full_basis")
    own = leading_basis(gradient, 5)
    kept = torch.zeros(3, dtype=torch.float64)
    rounds = 600
    state = subspace.init(gradient)
    for seed in range(rounds):
        subspace.renew(gradient, state, Context(1, seeds=(seed,)), flipped=False)
        basis = state["basis"]
        assert deviation(basis) < 1e-12
        torch.testing.assert_close(basis[:, :2], own[:, :2])
        # A direction of the iteration is there in full or not at all.
        share = (basis[:, 2:].mT @ own[:, 2:]).square().sum(0)
        assert ((share < 1e-12) | (share > 1 - 1e-12)).all()
        kept += share.round()
    chance = 3 / (m - 2)
    spread = 5 * (chance * (1 - chance) / rounds) ** 0.5
    assert ((kept / rounds - chance).abs() <= spread + 1e-12).all()


@pytest.mark.parametrize(("switching", "kept"), [("gaussian_mix", 2), ("gaussian", 0)])
def test_gaussian_columns(switching: Switching, kept: int) -> None:
    gradient = gradients(200, 300, steps=1)[0]
    subspace = TrackedSubspace(60, leading=2, switching=switching)
    assert not subspace.orthonormal
    state = subspace.init(gradient)
    subspace.renew(gradient, state, Context(1), flipped=False)
    basis = state["basis"]
    torch.testing.assert_close(basis[:, :kept], leading_basis(gradient, 2)[:, :kept])
    drawn = basis[:, kept:] * 200**0.5
    count = drawn.numel()
    assert abs(float(drawn.mean())) < 5 / count**0.5
    assert abs(float(drawn.var()) - 1) < 5 * (2 / count) ** 0.5


def test_subspace_iteration_takes_the_true_matrix_of_gaussian_columns() -> None:
    steps = gradients(7, 9, steps=2)
    subspace = TrackedSubspace(3, 2, 3, beta=0.7, switching="gaussian_mix")
    state = subspace.init(steps[0])
    state["basis"].copy_(gradients(7, 3, steps=1, seed=3)[0])
    root = gradients(3, 3, steps=1, seed=4)[0]
    state["tracked"].copy_(root @ root.mT)
    old = state["basis"].clone()
    dense = 0.7 * old @ state["tracked"] @ old.mT + 0.3 * steps[1] @ steps[1].mT
    subspace.renew(steps[1], state, Context(2), flipped=False)
    span = torch.linalg.qr(dense @ old)[0]
    torch.testing.assert_close(projector(state["basis"]), projector(span), rtol=0, atol=1e-9)


def test_draws_depend_on_seed_and_step_alone() -> None:
    steps = gradients(6, 8, steps=4)
    subspace = TrackedSubspace(4, interval=1, leading=1)
    torch.manual_seed(1)
    first = advance(subspace, steps)
    torch.manual_seed(2)
    second = advance(subspace, steps)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["basis"], b["basis"])
    constant = advance(subspace, steps[:1].expand(4, 6, 8))
    assert (constant[1]["basis"][:, 1:] - constant[2]["basis"][:, 1:]).abs().max() > 0.1


def test_draws_stay_away_from_dead_rows_while_others_suffice() -> None:
    steps = gradients(6, 8, steps=1)
    steps[:, 2] = 0
    basis = advance(TrackedSubspace(4, leading=2), steps)[0]["basis"]
    assert basis[2].abs().max() < 1e-12
    steps[:, 1:] = 0
    basis = advance(TrackedSubspace(4, leading=2), steps)[0]["basis"]
    assert deviation(basis) < 1e-12


def test_switching_keeps_the_basis_orthonormal_over_10000_renewals() -> None:
    subspace = TrackedSubspace(6, interval=1, leading=3, beta=0.9)
    pool = gradients(10, 12, steps=50, dtype=torch.float32)
    state = subspace.init(pool[0])
    worst = 0.0
    for number in range(1, 10_001):
        gradient = pool[number % 50]
        subspace.renew(gradient, state, Context(number), flipped=False)
        subspace.track(state["basis"].mT @ gradient, state)
        worst = max(worst, deviation(state["basis"]))
    assert worst < 1e-5


def test_first_basis_identity_spans_the_first_axes() -> None:
    gradient = gradients(5, 7, steps=1)
    subspace = TrackedSubspace(3, leading=3, first_basis="identity")
    basis = advance(subspace, gradient)[0]["basis"]
    axes = torch.diag(torch.tensor([1.0, 1, 1, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(projector(basis), axes)
    ritz = basis.mT @ gradient[0] @ gradient[0].mT @ basis
    torch.testing.assert_close(ritz, torch.diag(ritz.diagonal()), rtol=1e-9, atol=1e-9)


def test_tracking_off_is_beta_zero_without_the_state() -> None:
    steps = gradients(5, 7, steps=5)
    off = advance(TrackedSubspace(3, 2, 3, beta=0.9, tracking=False), steps)
    zero = advance(TrackedSubspace(3, 2, 3, beta=0.0), steps)
    assert "tracked" not in off[0]
    for a, b in zip(off, zero, strict=True):
        torch.testing.assert_close(a["basis"], b["basis"])


def test_zero_and_rank_deficient_gradients_give_orthonormal_bases() -> None:
    for scale in (0.0, 1.0):
        steps = scale * gradients(6, 1, steps=4) @ gradients(1, 8, steps=4, seed=1)
        for state in advance(TrackedSubspace(4, interval=1, leading=2), steps):
            assert deviation(state["basis"]) < 1e-10


def test_singular_subspace_counts_from_the_first_step() -> None:
    steps = gradients(4, 6, steps=5)
    subspace = SingularSubspace(2, interval=2)
    assert [subspace.due(number) for number in range(1, 6)] == [True, False, True, False, True]
    states = advance(subspace, steps)
    expected = torch.linalg.svd(steps[2], full_matrices=False)[0][:, :2]
    assert torch.equal(states[2]["basis"], expected)
    assert torch.equal(states[3]["basis"], expected)


def test_singular_subspace_of_a_flipped_gradient_takes_the_right_vectors() -> None:
    gradient = gradients(6, 4, steps=1)[0]
    subspace = SingularSubspace(2)
    state = subspace.init(gradient.mT)
    subspace.renew(gradient.mT, state, Context(1), flipped=True)
    assert torch.equal(state["basis"], torch.linalg.svd(gradient, full_matrices=False)[2][:2].mT)


def test_random_subspace_is_isotropic_and_renewed_by_the_step() -> None:
    subspace = RandomSubspace(4, interval=3)
    matrix = torch.empty(3000, 6, 8, dtype=torch.float64)
    assert subspace.init(matrix) == {}
    context = Context(1, seeds=tuple(range(3000)))
    bases = [subspace.basis(matrix, {}, replace(context, step=step)) for step in range(1, 5)]
    assert torch.equal(bases[0], bases[1])
    assert torch.equal(bases[0], bases[2])
    assert not torch.equal(bases[0], bases[3])
    mean = projector(bases[0]).mean(0)
    torch.testing.assert_close(mean, torch.eye(6).double(), rtol=0, atol=0.07)
    alone = subspace.basis(matrix[5], {}, Context(1, seeds=(5,)))
    assert torch.equal(alone, bases[0][5])


def test_rank_is_cut_down_to_the_matrix() -> None:
    meta = torch.empty(2, 6, 4, device="meta")
    assert TrackedSubspace(128).size(meta) == 4
    assert TrackedSubspace(128).init(meta)["basis"].shape == (2, 6, 4)
    basis = advance(TrackedSubspace(128, leading=40), gradients(4, 6, steps=1))[0]["basis"]
    assert deviation(basis) < 1e-12


def test_state_bytes() -> None:
    meta = torch.empty(8, 12, device="meta")
    assert tensor_bytes(TrackedSubspace(3, leading=2).init(meta)) == 4 * (8 * 3 + 9)
    assert tensor_bytes(TrackedSubspace(3, leading=2, tracking=False).init(meta)) == 4 * 8 * 3
    assert tensor_bytes(SingularSubspace(3).init(meta)) == 4 * 8 * 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"rank": 8, "leading": 9}, "leading=9 is greater than rank=8"),
        ({"rank": 8, "leading": 0}, "leading=0"),
        ({"rank": 50, "interval": 0}, "interval=0"),
        ({"rank": 50, "beta": 1.0}, "beta=1.0"),
        ({"rank": 50, "first_basis": "random"}, "first_basis='random'"),
    ],
)
def test_bad_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrackedSubspace(**settings)  # type: ignore[arg-type]
