"""gemm="bfloat16": what backward multiplies, and nothing else, is rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neurms import NeuRMS
from neurms.core.ground.errors import NonFiniteError
from neurms.core.unitwise.preconditioner import GradientPreconditioner
from tests.core.unitwise.neurms_models import (
    assert_close_models,
    assert_same,
    batches,
    cross_entropy,
    mlp,
    pair,
    snapshot,
    train,
    vectors,
    wide,
)
from tests.core.unitwise.root_truth import inverse_root

ROUNDED: dict[str, Any] = {"update": "backward", "gemm": "bfloat16"}


def signals(layer: nn.Linear, inputs: Tensor, loss: Any) -> tuple[Tensor, Tensor]:
    """Return D and H of a layer's backward pass."""
    seen = []
    z = layer(inputs)
    z.register_hook(seen.append)
    loss(z).backward()
    return seen[0], inputs


@pytest.mark.parametrize("variant", ["U", "F", "B"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("sizes", [(6, 4), (200, 256)])
def test_the_weight_moves_by_the_rounded_product(
    sizes: tuple[int, int], momentum: float, variant: str
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(*sizes)
    optimizer = NeuRMS(layer, lr=0.1, variant=variant, momentum=momentum, beta=0.9, **ROUNDED)
    weight, velocity = layer.weight.detach().double(), 0.0
    v, u = 0.0, 0.0
    for step in range(1, 4):
        # B's D comes with its factor; it is D itself that is rounded in U and F.
        d, h = signals(layer, torch.randn(33, sizes[0]), lambda z: z.square().mean())
        v = 0.9 * v + 0.1 * 33 * d.double().square().sum(0)
        u = 0.9 * u + 0.1 * h.double().square().mean(0)
        s = inverse_root(v / (1 - 0.9**step)).clamp(max=100)
        c = inverse_root(u / (1 - 0.9**step)).clamp(max=100) if variant == "F" else 1.0
        rounded = [x.bfloat16().double() for x in ((d * s).float() if variant == "B" else d, h)]
        left = 1.0 if variant == "B" else s[:, None]
        velocity = momentum * velocity + left * (rounded[0].T @ rounded[1]) * c
        weight -= 0.1 * velocity
        optimizer.step()
        optimizer.zero_grad()
        # A factor of B may round to its other neighbour.
        size, tolerance = float(weight.abs().max()), 1e-4 if variant == "B" else 2e-6
        torch.testing.assert_close(layer.weight.double(), weight, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("make", [mlp, wide])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"variant": "F"},
        {"clip": "relative"},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"momentum": 0.9, "momentum_coupling": "gradient+velocity"},
        {"momentum": 0.9, "momentum_coupling": "gradient+velocity", "variant": "B"},
    ],
    ids=str,
)
def test_training_stays_near_that_in_float32(make: Any, settings: dict[str, Any]) -> None:
    # A velocity scaled twice is a hundred times as long.
    settings = {**settings, "lr": 1e-5 if "momentum_coupling" in settings else 1e-3}
    model, optimizer = pair(make, **ROUNDED, **settings)
    twin, other = pair(make, update="backward", **settings)
    first, second = train(model, optimizer, batches(5)), train(twin, other, batches(5))
    assert first != second
    assert first == pytest.approx(second, rel=0.02)
    assert_close_models(model, twin, 0.05)


def test_backends_agree() -> None:
    model, optimizer = pair(wide, **ROUNDED, variant="F", momentum=0.9)
    twin, other = pair(wide, **ROUNDED, variant="F", momentum=0.9, backend="eager")
    train(model, optimizer, batches(4))
    train(twin, other, batches(4))
    assert_close_models(model, twin, 2e-4)


def test_no_gradient_is_formed_and_statistics_are_not_rounded() -> None:
    model, optimizer = pair(wide, **ROUNDED)
    twin, other = pair(wide, update="backward")
    for one, its in ((model, optimizer), (twin, other)):
        cross_entropy(one, *vectors()).backward()
        assert all(layer.weight.grad is None for layer in one if isinstance(layer, nn.Linear))
        its.step()
    assert_same(
        [its["v"] for p in model.parameters() if "v" in (its := optimizer.state[p])],
        [its["v"] for p in twin.parameters() if "v" in (its := other.state[p])],
    )


def test_resumes_bit_for_bit() -> None:
    model, optimizer = pair(wide, **ROUNDED, variant="F", momentum=0.9)
    train(model, optimizer, batches(2))
    twin, other = pair(wide, **ROUNDED, variant="F", momentum=0.9)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, batches(3))
    train(twin, other, batches(3))
    assert_same(snapshot(model, optimizer), snapshot(twin, other))


def test_what_autocast_has_rounded_is_multiplied_as_it_is() -> None:
    """Then the option changes nothing: the product's factors are bfloat16 already."""

    def autocast(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cross_entropy(model, x, y)

    results = []
    for gemm in ("float32", "bfloat16"):
        model, optimizer = pair(wide, update="backward", gemm=gemm)
        train(model, optimizer, batches(3), autocast)
        results.append(snapshot(model, optimizer))
    assert_same(*results)


def test_an_input_that_rounds_to_infinity_is_refused() -> None:
    layer = nn.Linear(200, 256)
    optimizer = NeuRMS(layer, **{"variant": "U", **ROUNDED})
    before = snapshot(layer, optimizer)
    inputs = torch.zeros(4, 200)
    inputs[1, 7] = torch.finfo(torch.float32).max
    assert inputs.isfinite().all()
    assert not inputs.bfloat16().isfinite().all()
    with pytest.raises(NonFiniteError, match="'weight' is NaN or infinite"):
        layer(inputs).backward(torch.full((4, 256), 1e-3))
    assert_same(before, snapshot(layer, optimizer))


def test_beside_plain_sgd() -> None:
    model, twin = wide(), wide()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    preconditioner = GradientPreconditioner(model, optimizers=[sgd], **{"variant": "U", **ROUNDED})
    other = NeuRMS(twin, lr=0.05, **{"variant": "U", **ROUNDED})
    for x, y in batches(3):
        cross_entropy(model, x, y).backward()
        preconditioner.precondition_(sgd)
        sgd.step()
        sgd.zero_grad()
    train(twin, other, batches(3))
    assert_close_models(model, twin, 1e-4)
    preconditioner.detach()


@pytest.mark.parametrize(
    "make",
    [
        lambda gemm, update: NeuRMS(mlp(), gemm=gemm, update=update, variant="U"),
        lambda gemm, update: GradientPreconditioner(mlp(), gemm=gemm, update=update, variant="U"),
    ],
    ids=["optimizer", "preconditioner"],
)
def test_refused_where_it_means_nothing(make: Any) -> None:
    with pytest.raises(ValueError, match=r"gemm='bfloat16' has no effect .*update=.backward"):
        make("bfloat16", "step")
    with pytest.raises(ValueError, match="gemm='float16'"):
        make("float16", "backward")
