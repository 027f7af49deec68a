import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from neurms.core.taps import Activity, HookTap
from tests.core.taps.recording import Recorder, close, tap, truth


def network(*tail: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), *tail, nn.Linear(4, 2))


def cubes(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).pow(3).mean()


X = torch.linspace(-1, 1, 15).reshape(5, 3)


@pytest.mark.parametrize("x", [X, X[0], X.reshape(1, 5, 3)], ids=["batch", "sample", "tokens"])
@pytest.mark.parametrize("activation", [nn.ReLU(inplace=True), nn.Tanh(), nn.SiLU(inplace=True)])
def test_sums_are_those_of_the_errors_before_the_activation(
    x: torch.Tensor, activation: nn.Module
) -> None:
    model = network(activation)
    _, recorder = tap(model[0])
    cubes(model, x).backward()
    outside = nn.Sequential(model[0], copy.deepcopy(activation), model[2])
    if hasattr(activation, "inplace"):
        outside[1].inplace = False
    errors, inputs = truth(outside, "0", cubes, x)
    (sums,) = recorder.received
    close(sums.unit_square_sum, errors.reshape(-1, 4).square().sum(0))
    close(recorder.features, inputs.reshape(-1, 3).square().sum(0))
    assert sums.rows == sums.feature_rows == x.numel() // 3


@pytest.mark.parametrize("shape", [(2, 3, 6, 5), (3, 6, 5)], ids=["batch", "sample"])
def test_convolution_followed_by_an_in_place_activation(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 2))
    _, recorder = tap(model[0])
    cubes(model, x).backward()
    errors, inputs = truth(nn.Sequential(model[0], nn.ReLU(), model[2]), "0", cubes, x)
    spatial = [axis for axis in range(len(shape)) if axis != len(shape) - 3]
    close(recorder.units, errors.square().sum(spatial))
    close(recorder.features, inputs.square().sum(spatial))
    (sums,) = recorder.received
    assert sums.rows == errors.numel() // 4
    assert sums.feature_rows == x.numel() // 3 != sums.rows


def test_weight_gradient_is_bounded_by_the_sums() -> None:
    # Cauchy-Schwarz links both sums to the gradient that they precondition: |G_ij|^2 <= v_i u_j.
    model = network(nn.Tanh())
    _, recorder = tap(model[0])
    cubes(model, X[:1]).backward()
    outer = recorder.units[:, None] * recorder.features[None, :]
    close(outer, model[0].weight.grad.square())  # one row: equality


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_deliver_once(reentrant: bool) -> None:
    model = network(nn.Tanh())
    x = X.clone().requires_grad_()
    _, recorder = tap(model[0])
    checkpoint(cubes, model, x, use_reentrant=reentrant).backward()
    errors, inputs = truth(model, "0", cubes, X)
    assert len(recorder.received) == 1
    close(recorder.units, errors.square().sum(0))
    close(recorder.features, inputs.square().sum(0))


def test_module_used_twice_delivers_each_use() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    _, recorder = tap(layer)
    first = layer(X)
    second = layer(first.tanh())
    second.retain_grad()
    first.retain_grad()
    second.pow(3).mean().backward()
    assert len(recorder.received) == 2
    close(recorder.units, (first.grad.square() + second.grad.square()).sum(0))
    assert recorder.rows == 10


def test_a_forward_without_backward_counts_nothing() -> None:
    model = network()
    _, recorder = tap(model[0])
    abandoned = model(X)
    cubes(model, X).backward()
    assert len(recorder.received) == 1
    del abandoned


def test_tied_weight_is_refused() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    held, _ = tap(first)
    with pytest.raises(ValueError, match=r"tied.*fallback"):
        tap(second)
    assert not second._forward_hooks
    held.detach()
    tap(second)


def test_two_taps_on_one_module_each_deliver() -> None:
    layer = nn.Linear(3, 2)
    (_, first), (_, second) = tap(layer), tap(layer)
    layer(X).sum().backward()
    assert len(first.received) == len(second.received) == 1


@pytest.mark.parametrize("when", ["before forward", "before backward"])
def test_frozen_weight_delivers_nothing(when: str) -> None:
    model = network()
    hook_tap, recorder = tap(model[0])
    x = X.clone().requires_grad_()
    if when == "before forward":
        model[0].weight.requires_grad_(False)
    loss = cubes(model, x)
    model[0].weight.requires_grad_(False)
    loss.backward()
    assert x.grad is not None
    assert recorder.received == []
    assert not hook_tap.fired


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_observed_without_gradients(mode: type) -> None:
    model = network().eval()
    _, recorder = tap(model[0])
    with mode():
        model(X)
    assert recorder.received == []


def test_autocast_squares_in_float32() -> None:
    layer = nn.Linear(3, 2)
    _, recorder = tap(layer)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(X)
    output.retain_grad()
    (output.float() * torch.linspace(1, 1.3, 10).reshape(5, 2)).sum().backward()
    assert output.grad.dtype == torch.bfloat16
    (sums,) = recorder.received
    assert sums.unit_square_sum.dtype == sums.feature_square_sum.dtype == torch.float32
    close(recorder.units, output.grad.double().square().sum(0), rtol=1e-6)


def test_float64_stays_float64() -> None:
    layer = nn.Linear(3, 2).double()
    _, recorder = tap(layer)
    layer(X.double()).pow(2).sum().backward()
    assert recorder.units.dtype == recorder.features.dtype == torch.float64


@pytest.mark.parametrize("scale", [2.0**100, torch.tensor(2.0**100)], ids=["float", "tensor"])
def test_loss_scale_is_divided_out_before_squaring(scale: float | torch.Tensor) -> None:
    layer = nn.Linear(3, 2)
    _, plain = tap(layer)
    _, scaled = tap(layer, scale=scale)
    (layer(X).sum() * scale).backward()
    assert plain.units.isinf().all()  # its square does not fit float32
    assert scaled.units.tolist() == [5.0, 5.0]


class TestTransforms:
    def test_grad_vmap_and_jacrev_deliver_nothing(self) -> None:
        model = network(nn.Tanh())
        _, recorder = tap(model[0])
        parameters = dict(model.named_parameters())
        loss = lambda p, x: torch.func.functional_call(model, p, (x,)).pow(3).mean()  # noqa: E731
        gradients = torch.func.grad(loss)(parameters, X)
        assert torch.func.vmap(model)(X).shape == (5, 2)
        assert torch.func.jacrev(model)(X[0]).shape == (2, 3)
        assert torch.func.hessian(cubes, argnums=1)(model, X[0]).shape == (3, 3)
        assert recorder.received == []
        cubes(model, X).backward()
        torch.testing.assert_close(gradients["0.weight"], model[0].weight.grad)

    def test_functional_call_counts_with_the_own_weight_only(self) -> None:
        model = network()
        _, recorder = tap(model[0])
        own = dict(model.named_parameters())
        others = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
        torch.func.functional_call(model, others, (X,)).sum().backward()
        assert recorder.received == []
        torch.func.functional_call(model, own, (X,)).sum().backward()
        assert len(recorder.received) == 1

    def test_meta_tensors_and_tracing(self) -> None:
        layer = nn.Linear(3, 2, device="meta")
        _, recorder = tap(layer)
        layer(torch.zeros(5, 3, device="meta")).sum()
        real = nn.Linear(3, 2)
        _, other = tap(real)
        exported = torch.export.export(real, (X,), strict=False).module()
        torch.testing.assert_close(exported(X), real(X))
        assert recorder.received == other.received == []


class TestWhatCounts:
    """Statistics follow the gradients that reach ``weight.grad``."""

    def test_retained_graph_counts_twice(self) -> None:
        model = network(nn.Tanh())
        _, recorder = tap(model[0])
        loss = cubes(model, X)
        loss.backward(retain_graph=True)
        once = recorder.units.clone()
        loss.backward()
        torch.testing.assert_close(recorder.units, 2 * once)
        assert recorder.rows == 10

    def test_autograd_grad_counts_nothing_and_is_not_rescaled(self) -> None:
        model = network(nn.Tanh())
        x = X.clone().requires_grad_()
        expected = torch.autograd.grad(cubes(model, x), x)[0]
        _, recorder = tap(model[0], factors=torch.full((4,), 7.0))
        torch.testing.assert_close(torch.autograd.grad(cubes(model, x), x)[0], expected)
        torch.autograd.grad(cubes(model, x), model[0].weight)
        torch.autograd.grad(cubes(model, x), model[0].bias)
        assert recorder.received == []

    def test_backward_with_inputs(self) -> None:
        model = network(nn.Tanh())
        x = X.clone().requires_grad_()
        _, recorder = tap(model[0])
        cubes(model, x).backward(inputs=[x])
        cubes(model, x).backward(inputs=[model[2].weight])
        assert recorder.received == []
        cubes(model, x).backward(inputs=[model[0].weight])
        assert len(recorder.received) == 1

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_autograd_grad_inside_a_backward_counts_nothing(self, reentrant: bool) -> None:
        model = network(nn.Tanh())
        inner = network(nn.Tanh())
        _, recorder = tap(inner[0])

        def attacked(x: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                probe = x.detach().requires_grad_()
                (direction,) = torch.autograd.grad(cubes(inner, probe), probe)
            return model(x + direction).pow(3).mean()

        x = X.clone().requires_grad_()
        checkpoint(attacked, x, use_reentrant=reentrant).backward()
        assert recorder.received == []

    def test_gradient_penalty_counts_the_whole_derivative_at_the_output(self) -> None:
        model = network(nn.Tanh(), nn.Linear(4, 4))
        _, recorder = tap(model[0])
        outputs = []
        model[0].register_forward_hook(lambda module, args, output: outputs.append(output))

        def penalised() -> torch.Tensor:
            x = X.clone().requires_grad_()
            loss = cubes(model, x)
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            return loss + slope.square().sum()

        total = penalised()
        assert recorder.received == []
        (errors,) = torch.autograd.grad(total, outputs[-1], retain_graph=True)
        total.backward()
        assert len(recorder.received) == 1
        close(recorder.units, errors.square().sum(0))

    def test_backward_with_create_graph_counts(self) -> None:
        model = network(nn.Tanh())
        _, recorder = tap(model[0])
        errors, _ = truth(model, "0", cubes, X)
        gradients_before = len(recorder.received)
        loss = cubes(model, X)
        with pytest.warns(UserWarning, match="create_graph"):
            loss.backward(create_graph=True)
        assert len(recorder.received) == gradients_before + 1
        assert not recorder.units.requires_grad
        close(recorder.units, errors.square().sum(0))
        model.zero_grad()

    def test_empty_batch_delivers_no_rows(self) -> None:
        model = network()
        hook_tap, recorder = tap(model[0])
        model(X[:0]).sum().backward()
        (sums,) = recorder.received
        assert (sums.rows, sums.feature_rows) == (0, 0)
        assert sums.unit_square_sum.tolist() == [0.0] * 4
        assert recorder.rescaled == 0  # no mean can be taken over no rows
        assert hook_tap.fired

    def test_attention_that_bypasses_its_projection(self) -> None:
        attention = nn.MultiheadAttention(4, 2, batch_first=True)
        hook_tap, _ = tap(attention.out_proj)
        x = torch.randn(2, 3, 4)
        attention(x, x, x)[0].sum().backward()
        assert attention.out_proj.weight.grad is not None
        assert not hook_tap.fired


class TestRescale:
    def test_factors_act_on_the_own_gradient_and_upstream(self) -> None:
        model = network(nn.Tanh())
        errors, inputs = truth(model, "2", cubes, X)
        factors = torch.tensor([2.0, 5.0])
        _, recorder = tap(model[2], factors=factors)
        cubes(model, X).backward()
        close(model[2].weight.grad, (errors * factors).T @ inputs)
        close(model[2].bias.grad, (errors * factors).sum(0))
        hidden = (errors * factors) @ model[2].weight.double() * (1 - inputs.square())
        close(model[0].weight.grad, hidden.T @ X.double())
        close(recorder.units, errors.square().sum(0))  # as they arrived

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_rescale_under_checkpoints(self, reentrant: bool) -> None:
        plain, checked = network(nn.Tanh()), network(nn.Tanh())
        factors = torch.tensor([2.0, 5.0])
        held = [tap(model[2], factors=factors) for model in (plain, checked)]
        cubes(plain, X).backward()
        x = X.clone().requires_grad_()
        checkpoint(cubes, checked, x, use_reentrant=reentrant).backward()
        for expected, actual in zip(plain.parameters(), checked.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)
        assert [len(recorder.received) for _, recorder in held] == [1, 1]

    def test_convolution(self) -> None:
        torch.manual_seed(0)
        layer, x = nn.Conv2d(2, 3, 2), torch.randn(2, 2, 4, 4)
        layer(x).pow(2).sum().backward()
        expected = layer.weight.grad * torch.tensor([1.0, 2.0, 3.0])[:, None, None, None]
        layer.zero_grad()
        held = tap(layer, factors=torch.tensor([1.0, 2.0, 3.0]))
        layer(x).pow(2).sum().backward()
        torch.testing.assert_close(layer.weight.grad, expected)
        del held


class TestLife:
    def test_attach_and_detach_are_idempotent(self) -> None:
        layer = nn.Linear(3, 2)
        hook_tap, recorder = tap(layer)
        hook_tap.attach()
        assert hook_tap.attached
        layer(X).sum().backward()
        assert len(recorder.received) == 1
        hook_tap.detach()
        hook_tap.detach()
        assert not hook_tap.attached
        assert not layer._forward_hooks
        layer(X).sum().backward()
        assert len(recorder.received) == 1
        hook_tap.attach()
        layer(X).sum().backward()
        assert len(recorder.received) == 2

    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
    )
    def test_copies_are_inert(self, duplicate) -> None:
        model = network()
        hook_tap, recorder = tap(model[0])
        twin = duplicate(model)
        twin(X).sum().backward()
        assert recorder.received == []
        torch.testing.assert_close(twin(X), model(X))
        model(X).sum().backward()
        assert len(recorder.received) == 1
        assert hook_tap.attached
        assert not copy.deepcopy(hook_tap).attached
        copy.deepcopy(hook_tap).detach()

    def test_the_input_is_not_kept_alive(self) -> None:
        layer = nn.Linear(3, 2)
        _, recorder = tap(layer)
        x = X.clone()
        alive = weakref.ref(x)
        # Autograd, which must keep H for the weight's gradient, is made to save its shape only.
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.shape, torch.ones):
            loss = layer(x).sum()
        del x
        assert alive() is None
        loss.backward()
        close(recorder.features, X.double().square().sum(0))

    def test_a_model_outlives_its_optimizer_and_sheds_the_hook(self) -> None:
        layer = nn.Linear(3, 2)
        hook_tap, recorder = tap(layer)
        del recorder
        gc.collect()
        layer(X).sum().backward()
        assert not hook_tap.attached
        assert not layer._forward_hooks

    def test_a_tap_keeps_no_module_alive(self) -> None:
        layer = nn.Linear(3, 2)
        hook_tap, _ = tap(layer)
        alive = weakref.ref(layer)
        del layer
        assert alive() is None  # by reference counting alone
        hook_tap.detach()
        with pytest.raises(ReferenceError, match="no longer exists"):
            hook_tap.attach()

    def test_hook_that_replaces_the_output_is_not_part_of_the_layer(self) -> None:
        layer = nn.Linear(3, 2)
        layer.register_forward_hook(lambda module, args, output: 3 * output)
        _, recorder = tap(layer)
        layer(X).sum().backward()
        assert recorder.units.tolist() == [45.0, 45.0]

    def test_input_given_by_name(self) -> None:
        layer = nn.Linear(3, 2)
        _, recorder = tap(layer)
        layer(input=X).sum().backward()
        close(recorder.features, X.double().square().sum(0))

    def test_features_can_be_left_out(self) -> None:
        layer = nn.Linear(3, 2)
        _, recorder = tap(layer, features=False)
        layer(X).sum().backward()
        (sums,) = recorder.received
        assert sums.feature_square_sum is None

    def test_threads_lose_nothing(self) -> None:
        layer = nn.Linear(3, 2)
        _, recorder = tap(layer)

        def work() -> None:
            for _ in range(20):
                layer(X).sum().backward()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert recorder.rows == 4 * 20 * 5
        assert recorder.units.tolist() == [400.0, 400.0]


class TestArguments:
    def test_weight_of_another_module(self) -> None:
        with pytest.raises(ValueError, match="not a parameter of this Linear itself"):
            HookTap(nn.Linear(3, 2), nn.Linear(3, 2).weight, Recorder())

    def test_parametrized_weight(self) -> None:
        layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        with pytest.raises(ValueError, match="parametrized"):
            HookTap(layer, layer.weight, Recorder())

    def test_unknown_activity(self) -> None:
        norm = nn.LayerNorm(3)
        with pytest.raises(ValueError, match=r"LayerNorm.*activity=Activity"):
            HookTap(norm, norm.weight, Recorder())
        HookTap(norm, norm.weight, Recorder(), activity=Activity())

    def test_sink_and_backend(self) -> None:
        layer = nn.Linear(3, 2)
        with pytest.raises(TypeError, match=r"sink=.*rescale"):
            HookTap(layer, layer.weight, object())
        with pytest.raises(ValueError, match="fast"):
            HookTap(layer, layer.weight, Recorder(), backend="fast")
