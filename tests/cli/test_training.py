import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from neurms.cli.methods import Method
from neurms.cli.tasks import CURVE, Task
from neurms.cli.training import fit

METHODS = (
    Method("SGD", "sgd", 0.1, {"momentum": 0.9}),
    Method("NeuRMS-B", "neurms", 0.02, {"variant": "B"}),
)


class Small(Task):
    """Ten random batches, seen in order."""

    figure = "accuracy"
    steps, warmup = 24, 0.0

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(60, 5, generator=generator)
        self.labels = torch.randint(3, (60,), generator=generator)
        self.seen: list[torch.Tensor] = []

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))

    def loss(self, model, generator):
        index = torch.randint(60, (8,), generator=generator)
        self.seen.append(index)
        return cross_entropy(model(self.inputs[index]), self.labels[index])

    def judged(self, model, part):
        return float(cross_entropy(model(self.inputs), self.labels).detach())


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.title)
def test_fit_is_a_plain_loop_with_torch_s_own_cosine(method) -> None:
    task, reports = Small(), []
    outcome = fit(method.optimize, task, 4, lambda *told: reports.append(told))

    model = task.model(4)
    optimizer = method.optimize(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)
    for index in task.seen:
        optimizer.zero_grad()
        cross_entropy(model(task.inputs[index]), task.labels[index]).backward()
        optimizer.step()
        schedule.step()
    assert outcome.figure == pytest.approx(task.judged(model, "test"), rel=1e-5)
    assert [step for step, _ in outcome.curve] == list(range(2, 25, 2))
    assert len(outcome.curve) == CURVE
    assert outcome.curve[-1][1] == pytest.approx(outcome.figure)
    assert [step for step, _ in reports] == list(range(1, 25))
    assert outcome.state_bytes > 0


def test_methods_see_the_same_batches() -> None:
    task = Small()
    for method in METHODS:
        fit(method.optimize, task, 4)
    assert torch.equal(torch.cat(task.seen[:24]), torch.cat(task.seen[24:]))


def test_a_run_that_diverges_has_no_figure_and_a_curve_up_to_there() -> None:
    outcome = fit(Method("SGD", "sgd", 1e12).optimize, Small(), 0)
    assert math.isnan(outcome.figure)
    assert len(outcome.curve) < CURVE
