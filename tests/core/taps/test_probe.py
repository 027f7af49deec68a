"""The probe engine: graphs without a break that deliver what the hooks deliver."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

import neurms
from neurms.core.diagnostics.probe import FactorizationProbe
from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.taps import HookTap
from tests.core.taps.recording import Recorder, close, truth

# torch hides this warning of its own at graph breaks, where warnings are no errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

X = torch.linspace(-1, 1, 30).reshape(10, 3)
Tapped = tuple[HookTap, Recorder]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))


def whole(model: Any, backend: Any = "aot_eager") -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


def tap(layer: nn.Module, in_graph: str = "observe", **sink: Any) -> Tapped:
    recorder = Recorder(**sink)
    hook_tap = HookTap(layer, layer.weight, recorder, features=True, in_graph=in_graph)
    hook_tap.attach()
    return hook_tap, recorder


# ------------------------------------------------------------------ statistics


class Spatial(nn.Module):
    """A grouped convolution before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 4, 3, groups=2)
        self.last = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu().flatten(1)).tanh()


def cubes(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).pow(3).sum()


def test_sums_are_those_of_float64() -> None:
    model, x = Spatial(), torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(3))
    taps = {name: tap(model.get_submodule(name)) for name in ("first", "last")}
    cubes(whole(model), x).backward()
    errors, inputs = truth(model, "first", cubes, x)
    _, recorder = taps["first"]
    close(recorder.units, errors.square().sum((0, 2, 3)))
    close(recorder.features, inputs.square().sum((0, 2, 3)))
    assert (recorder.rows, recorder.received[0].feature_rows) == (4 * 9, 4 * 25)
    errors, inputs = truth(model, "last", cubes, x)
    _, recorder = taps["last"]
    close(recorder.units, errors.square().sum(0))
    close(recorder.features, inputs.square().sum(0))


def test_b_rescales_the_layer_and_everything_upstream() -> None:
    plain = network()
    compiled, factors = copy.deepcopy(plain), torch.tensor([2.0, 5.0])
    held = tap(plain[2], factors=factors), tap(compiled[2], "rescale", factors=factors)
    for run in (plain, whole(compiled)):
        run(X).pow(3).sum().backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    del held


def test_loss_scales_are_divided_out() -> None:
    model = network()
    _, recorder = tap(model[2], scale=64.0)
    run = whole(model)
    run(X).pow(3).sum().backward()
    recorder.scale = 128.0
    (2 * run(X).pow(3).sum()).backward()
    first, second = (sums.unit_square_sum for sums in recorder.received)
    close(first, second)
    errors, _ = truth(model, "2", cubes, X)
    close(first, (errors / 64).square().sum(0))


def test_a_loss_scale_that_leaves_no_square_is_divided_out_first() -> None:
    model = network()
    _, recorder = tap(model[2], scale=2.0**90)
    (2.0**90 * whole(model)(X).pow(3).sum()).backward()
    errors, _ = truth(model, "2", cubes, X)
    close(recorder.units, errors.square().sum(0))


def test_sums_are_not_left_in_memory_that_a_graph_uses_again() -> None:
    hook_tap, recorder = tap(nn.Linear(3, 2))
    units, features = torch.ones(2), torch.ones(3)
    hook_tap.take(torch.ones(4, 2), units, features, 4)
    units.zero_()
    features.zero_()
    assert recorder.units.tolist() == [1, 1]
    assert recorder.features.tolist() == [1, 1, 1]


def test_a_copy_of_a_leaf_finds_the_tap() -> None:
    """Hooks on saved tensors, which offload them, give copies back."""
    model = network()
    _, recorder = tap(model[0])
    run = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        loss = run(X).sum()
    loss.backward()
    assert recorder.rows == 10


class Words(nn.Module):
    """An embedding, whose H is token indices."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens)).tanh()


def test_tokens_are_counted() -> None:
    model, tokens = Words(), torch.tensor([[0, 3, 3], [1, 3, 0]])
    (_, table), (_, head) = tap(model.table), tap(model.head)
    whole(model)(tokens).sum().backward()
    assert table.features.tolist() == [2, 1, 0, 3, 0]
    assert (table.rows, table.received[0].feature_rows) == (6, 6)
    close(head.features, model.table(tokens).detach().square().sum((0, 1)))


def test_autocast_signals_are_squared_in_float32() -> None:
    plain = network()
    compiled = copy.deepcopy(plain)
    (a, one), (b, other) = tap(plain[2]), tap(compiled[2])
    for run in (plain, whole(compiled)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(X).float().pow(3).sum()
        loss.backward()
    assert (a.fired, b.fired) == (True, True)
    close(one.units, other.units)
    assert other.units.dtype == torch.float32


# ------------------------------------------------------------------ what counts


class Twice(nn.Module):
    """One layer, used twice on the same input: its D and H come twice, and are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.layer(x)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_layer_used_twice_delivers_twice(backend: str) -> None:
    model = Twice()
    _, recorder = tap(model.layer)
    whole(model, backend)(X).sum().backward()
    assert (len(recorder.received), recorder.rows) == (2, 20)
    close(recorder.units, torch.full((3,), 20.0))


def test_statistics_follow_gradients() -> None:
    model = network()
    hook_tap, recorder = tap(model[0])
    run, x = whole(model), X.clone().requires_grad_()
    torch.autograd.grad(run(x).sum(), x)
    torch.autograd.grad(run(x).sum(), list(model.parameters()))
    run(x).sum().backward(inputs=[model[2].weight])
    with torch.no_grad():
        run(x)
    assert not recorder.received
    assert not hook_tap.fired
    loss, later = run(x).sum(), run(x).sum()
    later.backward()
    loss.backward()
    (run(x).sum() + run(x).sum()).backward()
    assert len(recorder.received) == 4


def test_frozen_weights_and_borrowed_ones_are_not_observed() -> None:
    model = network()
    _, recorder = tap(model[0])
    run = whole(model)
    model[0].weight.requires_grad_(False)
    run(X).sum().backward()
    others = {k: v.detach().clone().requires_grad_() for k, v in model.named_parameters()}
    whole(lambda p: torch.func.functional_call(model, p, (X,)))(others).sum().backward()
    whole(lambda x: torch.func.grad(lambda y: model(y).sum())(x))(X)
    assert not recorder.received
    model[0].weight.requires_grad_(True)
    run(X).sum().backward()
    assert len(recorder.received) == 1


def test_checkpoints_count_once() -> None:
    model = network()
    _, recorder = tap(model[0])

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    run(X).sum().backward()
    assert recorder.rows == 10


# ------------------------------------------------------------------ graphs and lifetimes


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x).relu_())


def test_one_graph_serves_every_layer_of_a_kind() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = nn.Sequential(*[Residual() for _ in range(4)])
    taps = [tap(layer) for layer in model.modules() if isinstance(layer, nn.Linear)]
    for block in model:
        block.compile(backend=counter, fullgraph=True)
    # The second time for an input that requires a gradient.
    model(X).sum().backward()
    assert counter.frame_count == 2
    assert [recorder.rows for _, recorder in taps] == [10] * 8


def test_batch_sizes_recompile_at_most_once() -> None:
    counter, model = CompileCounterWithBackend("aot_eager"), network()
    _, recorder = tap(model[0])
    run = whole(model, counter)
    for rows in (4, 5, 7, 9):
        run(X[:rows]).sum().backward()
    assert counter.frame_count == 2
    assert [sums.rows for sums in recorder.received] == [4, 5, 7, 9]


def test_graphs_keep_no_sink_alive_and_outlive_it() -> None:
    model = network()
    hook_tap, recorder = tap(model[0])
    run, gone = whole(model), weakref.ref(recorder)
    expected = torch.autograd.grad(run(X).sum(), model[0].weight)
    del recorder, hook_tap
    gc.collect()
    assert gone() is None
    run(X).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, expected[0])


def test_a_sink_that_begins_to_rescale_is_refused() -> None:
    model = network()
    _, recorder = tap(model[0])
    run = whole(model)
    recorder.factors = torch.ones(4)
    with pytest.raises(UnsupportedTrainingError, match="build the optimizer anew"):
        run(X).sum().backward()


def test_in_graph_is_checked() -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="in_graph='always'"):
        HookTap(layer, layer.weight, Recorder(), in_graph="always")


# ------------------------------------------------------------------ whole training steps


class Image(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(2, 3, 3),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(27, 6),
            nn.Linear(6, 3),
        )


def trained(
    model: nn.Module, run: Callable[[Tensor], Tensor], variant: Any, steps: int
) -> neurms.NeuRMS:
    """Train with accumulation, a schedule and an evaluation after every step."""
    optimizer = neurms.NeuRMS(model, lr=0.05, variant=variant, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    random = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for _ in range(2):
            x, y = torch.randn(5, 2, 5, 5, generator=random), torch.tensor([0, 1, 2, 1, 0])
            (cross_entropy(run(x), y) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            run(x)
    return optimizer


@pytest.mark.parametrize("variant", ["U", "F", "B"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_trains_as_an_eager_one(variant: str, backend: str) -> None:
    plain = Image()
    compiled = copy.deepcopy(plain)
    counter = CompileCounterWithBackend(backend)
    one = trained(plain, plain, variant, 4)
    other = trained(compiled, whole(compiled, counter), variant, 4)
    # One graph to train and one to evaluate.
    assert counter.frame_count == 2
    assert {row.rule for row in other.plan()} == {"neurms"}
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        for key, value in one.state[p].items():
            torch.testing.assert_close(
                torch.as_tensor(value), torch.as_tensor(other.state[q][key]), rtol=1e-5, atol=1e-7
            )


def test_compiled_modules_are_seen_by_a_later_optimizer() -> None:
    model = network()
    model.compile(backend="aot_eager", fullgraph=True)
    for _ in range(2):
        optimizer = neurms.NeuRMS(model, lr=0.01, variant="U")
        model(X).sum().backward()
        optimizer.step()
        assert optimizer.state[model[0].weight]["step"] == 1
        optimizer.detach()
        optimizer.zero_grad()


def test_b_breaks_the_graph_where_another_hook_must_see_what_it_rescaled() -> None:
    model = network().double()
    probe = FactorizationProbe(model).attach()
    optimizer = neurms.NeuRMS(model, variant="B")
    one_row = X[:1].double()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="detach it, or drop fullgraph"):
        whole(model)(one_row)
    torch.compile(model, backend="aot_eager")(one_row).square().sum().backward()
    assert probe.rho() == pytest.approx({"0": 1.0, "2": 1.0}, rel=1e-9)
    del optimizer


def test_updates_inside_backward_are_refused_in_full_graphs() -> None:
    model = network()
    optimizer = neurms.NeuRMS(model, update="backward", variant="U")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="detach it, or drop fullgraph"):
        whole(model)(X)
    optimizer.detach()
