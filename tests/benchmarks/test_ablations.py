import pytest
import torch

import neurms
from benchmarks import ablations
from benchmarks.vision import METHODS, perceptron
from neurms.cli.data import Split


@pytest.mark.parametrize("name", ablations.ROWS)
def test_every_row_makes_an_optimizer(name: str) -> None:
    optimizer = ablations.ROWS[name].make(perceptron((4, 8, 2)), 1e-3)
    if isinstance(optimizer, neurms.NeuRMS):
        optimizer.detach()


def test_rho_is_read_in_every_layer(monkeypatch) -> None:
    monkeypatch.setattr(ablations, "SIZES", (6, 8, 3))
    data = Split(torch.randn(300, 6), torch.randint(3, (300,)))
    found = ablations.rho(METHODS["AdamW"], 1e-3, data, 60)
    assert found["every"] == 30
    assert set(found["rho"]) == {"0", "2"}
    for values in found["rho"].values():
        assert len(values) == 2
        assert all(-1 <= value <= 1 for value in values)
