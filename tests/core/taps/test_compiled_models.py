"""Taps without a probe under torch.compile: the graph breaks, eager's statistics are delivered."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import neurms
from neurms.core.taps import forget_compiled_graphs
from neurms.core.taps.hooks import HookTap
from tests.core.taps.recording import Recorder, close, tap

# torch hides this warning of its own at graph breaks, which does not survive warnings as errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

X = torch.linspace(-1, 1, 30).reshape(2, 5, 3)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))


def module_compile(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def function_compile(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")


def sums_of(run: nn.Module, *recorders: Recorder) -> list[torch.Tensor]:
    run(X).pow(3).mean().backward()
    return [r.units for r in recorders] + [r.features for r in recorders]


@pytest.mark.parametrize("compiling", [module_compile, function_compile])
@pytest.mark.parametrize("factors", [None, torch.tensor([2.0, 5.0])], ids=["U", "B"])
def test_same_sums_as_eager(
    compiling: Callable[[nn.Module], nn.Module], factors: torch.Tensor | None
) -> None:
    eager = network()
    compiled = copy.deepcopy(eager)
    _, first = tap(eager[0])
    _, last = tap(eager[2], factors=factors)
    expected = sums_of(eager, first, last)
    _, first = tap(compiled[0])
    _, last = tap(compiled[2], factors=factors)
    run = compiling(compiled)
    actual = sums_of(run, first, last)
    assert [r.rows for r in (first, last)] == [10, 10]
    for one, other in zip(actual, expected, strict=True):
        close(one, other)
    for one, other in zip(compiled.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    sums_of(run, first, last)
    assert len(first.received) == 2


def test_full_graphs_are_refused_with_the_cure() -> None:
    model = network()
    held = tap(model[0])
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="detach it, or drop fullgraph"):
        run(X)
    del held


def test_taps_attached_after_the_first_compiled_call() -> None:
    model = network()
    run = function_compile(model)
    run(X).sum().backward()
    hook_tap, recorder = tap(model[0])
    forget_compiled_graphs()
    run(X).sum().backward()
    assert len(recorder.received) == 1
    assert hook_tap.fired


def test_taps_behind_a_graph_break_are_not_compiled_by_themselves() -> None:
    """Dynamo would compile the hook of each layer anew, and give up at its eighth."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 2))
    seen: list[int] = []
    for layer in (model[0], model[2], model[3]):
        layer.register_forward_hook(lambda *_: seen.append(1))
    # A hook of somebody else's beside a tap that rescales breaks the graph there.
    compiled = torch.compile(model, backend="eager")
    optimizer = neurms.NeuRMS(compiled, variant="B")
    for _ in range(2):
        optimizer.zero_grad()
        compiled(torch.randn(6, 3)).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            compiled(torch.randn(6, 3))
    assert not _debug_get_cache_entry_list(HookTap.__call__.__code__)
    assert {state["step"] for state in optimizer.state.values()} == {2}
