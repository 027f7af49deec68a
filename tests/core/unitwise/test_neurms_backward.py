"""update="backward" refuses what cannot see a gradient that never exists."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurms import NeuRMS
from neurms.compiled._forms import has_cpp_compiler
from neurms.core.ground.errors import UnsupportedTrainingError
from tests.core.unitwise.neurms_models import (
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


class TestGradientsAreNotToBeTouched:
    @pytest.mark.parametrize(
        "touch",
        [
            lambda ps: torch.nn.utils.clip_grad_norm_(ps, 1e-3),
            lambda ps: torch.nn.utils.clip_grad_norm_(ps, 1e9),
            lambda ps: torch.nn.utils.clip_grad_value_(ps, 1e-3),
            lambda ps: [p.grad.mul_(0.5) for p in ps if p.grad is not None],
            lambda ps: [setattr(p, "grad", 0.5 * p.grad) for p in ps if p.grad is not None],
        ],
        ids=["norm", "norm that does not bind", "value", "in place", "replaced"],
    )
    def test_clipping(self, touch: object) -> None:
        model, optimizer = pair(update="backward")
        x, y = vectors()
        train(model, optimizer, [(x, y)])
        cross_entropy(model, x, y).backward()
        touch(list(model.parameters()))  # type: ignore[operator]
        before = snapshot(model, optimizer)
        with pytest.raises(UnsupportedTrainingError, match=r'were changed between.*update="step"'):
            optimizer.step()
        assert_same(before, snapshot(model, optimizer))
        optimizer.zero_grad()
        train(model, optimizer, [(x, y)])

    def test_a_gradscaler(self) -> None:
        model, optimizer = pair(update="backward")
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(cross_entropy(model, *vectors())).backward()
        biases = [layer.bias.detach().clone() for layer in model if isinstance(layer, nn.Linear)]
        with pytest.raises(UnsupportedTrainingError, match="GradScaler"):
            scaler.step(optimizer)
        assert all(
            torch.equal(a, layer.bias)
            for a, layer in zip(biases, [model[0], model[2], model[4]], strict=True)
        )

    def test_reading_and_zeroing_are_no_changes(self) -> None:
        model, optimizer = pair(update="backward")
        for x, y in batches(3):
            cross_entropy(model, x, y).backward()
            torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
            optimizer.step()
            model.zero_grad(set_to_none=False)
            # A pass that reaches no parameter, after which zeroed gradients are still around.
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    def test_a_model_without_such_layers_may_be_clipped(self) -> None:
        model = cnn()[:6]
        optimizer = NeuRMS(model, update="backward", variant="U")
        x, _ = images()
        model(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()

    def test_the_guard_goes_with_the_optimizer(self) -> None:
        model, optimizer = pair(update="backward")
        bias = model[0].bias
        assert bias._post_accumulate_grad_hooks
        del optimizer
        assert not bias._post_accumulate_grad_hooks


class TestOneUse:
    def test_accumulation(self) -> None:
        model, optimizer = pair(update="backward")
        x, y = vectors()
        cross_entropy(model, x, y).backward()
        before = snapshot(model, optimizer)
        with pytest.raises(UnsupportedTrainingError, match=r"4\.weight.*second backward before"):
            cross_entropy(model, x, y).backward()
        assert_same(before, snapshot(model, optimizer))
        optimizer.step()
        optimizer.zero_grad()
        train(model, optimizer, [(x, y)])

    def test_a_layer_used_twice(self) -> None:
        layer = nn.Linear(3, 3)
        model = nn.Sequential(layer, nn.Tanh(), layer)
        optimizer = NeuRMS(model, update="backward", variant="U")
        before = layer.weight.detach().clone()
        with pytest.raises(UnsupportedTrainingError, match=r"0\.weight is used a second time"):
            model(torch.randn(2, 3))
        assert torch.equal(layer.weight, before)
        del optimizer

    def test_create_graph(self) -> None:
        model, optimizer = pair(update="backward")
        x, y = vectors()
        x.requires_grad_()
        before = snapshot(model, optimizer)
        with pytest.raises(UnsupportedTrainingError, match="create_graph=True"):
            torch.autograd.grad(cross_entropy(model, x, y), x, create_graph=True)
        assert_same(before, snapshot(model, optimizer))

    @pytest.mark.parametrize("called", ["before", "after"])
    def test_a_weight_used_outside_its_layer(self, called: str) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                if called == "before":
                    return F.linear(self.inner(x), self.inner.weight)
                return self.inner(F.linear(x, self.inner.weight))

        model = Twice()
        optimizer = NeuRMS(model, update="backward", variant="U")
        loss = model(torch.randn(2, 3)).sum()
        # Either autograd sees that its saved weight has changed, or the step sees a gradient.
        with pytest.raises(RuntimeError, match=r"inplace operation|used outside its layer"):  # noqa: PT012
            loss.backward()
            optimizer.step()

    def test_several_ranks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, optimizer = pair(update="backward")
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        before = snapshot(model, optimizer)
        with pytest.raises(UnsupportedTrainingError, match="trains on 2 ranks"):
            model(vectors()[0])
        assert_same(before, snapshot(model, optimizer))


class TestPlainWhereItShould:
    def test_evaluation_in_between(self) -> None:
        (model, optimizer), (twin, other) = pair(update="backward"), pair(update="backward")
        for batch in batches(3):
            with torch.no_grad():
                model(batch[0])
            model.eval()
            with torch.inference_mode():
                model(batch[0])
            model.train()
            train(model, optimizer, [batch])
            train(twin, other, [batch])
        assert_same(snapshot(model, optimizer), snapshot(twin, other))

    def test_a_subclass_moves_at_the_step(self) -> None:
        class Special(nn.Linear):
            pass

        model = nn.Sequential(Special(5, 4), nn.Linear(4, 3))
        optimizer = NeuRMS(model, update="backward", variant="U")
        twin = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
        twin.load_state_dict(model.state_dict())
        other = NeuRMS(twin, variant="U")
        x, y = vectors()
        cross_entropy(model, x, y).backward()
        assert model[0].weight.grad is not None
        assert model[1].weight.grad is None
        optimizer.step()
        optimizer.zero_grad()
        train(model, optimizer, [(x, y)])
        train(twin, other, [(x, y), (x, y)])
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

    def test_detached_it_goes_on_at_the_step(self) -> None:
        (model, optimizer), (twin, other) = pair(update="backward"), pair()
        data = batches(3)
        train(model, optimizer, data[:1])
        train(twin, other, data[:1])
        optimizer.detach()
        other.detach()
        train(model, optimizer, data[1:])
        train(twin, other, data[1:])
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def test_a_dead_optimizer_moves_nothing_and_gives_way(self) -> None:
        model, optimizer = pair(update="backward")
        x, y = vectors()
        with pytest.raises(ValueError, match="tapped already"):
            NeuRMS(model, update="backward", variant="U")
        del optimizer
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        cross_entropy(model, x, y).backward()
        assert_same(before, {name: p.detach() for name, p in model.named_parameters()})
        assert all(p.grad is not None for p in model.parameters())
        model.zero_grad()
        new = NeuRMS(model, update="backward", variant="U")
        twin, other = pair(mlp, update="backward", lr=1e-2)
        train(model, new, [(x, y)])
        train(twin, other, [(x, y)])
        assert_same(dict(model.state_dict()), dict(twin.state_dict()))
        gc.collect()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not has_cpp_compiler(), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("variant", ["U", "B", "F"])
def test_inductor_trains_as_eager_does(variant: str) -> None:
    settings = {"update": "backward", "variant": variant}
    (model, optimizer), (twin, other) = (
        pair(**settings, backend=backend) for backend in ("inductor", "eager")
    )
    start = mlp()
    data = batches(1) * 24
    losses = train(model, optimizer, data)
    train(twin, other, data)
    assert losses[-1] < 0.9 * losses[0]
    for moved, initial in zip(model.parameters(), start.parameters(), strict=True):
        assert not torch.equal(moved, initial)
    assert_close_models(model, twin, rtol=1e-5)
