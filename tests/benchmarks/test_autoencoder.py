from itertools import pairwise

import pytest
import torch

from benchmarks import autoencoder
from benchmarks.tables.autoencoder import finals


def test_loss_is_the_sum_over_pixels_of_an_image_s_cross_entropy() -> None:
    images = torch.rand(3, 784)
    model = autoencoder.network().double()
    images = images.double()
    shown = torch.sigmoid(model(images))
    expected = -(images * shown.log() + (1 - images) * (1 - shown).log()).sum(1).mean()
    torch.testing.assert_close(autoencoder.image_loss(model, images), expected)


def test_network_has_the_paper_s_layers() -> None:
    layers = [m for m in autoencoder.network() if isinstance(m, torch.nn.Linear)]
    sizes = [layers[0].in_features, *(layer.out_features for layer in layers)]
    assert sizes == [784, 1000, 500, 250, 30, 250, 500, 1000, 784]


def test_schedule_warms_up_then_falls_in_a_line() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    plan = autoencoder.schedule(optimizer, 40)
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        plan.step()
    assert rates[:3] == [0.5, 1.0, 1.0]
    falls = [a - b for a, b in pairwise(rates[2:])]
    assert falls == pytest.approx([1 / 38] * len(falls))


@pytest.mark.parametrize("name", autoencoder.METHODS)
def test_every_method_lowers_the_loss(name: str, monkeypatch) -> None:
    monkeypatch.setattr(autoencoder, "SIZES", (12, 8, 4, 8, 12))
    monkeypatch.setattr(autoencoder, "BATCH", 16)
    method = autoencoder.METHODS[name]
    images = torch.rand(32, 1).expand(32, 12).contiguous().round()
    losses = [
        autoencoder.train(
            lambda model: method.make(model, 1e-2), images, planned=60, steps=steps, seed=0
        )["loss"]
        for steps in (1, 40)
    ]
    assert losses[1] < 0.9 * losses[0]


def test_finals_are_each_method_s_runs_by_their_length() -> None:
    runs = {
        "Adam/search, 5 of 9 steps/lr 1": {"loss": 1.0, "steps": 5},
        "Adam/9 steps/lr 1/seed 0": {"loss": 0.5, "steps": 9},
        "Adam/3 steps/lr 2/seed 0": {"loss": 0.9, "steps": 3},
        "Other/9 steps/lr 1/seed 0": {"loss": None, "steps": 9},
    }
    found = finals({"runs": runs})
    assert list(found) == [3, 9]
    assert found[3] == {"Adam": [{"loss": 0.9, "steps": 3, "lr": "2"}]}
    assert found[9] == {"Adam": [{"loss": 0.5, "steps": 9, "lr": "1"}]}
