"""The rate that AdamW's part follows: ``fallback_lr`` at a schedule's peak and 0 at 0."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch

from neurms.integrations.keras import keras_optimizer, keras_racs, keras_rmnp
from neurms.integrations.keras.rates import peak_of

schedules = keras.optimizers.schedules


class Own(schedules.LearningRateSchedule):  # type: ignore[misc]
    """A schedule of the user's own, written in Python."""

    def __init__(self, rate: Callable[[int], float]) -> None:
        self.rate = rate

    def __call__(self, step: Any) -> float:
        return self.rate(int(step))


TRIANGLE = Own(lambda t: 0.7 * min(t / 6151, max(0.0, (9000 - t) / 2849)))
PEAKS = [
    (schedules.CosineDecay(1e-4, 700, warmup_target=0.05, warmup_steps=31), 0.05),
    (schedules.CosineDecay(0.3, 700), 0.3),
    (schedules.PiecewiseConstantDecay([50_000, 50_003, 60_000], [1e-3, 0.5, 1e-3, 1e-4]), 0.5),
    (schedules.PolynomialDecay(1e-3, 400, 0.2), 0.2),
    (schedules.InverseTimeDecay(0.6, 10, 0.5), 0.6),
    (schedules.CosineDecayRestarts(0.4, 60), 0.4),
    (TRIANGLE, 0.7),
    (Own([0.1, 0.2, 0.9, 0.3].__getitem__), 0.9),
    (Own(lambda t: 512**-0.5 * min((t + 1) ** -0.5, (t + 1) * 4000**-1.5)), (512 * 4000) ** -0.5),
    (Own(lambda t: 0.01 + 0.09 * (1 - abs((t % 600) / 300 - 1))), 0.1),
]


@pytest.mark.parametrize(("schedule", "peak"), PEAKS)
def test_the_peak_of_a_schedule(schedule: Any, peak: float) -> None:
    assert peak_of(schedule) == pytest.approx(peak, rel=1e-6)


@pytest.mark.parametrize(
    "schedule",
    [
        schedules.ExponentialDecay(1e-6, 1_000_000, 1.3),
        schedules.CosineDecayRestarts(0.1, 100, m_mul=1.2),
        schedules.CosineDecay(0.0, 10),
    ],
)
def test_a_schedule_without_a_peak_asks_for_one(schedule: Any) -> None:
    with pytest.raises(ValueError, match=r"has no peak .* pass base_learning_rate=RATE"):
        keras_racs(schedule)
    assert keras_racs(schedule, base_learning_rate=0.5).get_config()["base_learning_rate"] == 0.5


@pytest.mark.parametrize("given", [0.0, -1.0, float("inf")])
def test_the_base_must_be_positive(given: float) -> None:
    with pytest.raises(ValueError, match="base_learning_rate"):
        keras_racs(0.1, base_learning_rate=given)


def bias_steps(learning_rate: Any, steps: int, **settings: Any) -> list[float]:
    """Return how far a bias moves in each step under a constant gradient."""
    bias = keras.Variable(np.zeros(3, "float32"), name="bias")
    optimizer = keras_optimizer("muon", learning_rate, fallback_lr=0.25, **settings)
    optimizer.build([bias])
    moved = []
    for _ in range(steps):
        before = bias.numpy().copy()
        optimizer.apply([torch.ones(3)], [bias])
        moved.append(float(np.abs(bias.numpy() - before).max()))
    return moved


def test_adamw_moves_by_its_rate_at_the_peak_and_by_nothing_at_zero() -> None:
    """Under a constant gradient AdamW moves by its learning rate in every step."""
    warm_up = Own(lambda t: 0.03 * min(t / 4, 1.0))
    expected = [0.0, 0.0625, 0.125, 0.1875, 0.25, 0.25]
    assert bias_steps(warm_up, 6) == pytest.approx(expected, abs=1e-6)
    assert bias_steps(warm_up, 6, base_learning_rate=0.06) == pytest.approx(
        [rate / 2 for rate in expected], abs=1e-6
    )


def test_a_rate_of_zero_that_a_loop_raises_later() -> None:
    bias = keras.Variable(np.zeros(3, "float32"), name="bias")
    optimizer = keras_rmnp(0.0, fallback_lr=0.25)
    optimizer.build([bias])
    optimizer.apply([torch.ones(3)], [bias])
    assert not bias.numpy().any()
    optimizer.learning_rate = 0.01
    optimizer.apply([torch.ones(3)], [bias])
    # The rule's own default, 0.02, stands for the peak that nobody named.
    assert bias.numpy() == pytest.approx(-0.125, abs=1e-6)


def test_a_callable_counts_by_its_value_at_first() -> None:
    rates = iter([0.5, 0.5, 0.25, 0.0])
    assert bias_steps(lambda: next(rates), 3) == pytest.approx([0.25, 0.125, 0.0], abs=1e-6)
