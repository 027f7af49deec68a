"""bfloat16, float64, autocast, unusual strides, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neurms import NeuRMS
from tests.core.unitwise.neurms_models import (
    CASES,
    assert_close_models,
    assert_same,
    batches,
    cnn,
    cross_entropy,
    images,
    mlp,
    pair,
    snapshot,
    train,
    vectors,
)

VARIANTS = pytest.mark.parametrize("variant", ["U", "B", "F"])
UPDATES = pytest.mark.parametrize("update", ["step", "backward"])


class TestBFloat16:
    @VARIANTS
    @UPDATES
    @pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
    @pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "weight_decay": 0.1}], ids=len)
    def test_follows_float32(
        self, settings: dict[str, Any], low_precision: str, update: str, variant: str
    ) -> None:
        exact, one = pair(mlp, variant=variant, lr=0.05, **settings)
        half, other = pair(
            lambda: mlp().bfloat16(),
            variant=variant,
            lr=0.05,
            update=update,
            low_precision=low_precision,
            **settings,
        )
        data = batches(4)
        train(exact, one, data)
        train(half, other, [(x.bfloat16(), y) for x, y in data])
        start = mlp()
        for p, q, begin in zip(
            exact.parameters(), half.parameters(), start.parameters(), strict=True
        ):
            assert q.dtype == torch.bfloat16
            way = (p - begin).norm()
            assert (q.float() - p).norm() <= 0.3 * way
        for state in other.state.values():
            assert all(v.dtype == torch.float32 for v in state.values() if isinstance(v, Tensor))

    @UPDATES
    @pytest.mark.parametrize("low_precision", ["nearest", "stochastic", "master"])
    def test_small_steps_are_lost_only_by_rounding_to_nearest(
        self, low_precision: str, update: str
    ) -> None:
        # Steps of a fortieth of the weight's last place, which rounding to nearest throws away.
        torch.manual_seed(0)
        model = nn.Linear(64, 256).bfloat16()
        with torch.no_grad():
            model.weight.fill_(1.0)
            model.bias.fill_(1.0)
        settings = {"low_precision": low_precision, "update": update}
        optimizer = NeuRMS(model, lr=1e-4, variant="F", **settings)
        x = torch.ones(4, 64, dtype=torch.bfloat16)
        for _ in range(10):
            model(x).sum(-1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        expected = -10 * 1e-4
        for parameter in (model.weight, model.bias):
            moved = float((parameter.detach().float() - 1.0).mean())
            if low_precision == "nearest":
                assert moved == 0.0
            elif low_precision == "stochastic":
                assert moved == pytest.approx(expected, rel=0.2 if parameter.ndim > 1 else 0.9)
                # Ten independent draws at 2.6 %, not one draw ten times.
                assert float((parameter != 1).float().mean()) > 0.1
            else:
                assert moved == 0.0
                master = optimizer.state[parameter]["master"]
                assert float((master - 1).mean()) == pytest.approx(expected, rel=1e-3)

    def test_convolutions(self) -> None:
        model = cnn().bfloat16()
        optimizer = NeuRMS(model, variant="F", momentum=0.9)
        x, y = images()
        first, *_, last = train(model, optimizer, [(x.bfloat16(), y)] * 8)
        assert last < first


@VARIANTS
@UPDATES
def test_float64_keeps_float64(variant: str, update: str) -> None:
    model = mlp().double()
    optimizer = NeuRMS(model, variant=variant, update=update, momentum=0.9)
    train(model, optimizer, [(x.double(), y) for x, y in batches(2)])
    for state in optimizer.state.values():
        assert all(v.dtype == torch.float64 for v in state.values() if isinstance(v, Tensor))


@VARIANTS
@UPDATES
def test_autocast(variant: str, update: str) -> None:
    def autocast(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(x)
        return nn.functional.cross_entropy(scores.float(), y)

    exact, one = pair(variant=variant, lr=0.02)
    mixed, other = pair(variant=variant, lr=0.02, update=update)
    data = batches(4)
    train(exact, one, data)
    train(mixed, other, data, autocast)
    for p, q, begin in zip(exact.parameters(), mixed.parameters(), mlp().parameters(), strict=True):
        assert q.dtype == torch.float32
        assert (q - p).norm() <= 0.1 * (p - begin).norm()


class TestStrides:
    """A weight is updated where it lies, whatever its strides."""

    def odd(self, tensor: Tensor) -> Tensor:
        """Return equal values whose kernel positions cannot be viewed as one axis."""
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)

    @VARIANTS
    @pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"agc": 0.05}], ids=str)
    @pytest.mark.parametrize("form", ["transposed taps", "channels_last"])
    def test_convolutions(self, form: str, settings: dict[str, Any], variant: str) -> None:
        plain, odd = cnn(), cnn()
        if form == "channels_last":
            odd = odd.to(memory_format=torch.channels_last)
        else:
            for layer in (odd[0], odd[2], odd[4]):
                layer.weight.data = self.odd(layer.weight.data)
            assert not odd[0].weight.is_contiguous()
        data = [images()] * 3
        train(plain, NeuRMS(plain, lr=0.05, variant=variant, **settings), data)
        train(odd, NeuRMS(odd, lr=0.05, variant=variant, **settings), data)
        assert_close_models(plain, odd, 1e-5)

    @VARIANTS
    @UPDATES
    def test_a_transposed_linear_weight(self, update: str, variant: str) -> None:
        plain, odd = mlp(), mlp()
        odd[2].weight.data = odd[2].weight.data.T.contiguous().T
        train(plain, NeuRMS(plain, lr=0.05, variant=variant, momentum=0.9), batches(3))
        settings: dict[str, Any] = {"variant": variant, "momentum": 0.9, "update": update}
        train(odd, NeuRMS(odd, lr=0.05, **{"variant": "U", **settings}), batches(3))
        assert_close_models(plain, odd, 1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
class TestCompiled:
    """A compiled model trains as the eager one, in whichever order things were made."""

    @pytest.fixture(autouse=True)
    def forgotten(self) -> Any:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @VARIANTS
    @UPDATES
    @pytest.mark.parametrize("how", ["torch.compile", "used", "model.compile", "optimizer first"])
    def test_same_trajectory(self, how: str, update: str, variant: str) -> None:
        plain, one = pair(variant=variant, update=update)
        model = mlp()
        used: nn.Module = model
        settings: dict[str, Any] = {"variant": variant, "update": update, "lr": 0.05}
        if how in ("torch.compile", "used"):
            used = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
            if how == "used":  # compiled without taps
                used(vectors()[0]).sum().backward()
                model.zero_grad()
            optimizer = NeuRMS(used, **{"variant": "U", **settings})
        elif how == "model.compile":
            model.compile(backend="aot_eager")
            used(vectors()[0]).sum().backward()
            model.zero_grad()
            optimizer = NeuRMS(model, **{"variant": "U", **settings})
        else:
            optimizer = NeuRMS(model, **{"variant": "U", **settings})
            used = torch.compile(model, backend="aot_eager")  # type: ignore[assignment]
        train(plain, one, batches(4))
        train(used, optimizer, batches(4))
        assert_close_models(plain, model, 1e-5)
        names = {row.name.removeprefix("_orig_mod.") for row in optimizer.plan()}
        assert names == {name for name, _ in plain.named_parameters()}

    def test_detached_b_rescales_nothing(self) -> None:
        model = mlp()
        model.compile(backend="aot_eager")
        optimizer = NeuRMS(model, variant="B")
        train(model, optimizer, batches(2))
        optimizer.detach()
        twin = mlp()
        twin.load_state_dict(model.state_dict())
        x, y = vectors()
        for m in (model, twin):
            cross_entropy(m, x, y).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("backend", ["eager", "torchscript"])
@VARIANTS
def test_backends_agree(variant: str, backend: str) -> None:
    for case in ("mlp", "cnn"):
        make, batch = CASES[case]
        one, other = make(), make()
        settings: dict[str, Any] = {"variant": variant, "momentum": 0.9, "lr": 0.05}
        train(one, NeuRMS(one, **{"variant": "U", **settings}), [batch()] * 3)
        train(other, NeuRMS(other, backend=backend, **{"variant": "U", **settings}), [batch()] * 3)
        assert_close_models(one, other, 1e-5)


def test_lr_as_a_tensor() -> None:
    (model, optimizer), (twin, other) = pair(), pair(lr=torch.tensor(0.05, dtype=torch.float64))
    train(model, optimizer, batches(2))
    train(twin, other, batches(2))
    assert_same(snapshot(model, optimizer), snapshot(twin, other))
