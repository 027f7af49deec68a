import pytest
import torch

import neurms
from benchmarks.vision import CHANCE, METHODS, batches, perceptron, schedule, train
from neurms.cli.data import Split


@pytest.fixture(scope="module")
def data() -> Split:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (600,), generator=generator)
    inputs = torch.eye(10)[labels] + 0.1 * torch.randn(600, 10, generator=generator)
    return Split(inputs, labels)


def run(data: Split, name: str, lr: float, steps: int = 120, seed: int = 0) -> dict:
    method = METHODS[name]
    return train(
        lambda: perceptron((10, 16, 10)),
        lambda model: method.make(model, lr),
        data,
        data,
        steps=steps,
        batch=64,
        seed=seed,
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(name: str, data: Split) -> None:
    lr = max(METHODS[name].lr, 0.03)
    found = run(data, name, lr)
    assert found["accuracy"] > 0.5, found
    assert found["steps"] == 120


def test_a_seed_fixes_the_run(data: Split) -> None:
    assert run(data, "AdamW", 0.01) == run(data, "AdamW", 0.01)
    assert run(data, "AdamW", 0.01) != run(data, "AdamW", 0.01, seed=1)


@pytest.mark.parametrize("name", ["SGD", "NeuRMS-U"])
def test_divergence_is_chance(name: str, data: Split) -> None:
    found = run(data, name, 1e30)
    assert (found["accuracy"], found["loss"]) == (CHANCE, None)


def test_schedule_rises_then_falls_to_zero() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    plan = schedule(optimizer, 20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        plan.step()
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_batches_cover_an_epoch_then_shuffle_anew() -> None:
    order = batches(7, 2, torch.Generator().manual_seed(0))
    epochs = [torch.cat([next(order) for _ in range(3)]) for _ in range(2)]
    assert all(len(epoch.unique()) == 6 for epoch in epochs)
    assert not torch.equal(*epochs)


def test_neurms_is_made_with_its_settings() -> None:
    optimizer = METHODS["NeuRMS-F-momentum"].make(perceptron((4, 8, 2)), 0.1)
    assert isinstance(optimizer, neurms.NeuRMS)
    assert optimizer.defaults["momentum"] == 0.9
    optimizer.detach()
