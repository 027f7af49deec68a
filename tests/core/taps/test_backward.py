import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.taps import BackwardUpdateTap

LR = 0.1
X = torch.linspace(-1, 1, 30).reshape(2, 5, 3)


class Descent:
    """Gradient descent inside backward; the truth is an SGD step on autograd's gradient."""

    def __init__(self, layer: nn.Linear, factors: Tensor | None = None):
        self.weight = layer.weight
        self.factors = factors
        self.calls = 0
        self.unpicklable = lambda: None

    def rescale_errors(self, errors: Tensor) -> Tensor | None:
        return None if self.factors is None else errors * self.factors

    def update(self, errors: Tensor, activations: Tensor) -> None:
        self.calls += 1
        assert errors.dtype == activations.dtype
        assert errors.shape[0] == activations.shape[0]
        step = errors.T @ activations
        self.weight.add_(step.to(self.weight.dtype), alpha=-LR)


def tap(layer: nn.Linear, factors: Tensor | None = None) -> tuple[BackwardUpdateTap, Descent]:
    sink = Descent(layer, factors)
    backward_tap = BackwardUpdateTap(layer, sink, name="middle")
    backward_tap.attach()
    return backward_tap, sink


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))


def cubes(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().pow(3).mean()


def descended(model: nn.Module, loss: Tensor) -> None:
    """Autograd's gradients, then one SGD step on every weight."""
    loss.backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weight") and parameter.requires_grad:
                parameter.sub_(LR * parameter.grad)


def assert_same_training(plain: nn.Module, tapped: nn.Module) -> None:
    pairs = zip(plain.named_parameters(), tapped.parameters(), strict=True)
    for (name, expected), actual in pairs:
        torch.testing.assert_close(actual.data, expected.data)
        if name.endswith("weight"):
            assert actual.grad is None
        else:
            assert torch.equal(actual.grad, expected.grad)


@pytest.mark.parametrize("x", [X[0], X[0, 0], X], ids=["batch", "sample", "tokens"])
@pytest.mark.parametrize("autocast", [False, True])
def test_one_step_is_autograds(x: Tensor, autocast: bool) -> None:
    plain, tapped = network(), network()
    held = [tap(layer) for layer in (tapped[0], tapped[2])]
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = [model(one) for model, one in zip((plain, tapped), inputs, strict=True)]
    assert torch.equal(*outputs)
    assert outputs[0].dtype == outputs[1].dtype
    descended(plain, outputs[0].float().pow(3).mean())
    outputs[1].float().pow(3).mean().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    if autocast:  # autograd rounds the weight's gradient to bfloat16 on its way
        for layer in (plain[0], plain[2]):
            layer.weight.grad = None
        torch.testing.assert_close(tapped[0].weight, plain[0].weight, rtol=0, atol=1e-3)
    else:
        assert_same_training(plain, tapped)
    assert all(backward_tap.fired and sink.calls == 1 for backward_tap, sink in held)


def test_float64_and_no_bias() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 2, bias=False)).double()
    tapped = copy.deepcopy(plain)
    held = tap(tapped[0])
    descended(plain, plain(X.double()).pow(3).mean())
    tapped(X.double()).pow(3).mean().backward()
    torch.testing.assert_close(tapped[0].weight.data, plain[0].weight.data, rtol=1e-14, atol=0)
    del held


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    plain, tapped = network(), network()
    held = [tap(layer) for layer in (tapped[0], tapped[2])]
    inputs = [X.clone().requires_grad_() for _ in range(2)]
    for _ in range(2):
        plain.zero_grad()
        tapped.zero_grad()
        descended(plain, cubes(plain, inputs[0]))
        checkpoint(cubes, tapped, inputs[1], use_reentrant=reentrant).backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        assert_same_training(plain, tapped)
        for backward_tap, _ in held:
            backward_tap.rearm()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the inner one
@pytest.mark.parametrize("reentrant", [True, False])
def test_nested_checkpoints(reentrant: bool) -> None:
    plain, tapped = network(), network()
    held = [tap(layer) for layer in (tapped[0], tapped[2])]
    x = X.clone().requires_grad_()

    def outer(x: Tensor) -> Tensor:
        hidden = checkpoint(tapped[:2], x, use_reentrant=reentrant)
        return checkpoint(tapped[2], hidden, use_reentrant=reentrant).pow(3).mean()

    descended(plain, cubes(plain, X))
    checkpoint(outer, x, use_reentrant=reentrant).backward()
    assert_same_training(plain, tapped)
    del held


def test_rescaled_errors_go_upstream_into_the_bias_and_the_update() -> None:
    model = network()
    factors = torch.tensor([2.0, 5.0])
    truth = copy.deepcopy(model).double()
    hidden = truth[:2](X.double().flatten(0, 1))
    output = truth[2](hidden)
    errors = torch.autograd.grad(output.pow(3).mean(), output)[0] * factors
    held = tap(model[2], factors)
    cubes(model, X).backward()
    torch.testing.assert_close(model[2].bias.grad.double(), errors.sum(0), rtol=1e-5, atol=1e-8)
    stepped = truth[2].weight - LR * errors.T @ hidden
    torch.testing.assert_close(model[2].weight.double(), stepped, rtol=1e-5, atol=1e-8)
    upstream = (errors @ truth[2].weight) * (hidden > 0)
    expected = upstream.T @ X.double().flatten(0, 1)
    torch.testing.assert_close(model[0].weight.grad.double(), expected, rtol=1e-5, atol=1e-8)
    del held


class TestRefused:
    def unchanged(self, layer: nn.Linear, before: Tensor) -> None:
        assert torch.equal(layer.weight, before)

    def test_second_use_in_one_graph(self) -> None:
        layer = nn.Linear(3, 3)
        held = tap(layer)
        before = layer.weight.detach().clone()
        with pytest.raises(UnsupportedTrainingError, match=r"layer middle is used a second time"):
            layer(layer(X))
        self.unchanged(layer, before)
        layer(X).sum().backward()  # the refused graph is gone
        assert held[1].calls == 1

    def test_second_use_in_one_reentrant_checkpoint(self) -> None:
        layer = nn.Linear(3, 3)
        held = tap(layer)
        before = layer.weight.detach().clone()
        x = X.clone().requires_grad_()
        loss = checkpoint(lambda x: layer(layer(x)), x, use_reentrant=True).sum()
        with pytest.raises(UnsupportedTrainingError, match="used a second time"):
            loss.backward()
        self.unchanged(layer, before)
        del held

    def test_use_in_two_reentrant_checkpoints(self) -> None:
        layer = nn.Linear(3, 3)
        held = tap(layer)
        x = checkpoint(layer, X.clone().requires_grad_(), use_reentrant=True)
        loss = checkpoint(layer, x, use_reentrant=True).sum()
        with pytest.raises(UnsupportedTrainingError, match="recomputed by a checkpoint"):
            loss.backward()
        del held

    def test_use_in_two_non_reentrant_checkpoints(self) -> None:
        layer = nn.Linear(3, 3)
        held = tap(layer)
        x = checkpoint(layer, X, use_reentrant=False)
        with pytest.raises(UnsupportedTrainingError, match="used a second time"):
            checkpoint(layer, x, use_reentrant=False)
        del held

    def test_a_recomputation_does_not_hide_the_use_that_waits(self) -> None:
        model = network()
        held = tap(model[0])
        loss = checkpoint(cubes, model, X, use_reentrant=False)
        loss.backward(inputs=[model[2].weight], retain_graph=True)  # recomputes, stops short
        with pytest.raises(UnsupportedTrainingError, match="used a second time"):
            model(X)
        assert held[1].calls == 0

    def test_accumulation(self) -> None:
        model = network()
        held = [tap(layer) for layer in (model[0], model[2])]
        cubes(model, X).backward()
        before = copy.deepcopy(model.state_dict())
        biases = [layer.bias.grad.clone() for layer in (model[0], model[2])]
        with pytest.raises(UnsupportedTrainingError, match=r"second backward before.*step"):
            cubes(model, X).backward()
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert torch.equal(model[2].bias.grad, biases[1])
        for backward_tap, _ in held:
            backward_tap.rearm()
        cubes(model, X).backward()
        assert [sink.calls for _, sink in held] == [2, 2]

    @pytest.mark.parametrize("rearmed", [False, True])
    def test_retained_graph(self, rearmed: bool) -> None:
        layer = nn.Linear(3, 2)
        backward_tap, _ = tap(layer)
        loss = layer(X.clone().requires_grad_()).sum()
        loss.backward(retain_graph=True)
        before = layer.weight.detach().clone()
        if rearmed:
            backward_tap.rearm()
        # After the step it is autograd's own version check that speaks.
        message = "inplace operation" if rearmed else "second backward"
        with pytest.raises(RuntimeError, match=message):
            loss.backward()
        self.unchanged(layer, before)

    def test_gradient_of_gradient(self) -> None:
        layer = nn.Linear(3, 2)
        held = tap(layer)
        x = X.clone().requires_grad_()
        before = layer.weight.detach().clone()
        with pytest.raises(UnsupportedTrainingError, match="create_graph=True"):
            torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        self.unchanged(layer, before)
        del held

    def test_gradient_asked_for_by_autograd_grad(self) -> None:
        layer = nn.Linear(3, 2)
        held = tap(layer)
        with pytest.raises(UnsupportedTrainingError, match=r"torch\.autograd\.grad"):
            torch.autograd.grad(layer(X).sum(), layer.weight)
        assert held[1].calls == 0

    def test_several_ranks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer = nn.Linear(3, 2)
        backward_tap, _ = tap(layer)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(UnsupportedTrainingError, match="trains on 2 ranks"):
            layer(X)
        backward_tap.detach()
        with pytest.raises(UnsupportedTrainingError, match="trains on 2 ranks"):
            backward_tap.attach()
        assert type(layer) is nn.Linear

    def test_arguments(self) -> None:
        class Special(nn.Linear):
            pass

        layer = nn.Linear(3, 2)
        with pytest.raises(TypeError, match=r"exactly an nn\.Linear, not a Special"):
            BackwardUpdateTap(Special(3, 2), Descent(layer))
        with pytest.raises(TypeError, match=r"sink=.*update"):
            BackwardUpdateTap(layer, object())
        held = tap(layer)
        sink = Descent(layer)
        with pytest.raises(ValueError, match="tapped already"):
            BackwardUpdateTap(layer, sink).attach()
        del held


class TestWithoutUpdate:
    def test_plain_where_no_gradient_is_due(self) -> None:
        model = network()
        _, sink = tap(model[0])
        expected = copy.deepcopy(model)(X)
        with torch.no_grad():
            assert torch.equal(model(X), expected)
        with torch.inference_mode():
            assert torch.equal(model(X), expected)
        model(X[:0]).sum().backward()
        assert sink.calls == 0

    @pytest.mark.parametrize("when", ["before forward", "before backward"])
    def test_frozen_weight(self, when: str) -> None:
        plain, tapped = network(), network()
        _, sink = tap(tapped[0])
        x = X.clone().requires_grad_()
        if when == "before forward":
            tapped[0].weight.requires_grad_(False)
        loss = cubes(tapped, x)
        tapped[0].weight.requires_grad_(False)
        loss.backward()
        cubes(plain, X).backward()
        torch.testing.assert_close(tapped[0].bias.grad, plain[0].bias.grad)
        assert x.grad is not None
        assert sink.calls == 0

    def test_adversarial_examples_then_training(self) -> None:
        plain, tapped = network(), network()
        held = tap(tapped[0]), tap(tapped[2])
        directions = []
        for model in (plain, tapped):
            x = X.clone().requires_grad_()
            loss = cubes(model, x)
            directions.append(torch.autograd.grad(loss, x)[0])
            # `loss` is still held here, its graph is spent
            (descended(plain, cubes(plain, X)) if model is plain else cubes(tapped, X).backward())
        assert torch.equal(*directions)
        assert_same_training(plain, tapped)
        assert [sink.calls for _, sink in held] == [1, 1]

    def test_abandoned_forwards(self) -> None:
        layer = nn.Linear(3, 2)
        _, sink = tap(layer)
        for _ in range(3):
            layer(X)
        loss = layer(X).sum()
        loss.backward()
        assert sink.calls == 1

    def test_transforms_and_functional_call(self) -> None:
        model = network()
        _, sink = tap(model[0])
        own = dict(model.named_parameters())

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(model, parameters, (x,)).pow(3).mean()

        gradients = torch.func.grad(loss)(own, X)
        others = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
        loss(others, X).backward()
        torch.testing.assert_close(gradients["0.weight"], others["0.weight"].grad)
        assert torch.func.vmap(model)(X).shape == (2, 5, 2)
        assert torch.func.jacrev(model)(X[0, 0]).shape == (2, 3)
        assert sink.calls == 0

    def test_detached_between_forward_and_backward(self) -> None:
        plain, tapped = network(), network()
        backward_tap, sink = tap(tapped[0])
        loss = cubes(tapped, X)
        backward_tap.detach()
        loss.backward()
        cubes(plain, X).backward()
        assert sink.calls == 0
        torch.testing.assert_close(tapped[0].bias.grad, plain[0].bias.grad)


class TestLife:
    def test_attach_and_detach_are_idempotent(self) -> None:
        layer = nn.Linear(3, 2)
        shown = repr(layer)
        backward_tap, sink = tap(layer)
        backward_tap.attach()
        assert backward_tap.attached
        assert isinstance(layer, nn.Linear)
        assert repr(layer) == shown
        layer(X).sum().backward()
        assert sink.calls == 1
        backward_tap.detach()
        backward_tap.detach()
        assert type(layer) is nn.Linear
        assert not backward_tap.attached
        layer(X).sum().backward()
        assert sink.calls == 1
        assert layer.weight.grad is not None

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_pickles_are_plain(self, protocol: int) -> None:
        model = network()
        held = tap(model[0])
        blob = pickle.dumps(model, protocol)
        assert b"neurms" not in blob
        twin = pickle.loads(blob)
        assert type(twin[0]) is nn.Linear
        assert torch.equal(twin(X), model(X))
        del held

    def test_deep_copies_are_plain_and_independent(self) -> None:
        model = network()
        _, sink = tap(model[0])
        twin = copy.deepcopy(model)
        assert type(twin[0]) is nn.Linear
        cubes(twin, X).backward()
        assert twin[0].weight.grad is not None
        assert sink.calls == 0

    def test_layer_outlives_its_optimizer(self) -> None:
        layer = nn.Linear(3, 2)
        backward_tap, sink = tap(layer)
        del sink
        gc.collect()
        layer(X).sum().backward()
        assert type(layer) is nn.Linear
        assert layer.weight.grad is not None
        assert not backward_tap.attached

    def test_a_new_optimizer_takes_over_from_a_dead_one(self) -> None:
        layer = nn.Linear(3, 2)
        old, sink = tap(layer)
        del sink
        gc.collect()
        _, sink = tap(layer)
        layer(X).sum().backward()
        assert sink.calls == 1
        assert not old.attached

    def test_a_tap_keeps_no_module_alive(self) -> None:
        layer = nn.Linear(3, 2)
        backward_tap, sink = tap(layer)
        layer(X).sum().backward()
        alive = weakref.ref(layer)
        del layer
        assert alive() is None
        assert not backward_tap.attached
        del sink

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
    def test_compiled_model(self) -> None:
        torch._dynamo.reset()
        plain, tapped = network(), network()
        held = [tap(layer) for layer in (tapped[0], tapped[2])]
        compiled = torch.compile(tapped, backend="aot_eager")
        for _ in range(2):
            plain.zero_grad()
            tapped.zero_grad()
            descended(plain, cubes(plain, X))
            cubes(compiled, X).backward()
            assert_same_training(plain, tapped)
            for backward_tap, _ in held:
                backward_tap.rearm()
        torch._dynamo.reset()


class TestBrokenOffForwards:
    """An exception may keep the graph of a forward alive whose backward never comes."""

    def layer(self) -> tuple[nn.Linear, BackwardUpdateTap, Descent]:
        layer = nn.Linear(3, 2)
        return layer, *tap(layer)

    def test_the_next_forward_takes_its_place_once_the_optimizer_began_anew(self) -> None:
        layer, held, _sink = self.layer()
        kept = layer(torch.ones(4, 3))
        held.rearm()
        before = layer.weight.detach().clone()
        layer(torch.ones(4, 3)).sum().backward()
        assert not torch.equal(layer.weight, before)
        held.rearm()
        before = layer.weight.detach().clone()
        with pytest.raises(UnsupportedTrainingError, match="that another has replaced"):
            kept.sum().backward()
        assert torch.equal(layer.weight, before)

    def test_zero_grad_between_forward_and_backward(self) -> None:
        layer, held, _sink = self.layer()
        loss = layer(torch.ones(4, 3)).sum()
        held.rearm()
        before = layer.weight.detach().clone()
        loss.backward()
        assert not torch.equal(layer.weight, before)
