"""The gradient's own moments: against numpy in float64, at any scale, on rows of several ranks."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neurms.compiled.square_sums import with_bias
from neurms.core.ground.shards import RowShard
from neurms.core.structures.base import Context, State
from neurms.core.structures.gradient_moments import GradientMoments
from neurms.testing import TransformContract, gradients, run


def lower_median_clip(factors: np.ndarray, kappa: float) -> np.ndarray:
    alive = sorted(factors[factors > 0])
    if not alive:
        return factors
    median = alive[(len(alive) - 1) // 2]
    return np.where(factors > 0, np.clip(factors, median / kappa, median * kappa), 0.0)


def truth(steps: Tensor, beta: float, kappa: float, mu: float) -> list[np.ndarray]:
    """The page's equations, word by word, for one matrix."""
    steps_np = steps.double().numpy()
    q, s = np.zeros(steps_np.shape[1]), np.zeros(steps_np.shape[2])
    average = np.zeros(steps_np.shape[1:])
    updates = []
    for t, g in enumerate(steps_np, 1):
        q = beta * q + (1 - beta) * (g**2).sum(1)
        s = beta * s + (1 - beta) * (g**2).sum(0)
        average = mu * average + (1 - mu) * g
        q_hat, s_hat = q / (1 - beta**t), s / (1 - beta**t)
        total = (q_hat.sum() + s_hat.sum()) / 2
        with np.errstate(divide="ignore"):
            a = np.where(q_hat > 0, 1 / np.sqrt(q_hat), 0)
            b = np.where(s_hat > 0, 1 / np.sqrt(s_hat), 0)
        a, b = lower_median_clip(a, kappa), lower_median_clip(b, kappa)
        updates.append(np.sqrt(total) * a[:, None] * average * b)
    return updates


class TestGradientMoments(TransformContract):
    transform = GradientMoments()
    scale_invariant = True


class TestWithMomentum(TransformContract):
    transform = GradientMoments(momentum=0.6)
    scale_invariant = True


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("kappa", [1.0, 1.5, 10.0])
@pytest.mark.parametrize("shape", [(7, 5), (4, 9), (1, 6), (6, 1)])
def test_equals_the_page_over_25_steps(
    shape: tuple[int, int], kappa: float, momentum: float
) -> None:
    steps = gradients(*shape, steps=25)
    steps[3] *= 100  # a moment that stands out for a while
    steps[5:9, 0] = 0  # a row and a column that rest
    steps[:, :, -1] *= 1e-9
    updates, _ = run(GradientMoments(kappa=kappa, momentum=momentum), steps)
    for update, expected in zip(updates, truth(steps, 0.95, kappa, momentum), strict=True):
        np.testing.assert_allclose(update.numpy(), expected, rtol=1e-12, atol=1e-14)


def test_update_has_an_rms_of_one_where_squares_are_of_rank_one() -> None:
    signs = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).sign().double()
    scale = torch.logspace(0, 0.9, 40).double()[:, None] * torch.logspace(0, -0.9, 30).double()
    (update,), _ = run(GradientMoments(), (signs * scale)[None])
    torch.testing.assert_close(update, signs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e10, 1e15])
def test_scale_of_float32_gradients_changes_nothing(scale: float, momentum: float) -> None:
    steps = gradients(30, 20, steps=5, dtype=torch.float32)
    steps[:, 4] = 0
    plain, _ = run(GradientMoments(momentum=momentum), steps)
    scaled, state = run(GradientMoments(momentum=momentum), steps * scale)
    for one, other in zip(plain, scaled, strict=True):
        assert one.abs().max() > 0.2
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-6)
    assert all(value.isfinite().all() for value in state.values())


def test_rows_that_have_long_been_zero_do_not_overflow() -> None:
    structure = GradientMoments(beta=0.5)
    first = gradients(3, 4, steps=1, dtype=torch.float32)[0]
    state = structure.init(first)
    structure(first, state, Context(1))
    for step in range(2, 400):
        update = structure(torch.zeros_like(first), state, Context(step))
        assert not update.any()
    back = structure(first * 1e-6, state, Context(400))
    assert back.isfinite().all()
    assert back.square().mean().sqrt() > 0.5


def test_a_bad_number_is_not_hidden() -> None:
    gradient = gradients(3, 4, steps=1)[0]
    gradient[1, 2] = float("nan")
    (update,), _ = run(GradientMoments(), gradient[None])
    assert update[1].isnan().all()
    assert update[:, 2].isnan().all()


def test_bias_is_one_more_column() -> None:
    steps = gradients(6, 4, steps=4)
    structure = GradientMoments()
    state, whole = structure.init(steps[0]), structure.init(steps[0])
    state["s"] = state["s"].new_zeros(4)
    for number, both in enumerate(steps, 1):
        weight, bias = both[:, :-1], both[:, -1]
        sums = with_bias(*structure.sums(weight), bias)
        left, right = structure.scales(*sums, state, Context(number))
        expected = structure(both, whole, Context(number))
        torch.testing.assert_close(left[:, None] * weight * right[:-1], expected[:, :-1])
        torch.testing.assert_close(left * bias * right[-1], expected[:, -1])


def test_observe_and_precondition_are_the_two_halves() -> None:
    steps = gradients(6, 4, steps=4)
    structure = GradientMoments(momentum=0.5)
    together, _ = run(structure, steps)
    state = structure.init(steps[0])
    for number, (gradient, expected) in enumerate(zip(steps, together, strict=True), 1):
        structure.observe(gradient, state, Context(number))
        halves = structure.precondition(gradient, state, Context(number))
        torch.testing.assert_close(halves, expected, rtol=1e-12, atol=1e-12)


@dataclass
class Exchange:
    """Sums over the threads of one test, which stand for ranks."""

    ranks: int

    def __post_init__(self) -> None:
        self.barrier, self.parts, self.sizes = threading.Barrier(self.ranks), {}, []

    def sum_(self, rank: int, tensor: Tensor) -> Tensor:
        self.parts[rank] = tensor.clone()
        self.barrier.wait(timeout=30)
        tensor.copy_(sum(self.parts[r] for r in range(self.ranks)))
        if self.barrier.wait(timeout=30) == 0:
            self.sizes.append(tensor.shape)
        return tensor


@dataclass(frozen=True)
class Thread(RowShard):
    """Rows of a thread that stands for a rank."""

    rank: int = 0

    def sum_(self, tensor: Tensor) -> Tensor:
        summed: Tensor = self.groups[0].sum_(self.rank, tensor)
        return summed


def on_ranks(steps: Tensor, cuts: list[int], structure: GradientMoments) -> tuple[Any, Exchange]:
    """Return each step's update, put together from ranks that hold ``cuts`` rows each."""
    exchange, found = Exchange(len(cuts)), {}

    def work(rank: int) -> None:
        shard = Thread(sum(cuts[:rank]), cuts[rank], sum(cuts), (exchange,), rank)
        own = steps[..., shard.slice, :]
        state: State = structure.init(own[0])
        updates = [
            structure(g, state, Context(number, shard=shard)).clone()
            for number, g in enumerate(own, 1)
        ]
        found[rank] = updates, state

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(cuts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    updates = [
        torch.cat(parts, -2) for parts in zip(*(found[r][0] for r in sorted(found)), strict=True)
    ]
    return (updates, found), exchange


@pytest.mark.parametrize("cuts", [[7], [4, 3], [5, 2, 0]])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_ranks_that_hold_rows_make_the_whole_update(cuts: list[int], batch: tuple[int]) -> None:
    steps = gradients(*batch, 7, 5, steps=4)
    structure = GradientMoments(kappa=1.5, momentum=0.5)
    expected, whole = run(structure, steps)
    (updates, found), exchange = on_ranks(steps, cuts, structure)
    for update, wanted in zip(updates, expected, strict=True):
        torch.testing.assert_close(update, wanted, rtol=1e-12, atol=1e-12)
    for _, state in found.values():
        torch.testing.assert_close(state["s"], whole["s"], rtol=1e-12, atol=0)
    assert exchange.sizes == [(*batch, 7 + 5)] * 4, "one exchange of m + n numbers a step"


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"beta": 1.0}, "beta=1.0"), ({"kappa": 0.5}, "kappa=0.5"), ({"momentum": 1.0}, "momentum")],
)
def test_bad_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientMoments(**settings)
