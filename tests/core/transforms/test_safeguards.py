"""Safeguards: bounds that hold, norms that are what they are said to be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neurms.core.optimizers.plan import tensor_bytes
from neurms.core.structures.base import Context
from neurms.core.structures.diagonal import Diagonal
from neurms.core.structures.one_sided_diagonal import RowNormalized
from neurms.core.structures.two_sided import TwoSidedDiagonal
from neurms.core.transforms.safeguards import (
    CoupledDecay,
    Grafted,
    Grafting,
    NormGrowthLimiter,
    RootMeanSquareClip,
    RowClip,
    TrustRatio,
)
from neurms.testing import TransformContract, gradients, run


class TestNormGrowthLimiter(TransformContract):
    transform = NormGrowthLimiter(1.01)

    def test_norms_follow_the_recursion(self) -> None:
        steps = gradients(3, 4, steps=4) * torch.tensor([1.0, 5.0, 0.1, 3.0])[:, None, None]
        updates, _ = run(self.transform, steps)
        last = None
        for gradient, update in zip(steps, updates, strict=True):
            norm = float(gradient.norm())
            last = norm if last is None else min(norm, 1.01 * last)
            torch.testing.assert_close(float(update.norm()), last)
            torch.testing.assert_close(update / update.norm(), gradient / norm)

    def test_starts_again_after_nothing_moved(self) -> None:
        steps = torch.stack([torch.zeros(2, 2), torch.ones(2, 2), 2 * torch.ones(2, 2)])
        updates, _ = run(self.transform, steps)
        assert torch.equal(updates[1], steps[1])
        torch.testing.assert_close(updates[2], 1.01 * steps[1])


class TestTrustRatio(TransformContract):
    transform = TrustRatio(0.5)
    scale_invariant = True

    def test_norm_is_in_proportion_to_the_weights(self) -> None:
        gradient, weight = gradients(4, 3, steps=2)
        update = self.transform(gradient, {}, Context(1, weight))
        torch.testing.assert_close(update.norm(), 0.5 * weight.norm())
        torch.testing.assert_close(update / update.norm(), gradient / gradient.norm())

    @pytest.mark.parametrize("zero", ["weight", "gradient"])
    def test_ratio_is_one_where_a_norm_is_zero(self, zero: str) -> None:
        gradient = torch.ones(2, 3) * (zero != "gradient")
        weight = torch.ones(2, 3) * (zero != "weight")
        assert torch.equal(self.transform(gradient, {}, Context(1, weight)), gradient)


class TestCoupledDecay(TransformContract):
    transform = CoupledDecay(0.0)

    def test_adds_the_weight(self) -> None:
        gradient, weight = gradients(4, 3, steps=2)
        update = CoupledDecay(0.1)(gradient, {}, Context(1, weight))
        torch.testing.assert_close(update, gradient + 0.1 * weight)


class TestRowClip(TransformContract):
    transform = RowClip(10.0)

    def test_rows_are_bounded_by_the_weights(self) -> None:
        gradient, weight = gradients(5, 4, steps=2)
        weight[0] = 0.0
        update = RowClip(0.1, floor=0.01)(gradient, {}, Context(1, weight))
        bound = 0.1 * weight.norm(dim=1).clamp(min=0.01)
        torch.testing.assert_close(update.norm(dim=1), torch.minimum(gradient.norm(dim=1), bound))
        cosine = torch.cosine_similarity(update, gradient, dim=1)
        torch.testing.assert_close(cosine, torch.ones_like(cosine))


def rms_length(steps: Tensor, beta: float, correct: bool) -> Tensor:
    """Return || G_t / (sqrt(V_t) + 1e-8) || from the sums of squares themselves."""
    count = len(steps)
    weights = torch.tensor([(1 - beta) * beta ** (count - 1 - t) for t in range(count)])
    v = (weights.double()[:, None, None] * steps.square()).sum(0)
    if correct:
        v = v / (1 - beta**count)
    return (steps[-1] / (v.sqrt() + 1e-8)).norm()


class TestRootMeanSquareClip(TransformContract):
    transform = RootMeanSquareClip(30.0)

    def test_only_long_updates_are_shortened(self) -> None:
        steps = gradients(3, 4, steps=2)
        steps[0] *= 0.4 / steps[0].square().mean().sqrt()
        steps[1] *= 2.0 / steps[1].square().mean().sqrt()
        updates, state = run(RootMeanSquareClip(0.5), steps)
        assert torch.equal(updates[0], steps[0])
        torch.testing.assert_close(updates[1], steps[1] / 4)
        assert state == {}

    def test_bad_clip(self) -> None:
        with pytest.raises(ValueError, match=r"clip=0\.0"):
            RootMeanSquareClip(0.0)


class TestGrafted(TransformContract):
    transform = Grafted(RowNormalized(), "rmsprop_normalized")
    scale_invariant = True

    @pytest.mark.parametrize("kind", ["sgd", "adam", "rmsprop", "rmsprop_normalized"])
    def test_length_and_direction(self, kind: Grafting) -> None:
        steps = gradients(4, 3, steps=3)
        structure = TwoSidedDiagonal()
        updates, _ = run(Grafted(structure, kind), steps)
        plain, _ = run(structure, steps)
        length = {
            "sgd": steps[-1].norm(),
            "adam": rms_length(steps, 0.999, correct=True),
            "rmsprop": rms_length(steps, 0.99, correct=False),
            "rmsprop_normalized": rms_length(
                torch.stack([g / g.norm() for g in steps]), 0.99, correct=False
            ),
        }[kind]
        torch.testing.assert_close(updates[-1].norm(), length, rtol=1e-6, atol=0)
        torch.testing.assert_close(updates[-1] / updates[-1].norm(), plain[-1] / plain[-1].norm())

    def test_none_is_the_structure_itself(self) -> None:
        steps = gradients(4, 3, steps=3)
        updates, state = run(Grafted(Diagonal()), steps)
        plain, own = run(Diagonal(), steps)
        assert all(torch.equal(a, b) for a, b in zip(updates, plain, strict=True))
        assert state.keys() == own.keys()

    @pytest.mark.parametrize(("kind", "extra"), [(None, 0), ("sgd", 0), ("adam", 1)])
    def test_state_bytes(self, kind: Grafting | None, extra: int) -> None:
        state = Grafted(Diagonal(), kind).init(torch.empty(5, 3, device="meta"))
        assert tensor_bytes(state) == (2 + extra) * 15 * 4

    def test_needs_the_weight_if_its_structure_does(self) -> None:
        assert Grafted(TrustRatio(), "sgd").needs_weight
        assert not Grafted(Diagonal(), "sgd").needs_weight

    def test_unknown_kind(self) -> None:
        with pytest.raises(ValueError, match="grafting='lion' is not known"):
            Grafted(Diagonal(), "lion")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NormGrowthLimiter(0.9), r"gamma=0\.9"),
        (lambda: TrustRatio(0.0), r"trust_coefficient=0\.0"),
        (lambda: CoupledDecay(-1.0), r"weight_decay=-1\.0"),
        (lambda: RowClip(0.0), r"clip=0\.0"),
        (lambda: RowClip(floor=0.0), r"floor=0\.0"),
    ],
)
def test_bad_settings(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
