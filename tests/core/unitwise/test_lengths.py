"""``normalize="rms"``: updates divided by the average of their RMS, against float64 formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neurms
from neurms import NeuRMS
from neurms.core.ground.errors import NonFiniteError
from neurms.core.taps.products import Product
from neurms.core.unitwise.lengths import DECAY, Length, gains_
from neurms.core.unitwise.preconditioner import GradientPreconditioner
from neurms.core.unitwise.products import probed_square_sum
from tests.core.unitwise.neurms_models import (
    assert_close_models,
    assert_same,
    batches,
    cross_entropy,
    mlp,
    pair,
    train,
    vectors,
)
from tests.core.unitwise.test_neurms_truth import assert_steps_agree


def rms(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt())


SETTINGS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "momentum_coupling": "gradient+velocity"},
    {"weight_decay": 0.3, "momentum": 0.5},
]


@pytest.mark.parametrize("variant", ["U", "B", "F"])
@pytest.mark.parametrize(
    ("case", "settings"),
    [
        *[("mlp", own) for own in [*SETTINGS, {"agc": 0.05}]],
        *[("cnn", own) for own in [{}, SETTINGS[2], {"agc": 0.05, "momentum": 0.9}]],
        ("transposed", {}),
    ],
    ids=str,
)
def test_update_is_the_formula(case: str, variant: str, settings: dict[str, Any]) -> None:
    settings = {**settings, "variant": variant, "normalize": "rms"}
    assert_steps_agree(case, torch.float64, 1e-12, steps=25, **settings)
    assert_steps_agree(case, torch.float32, 2e-5, **settings)


@pytest.mark.parametrize("variant", ["U", "B", "F"])
@pytest.mark.parametrize("settings", SETTINGS[1:], ids=str)
def test_a_velocity_is_measured_in_backward(variant: str, settings: dict[str, Any]) -> None:
    settings = {**settings, "variant": variant, "normalize": "rms", "update": "backward"}
    assert_steps_agree("mlp", torch.float64, 1e-11, steps=25, **settings)


def test_a_gain_is_one_over_the_corrected_average() -> None:
    average, seen = torch.zeros((), dtype=torch.float64), []
    for step in range(1, 30):
        seen.append(abs(math.sin(step)) + 0.1)
        total = torch.tensor([12 * seen[-1] ** 2], dtype=torch.float64)
        (gain,) = gains_([Length(average, step, 12)], total)
        weights = [DECAY ** (step - 1 - k) for k in range(step)]
        truth = sum(w * r for w, r in zip(weights, seen, strict=True)) / sum(weights)
        assert gain * truth == pytest.approx(1.0, rel=1e-13)
        assert average == pytest.approx(truth, rel=1e-13)


# ------------------------------------------------------------- what it is for


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_scale_of_the_loss_does_not_matter(momentum: float, update: str) -> None:
    """With factors held at 1, where plain NeuRMS follows the scale."""
    held = {"s_min": 1.0, "s_max": 1.0, "eps": 0.0, "momentum": momentum, "update": update}
    moved = {}
    for normalize in ("rms", None):
        for scale in (1.0, 1e6):
            model, optimizer = pair(lambda: mlp().double(), normalize=normalize, **held)
            data = [(x.double(), y) for x, y in batches(6)]
            train(model, optimizer, data, lambda m, x, y, k=scale: k * cross_entropy(m, x, y))
            moved[normalize, scale] = model
    assert_close_models(moved["rms", 1.0], moved["rms", 1e6], 1e-9)
    with pytest.raises(AssertionError):
        assert_close_models(moved[None, 1.0], moved[None, 1e6], 0.1)


@pytest.mark.parametrize("variant", ["U", "F"])
def test_the_first_step_is_of_the_rate_in_every_tensor(variant: str) -> None:
    """Whatever the scale of the inputs: the bias has a length of its own."""
    model, optimizer = pair(mlp, variant=variant, normalize="rms", lr=0.03)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = vectors()
    train(model, optimizer, [(1e-3 * x, y)])
    for p, start in zip(model.parameters(), before, strict=True):
        assert rms(p - start) == pytest.approx(0.03, rel=1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_step_is_longer_than_ten_rates(momentum: float) -> None:
    """A gradient that comes back after a hundred steps of almost none."""
    held = {"s_min": 1.0, "s_max": 1.0, "momentum": momentum}
    model, optimizer = pair(mlp, normalize="rms", lr=0.01, **held)
    for size in [1.0] * 2 + [1e-12] * 100 + [1e3]:
        before = model[0].weight.detach().clone()
        train(model, optimizer, batches(1), lambda m, x, y, k=size: k * cross_entropy(m, x, y))
    assert 0.05 < rms(model[0].weight - before) <= 0.1 * (1 + 1e-5)


# ------------------------------------------------------------- nothing moves, nothing breaks


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("variant", ["U", "B", "F"])
def test_a_zero_gradient_moves_nothing_and_harms_nothing(
    variant: str, momentum: float, update: str
) -> None:
    model, optimizer = pair(
        mlp, variant=variant, momentum=momentum, update=update, normalize="rms", lr=0.01
    )
    x, y = vectors()
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        (0.0 * cross_entropy(model, x, y)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(map(torch.equal, model.parameters(), before))
    losses = train(model, optimizer, [(x, y)] * 20)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]


def test_a_weight_without_inputs_stands_still_and_its_bias_moves() -> None:
    model, optimizer = pair(mlp, normalize="rms", lr=0.01)
    x, y = vectors()
    weight, bias = (p.detach().clone() for p in model[0].parameters())
    train(model, optimizer, [(0.0 * x, y)])
    assert torch.equal(model[0].weight, weight)
    assert rms(model[0].bias - bias) == pytest.approx(0.01, rel=1e-3)


def test_gradients_whose_squares_would_overflow_are_refused() -> None:
    model, optimizer = pair(mlp, normalize="rms")
    before = [p.detach().clone() for p in model.parameters()]
    x, y = vectors()
    cross_entropy(model, x, y).backward()
    model[0].weight.grad[0, 0] = 1e19
    with pytest.raises(NonFiniteError, match=r"0\.weight"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


# ------------------------------------------------------------- probes


@pytest.mark.parametrize("low", [False, True])
def test_probes_are_unbiased(low: bool) -> None:
    """A z-test over 2,000 draws of fixed D, H, s and c."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if low else torch.float64
    errors, activations = torch.randn(6, 5).to(dtype), torch.randn(6, 9).to(dtype)
    s, c = torch.rand(5) + 0.2, torch.rand(9) + 0.2
    wide = errors.double(), activations.double()
    truth = (s.double()[:, None] * (wide[0].T @ wide[1]) * c.double()).square().sum()
    product = Product(errors, activations)
    draws = torch.stack([probed_square_sum(product, (s, c), seed)[0] for seed in range(2000)])
    standard_error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - truth) < 2.58 * standard_error + (2e-3 * truth if low else 0.0)
    assert standard_error < 0.02 * truth, "the test could not fail"


def test_more_probes_come_closer() -> None:
    errors, activations = torch.randn(6, 5).double(), torch.randn(6, 9).double()
    truth = (errors.T @ activations).square().sum()
    product = Product(errors, activations)
    spread = [
        torch.stack([probed_square_sum(product, (None, None), seed, k)[0] for seed in range(100)])
        .sub(truth)
        .square()
        .mean()
        for k in (1, 64)
    ]
    assert spread[1] < 0.1 * spread[0]


def test_steps_in_backward_are_near_those_of_the_step() -> None:
    moved = []
    for update in ("step", "backward"):
        model, optimizer = pair(mlp, normalize="rms", update=update, lr=0.01)
        before = model[2].weight.detach().clone()
        train(model, optimizer, batches(1))
        moved.append(model[2].weight.detach() - before)
    ratio = rms(moved[1]) / rms(moved[0])
    torch.testing.assert_close(moved[1], ratio * moved[0], rtol=1e-3, atol=1e-6)
    assert 0.4 < ratio < 2.5


# ------------------------------------------------------------- state


@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "variant": "F"}], ids=str)
def test_a_resumed_run_is_the_same_run(settings: dict[str, Any], update: str) -> None:
    settings = {**settings, "update": update, "normalize": "rms"}
    data = batches(8)
    model, optimizer = pair(mlp, **settings)
    train(model, optimizer, data[:4])
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    kept = optimizer.state_dict()
    kept = {**kept, "state": {k: _copied(v) for k, v in kept["state"].items()}}
    train(model, optimizer, data[4:])
    again, resumed = pair(mlp, **settings)
    again.load_state_dict(saved)
    resumed.load_state_dict(kept)
    train(again, resumed, data[4:])
    assert_same(dict(model.named_parameters()), dict(again.named_parameters()))


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}


@pytest.mark.parametrize("variant", ["U", "F"])
def test_micro_batches_are_one_batch(variant: str) -> None:
    models = []
    for parts in (1, 4):
        model, optimizer = pair(lambda: mlp().double(), variant=variant, normalize="rms")
        for x, y in batches(5):
            for own_x, own_y in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
                (cross_entropy(model, own_x, own_y) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert_close_models(*models, 1e-12)


@pytest.mark.parametrize("variant", ["U", "F"])
def test_one_number_more_for_each_tensor(variant: str) -> None:
    plain, own = pair(mlp, variant=variant), pair(mlp, variant=variant, normalize="rms")
    train(*own, batches(1))
    parameters = len(list(own[0].parameters()))
    assert own[1].plan().state_bytes == plain[1].plan().state_bytes + 4 * parameters
    assert own[1].state_bytes() == own[1].plan().state_bytes
    report = neurms.memory_report(own[0], "neurms", variant=variant, normalize="rms")
    assert report.state_bytes == own[1].state_bytes()


def test_it_may_be_switched_on_and_off_in_training() -> None:
    model, optimizer = pair(mlp, lr=0.01)
    data = batches(6)
    train(model, optimizer, data[:4])
    optimizer.param_groups[0]["normalize"] = "rms"
    before = model[0].weight.detach().clone()
    train(model, optimizer, data[4:5])
    length = rms(model[0].weight - before)
    assert length == pytest.approx(0.01, rel=1e-4)
    optimizer.param_groups[0]["normalize"] = None
    train(model, optimizer, data[5:])


@pytest.mark.parametrize("low_precision", ["nearest", "master"])
def test_bfloat16_weights(low_precision: Any) -> None:
    model, optimizer = pair(
        lambda: mlp().bfloat16(), normalize="rms", lr=0.1, low_precision=low_precision
    )
    before = model[2].weight.detach().float().clone()
    train(model, optimizer, [(x.bfloat16(), y) for x, y in batches(1)])
    assert optimizer.state[model[2].weight]["length"].dtype is torch.float32
    length = rms(model[2].weight.float() - before)
    assert length == pytest.approx(0.1, rel=0.02)


def test_native_and_eager_forms_agree() -> None:
    models = []
    for backend in ("eager", "auto"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 300), nn.Tanh(), nn.Linear(300, 200), nn.Linear(200, 3))
        optimizer = NeuRMS(model, lr=0.01, variant="F", normalize="rms", backend=backend)
        train(model, optimizer, batches(5))
        models.append(model)
    assert_close_models(*models, 1e-4)


# ------------------------------------------------------------- beside another optimizer


def test_gradients_reach_an_optimizer_at_length_one() -> None:
    model = mlp()
    beside = GradientPreconditioner(model, normalize="rms", variant="U")
    x, y = vectors()
    cross_entropy(model, x, y).backward()
    assert beside.precondition_(model.parameters())
    for p in model.parameters():
        assert rms(p.grad) == pytest.approx(1.0, rel=1e-5)
    assert beside.plan().state_bytes == beside.state_bytes()


def test_a_preconditioner_resumes() -> None:
    model = mlp()
    beside = GradientPreconditioner(model, normalize="rms", variant="U")
    x, y = vectors()
    cross_entropy(model, x, y).backward()
    beside.precondition_(model.parameters())
    other = GradientPreconditioner(mlp(), normalize="rms", variant="U")
    other.load_state_dict(beside.state_dict())
    assert_same(other.state_dict()["layers"], beside.state_dict()["layers"])


@pytest.mark.parametrize("normalize", ["l2", True, 1.0])
def test_unknown_lengths_are_refused(normalize: Any) -> None:
    with pytest.raises(ValueError, match="normalize="):
        NeuRMS(mlp(), normalize=normalize, variant="U")
