import pytest
import torch
from torch import Tensor, nn

from neurms.core.taps.accumulation import OUTSIDE_BACKWARD, destination, graph_task, is_ordinary


def asked(layer: nn.Linear, x: Tensor, answers: list[str]) -> Tensor:
    output = layer(x)
    output.register_hook(lambda errors: answers.append(destination(layer.weight)))
    return output.sum()


def test_destination_follows_the_backward_pass() -> None:
    layer, x = nn.Linear(3, 2), torch.ones(5, 3, requires_grad=True)
    answers: list[str] = []
    asked(layer, x, answers).backward()
    asked(layer, x, answers).backward(inputs=[layer.weight])
    asked(layer, x, answers).backward(inputs=[x])
    torch.autograd.grad(asked(layer, x, answers), x)
    torch.autograd.grad(asked(layer, x, answers), [x, layer.weight])
    loss = asked(layer, x, answers)
    layer.weight.requires_grad_(False)
    loss.backward()
    assert answers == ["grad", "grad", "nowhere", "nowhere", "captured", "nowhere"]


def test_graph_task_exists_inside_backward_only() -> None:
    x = torch.ones(2, requires_grad=True)
    tasks: list[int] = []
    y = x * 2
    y.register_hook(lambda gradient: tasks.append(graph_task()))
    y.sum().backward()
    assert graph_task() == OUTSIDE_BACKWARD != tasks[0]


@pytest.mark.parametrize("odd", [None, 3.0, torch.zeros(2, device="meta")])
def test_what_holds_no_numbers_is_not_ordinary(odd: object) -> None:
    assert not is_ordinary(odd)
    assert is_ordinary(torch.zeros(2))
    with torch._subclasses.FakeTensorMode():
        assert not is_ordinary(torch.zeros(2))
    seen: list[bool] = []
    torch.vmap(lambda row: seen.append(is_ordinary(row)) or row)(torch.zeros(2, 2))
    assert seen == [False]
