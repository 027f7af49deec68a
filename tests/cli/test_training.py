import logging
import warnings

import pytest
import torch
from torch.nn.functional import cross_entropy

from neurms.cli.data import Split
from neurms.cli.methods import Budget, Method, perceptron
from neurms.cli.training import Classifier, RhoRecorder, _batches, fit, quiet_lightning

BUDGET = Budget(epochs=3, batch=8, width=7, validation=0)
METHODS = (
    Method("SGD", "sgd", 0.1, {"momentum": 0.9}),
    Method("NeuRMS-B", "neurms", 0.02, {"variant": "B"}),
)


def split(count):
    labels = torch.randint(10, (count,))
    return Split(torch.randn(count, 5), labels)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.title)
def test_fit_is_the_plain_loop(method, monkeypatch) -> None:
    """Lightning and the probe of rho change nothing; the schedule moves once a step."""
    seen, reports, step = [], [], Classifier.training_step

    def spy(module, batch, index):
        seen.append((module.network, *batch))
        return step(module, batch, index)

    monkeypatch.setattr(Classifier, "training_step", spy)
    validation = split(40)
    outcome = fit(method, split(50), validation, BUDGET, 4, lambda *told: reports.append(told))

    torch.manual_seed(4)
    model = perceptron(5, BUDGET.width)
    optimizer = method.optimize(model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 18)
    for _, inputs, labels in seen:
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        schedule.step()
    for trained, truth in zip(seen[0][0].parameters(), model.parameters(), strict=True):
        assert torch.equal(trained, truth)
    hits = model(validation.inputs).argmax(1) == validation.labels
    assert outcome.accuracy == pytest.approx(float(hits.float().mean()))
    assert [step for step, _ in reports] == [*range(1, 19), 18]
    assert reports[-1][1] == outcome.accuracy


def test_methods_see_the_same_batches(monkeypatch) -> None:
    seen, step = [], Classifier.training_step

    def spy(module, batch, index):
        seen.append(batch[0])
        return step(module, batch, index)

    monkeypatch.setattr(Classifier, "training_step", spy)
    data = split(50)
    for method in METHODS:
        fit(method, data, data, BUDGET, 4)
    assert torch.equal(torch.cat(seen[:18]), torch.cat(seen[18:]))


def test_batches_are_whole_shuffled_and_repeatable() -> None:
    data = Split(torch.arange(20.0)[:, None], torch.arange(20))
    first, again = (_batches(data, 6, 0) for _ in range(2))
    epochs = [[labels.tolist() for _, labels in first] for _ in range(2)]
    assert [len(batch) for batch in epochs[0]] == [6, 6, 6]
    assert len({x for batch in epochs[0] for x in batch}) == 18
    assert epochs[0] != epochs[1]
    assert [labels.tolist() for _, labels in again] == epochs[0]
    assert [labels.tolist() for _, labels in _batches(data, 12)] == [
        list(range(12)),
        list(range(12, 20)),
    ]


def test_nothing_is_left_on_the_model_after_an_exception() -> None:
    class Module:
        network = perceptron(5, 4)

    recorder = RhoRecorder(10)
    recorder.setup(None, Module, "fit")
    assert any(module._forward_hooks for module in Module.network.modules())
    recorder.on_exception(None, Module, ValueError())
    assert not any(module._forward_hooks for module in Module.network.modules())


def test_means_pass_over_undefined_readings() -> None:
    recorder = RhoRecorder(10)
    recorder._readings = [{"a": 0.5}, {"a": float("nan")}, {"a": 0.7}]
    assert recorder.means() == {"a": pytest.approx(0.6)}


def test_quiet_lightning_restores_what_it_found() -> None:
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    with quiet_lightning():
        assert not logger.isEnabledFor(logging.WARNING)
        warnings.warn("The 'val_dataloader' does not have many workers", stacklevel=1)
    assert logger.level == before
    with pytest.warns(UserWarning, match="another matter"), quiet_lightning():
        warnings.warn("another matter", stacklevel=1)
