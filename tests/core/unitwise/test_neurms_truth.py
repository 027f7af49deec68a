"""What NeuRMS applies is S G C: against float64 formulas, finite differences and Cauchy-Schwarz."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neurms import NeuRMS
from tests.core.unitwise.neurms_models import CASES, cross_entropy, mlp, vectors
from tests.core.unitwise.neurms_truth import Truth, weight_gradient

LR = 0.05


def assert_steps_agree(
    case: str,
    dtype: torch.dtype,
    rtol: float,
    steps: int = 4,
    update: str = "step",
    **settings: Any,
) -> None:
    """Every step from the optimizer's own weights, the truth's state being its own."""
    make, batch = CASES[case]
    model = make().to(dtype)
    x, y = batch()
    truth = Truth(model, lr=LR, **settings)
    optimizer = NeuRMS(model, lr=LR, update=update, **{"variant": "U", **settings})
    for number in range(steps):
        before = [p.detach().clone() for p in model.parameters()]
        truth.model.load_state_dict(model.state_dict())
        batch_x = (x * (1 + number) ** 0.5).to(dtype).requires_grad_()
        cross_entropy(model, batch_x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        truth.step(cross_entropy, batch_x.detach(), y)
        assert_close(batch_x.grad, truth.input_gradient, rtol, "gradient of the input")
        for (name, p), start, wanted in zip(
            model.named_parameters(), before, truth.model.parameters(), strict=True
        ):
            moved, should = p.detach().double() - start.double(), wanted - start.double()
            assert should.abs().max() > 1e-6, f"{name} does not move: the test could not fail"
            assert_close(moved, should, rtol, f"step {number} of {name}")


def assert_close(actual: Tensor, expected: Tensor, rtol: float, what: str) -> None:
    actual, expected = actual.detach().double(), expected.detach()
    worst = float((actual - expected).abs().max() / expected.abs().max())
    assert worst <= rtol, f"{what}: relative error {worst:.1e}"


@pytest.mark.parametrize("variant", ["U", "B", "F"])
@pytest.mark.parametrize("case", CASES)
def test_update_is_the_formula(case: str, variant: str) -> None:
    assert_steps_agree(case, torch.float64, 1e-11, variant=variant)
    assert_steps_agree(case, torch.float32, 1e-5, variant=variant)


@pytest.mark.parametrize("variant", ["U", "B", "F"])
@pytest.mark.parametrize("update", ["step", "backward"])
@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "momentum_coupling": "gradient+velocity"},
        {"weight_decay": 0.3},
        {"weight_decay": 0.3, "momentum": 0.5},
        {"clip": "relative", "kappa": 1.3},
        {"beta": 0.0, "eps": 1e-3},
        {"v_min": 5.0},
        {"s_min": 1.0, "s_max": 2.0, "c_min": 0.7, "c_max": 0.9},
        {"bias_correction": False},
        {"loss_reduction": "sum"},
    ],
    ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()),
)
def test_settings_in_both_modes(settings: dict[str, Any], update: str, variant: str) -> None:
    assert_steps_agree("mlp", torch.float64, 1e-11, variant=variant, update=update, **settings)
    if update == "step":
        assert_steps_agree("cnn", torch.float64, 1e-11, 3, variant=variant, **settings)


@pytest.mark.parametrize("variant", ["U", "B", "F"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("case", ["mlp", "cnn"])
def test_agc_shortens_rows(case: str, momentum: float, variant: str) -> None:
    settings = {"agc": 0.3, "momentum": momentum, "weight_decay": 0.1, "variant": variant}
    assert_steps_agree(case, torch.float64, 1e-11, **settings)


def test_unscaled_gradients_are_finite_differences() -> None:
    for case, (make, batch) in CASES.items():
        model, (x, y) = make().double(), batch()
        x = x.double()
        optimizer = NeuRMS(model, variant="U")
        cross_entropy(model, x, y).backward()
        for name, parameter in model.named_parameters():
            direction = torch.randn_like(parameter)
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.add_(direction, alpha=sign * 1e-5)
                    values.append(float(cross_entropy(model, x, y)))
                    parameter.sub_(direction, alpha=sign * 1e-5)
            slope = (values[0] - values[1]) / 2e-5
            inner = float((parameter.grad * direction).sum())
            assert abs(slope - inner) <= 1e-6 * max(abs(slope), 1e-2), f"{case} {name}"
        optimizer.detach()


@pytest.mark.parametrize("case", CASES)
def test_the_truth_multiplies_gradients_as_autograd_does(case: str) -> None:
    make, batch = CASES[case]
    model, (x, y) = make().double(), batch()
    kept: list[tuple[nn.Module, Tensor, Tensor]] = []
    for module in model:
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            module.register_forward_hook(lambda m, args, out: kept.append((m, args[0], out)))
    # In-place activations would write over what is kept.
    for module in model:
        if isinstance(module, nn.ReLU):
            module.inplace = False
    loss = cross_entropy(model, x.double(), y)
    errors = torch.autograd.grad(loss, [out for _, _, out in kept], retain_graph=True)
    loss.backward()
    for (module, inputs, _), d in zip(kept, errors, strict=True):
        assert_close(weight_gradient(module, inputs.detach(), d), module.weight.grad, 1e-12, case)


class TestBound:
    """|s_i G_ij c_j| <= 1 for fresh statistics, by Cauchy and Schwarz."""

    def scaled(self, x: Tensor, y: Tensor, loss: Any = cross_entropy) -> list[Tensor]:
        model = mlp().double()
        before = [p.detach().clone() for p in model.parameters()]
        settings = {"s_max": 1e9, "c_max": 1e9, "eps": 0.0, "v_min": 1e-30}
        optimizer = NeuRMS(model, lr=1.0, variant="F", **settings)
        loss(model, x, y).backward()
        optimizer.step()
        return [start - p.detach() for start, p in zip(before, model.parameters(), strict=True)]

    def test_entries_are_at_most_one(self) -> None:
        x, y = vectors(16)
        for update in self.scaled(x.double(), y):
            assert 0.05 < float(update.abs().max()) <= 1 + 1e-12

    def test_one_row_attains_it(self) -> None:
        x, y = vectors(1)
        for update in self.scaled(x.double(), y):
            live = update[update.abs() > 1e-6]
            assert len(live) > 0
            torch.testing.assert_close(live.abs(), torch.ones_like(live))

    def test_whatever_the_scale_of_the_loss(self) -> None:
        x, y = vectors(16)
        plain = self.scaled(x.double(), y)
        large = self.scaled(x.double(), y, lambda *args: 1e3 * cross_entropy(*args))
        for a, b in zip(plain, large, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
