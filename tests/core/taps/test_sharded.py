"""Taps on models that torch.distributed wraps, in one process with one rank."""

from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn

from tests.core.taps.recording import close, tap, truth

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="needs gloo"
)

X = torch.linspace(-1, 1, 15).reshape(5, 3)


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def cubes(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).pow(3).mean()


def test_fully_sharded_parameters() -> None:
    from torch.distributed.fsdp import fully_shard

    model = network()
    errors, inputs = truth(model, "0", cubes, X)
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    _, recorder = tap(model[0])
    x = X.clone().requires_grad_()
    torch.autograd.grad(cubes(model, x), x)
    assert recorder.received == []
    cubes(model, X).backward()
    close(recorder.units, errors.square().sum(0))
    close(recorder.features, inputs.square().sum(0))


def test_data_parallel() -> None:
    model = network()
    errors, _ = truth(model, "0", cubes, X)
    _, recorder = tap(model[0])
    wrapped = nn.parallel.DistributedDataParallel(model)
    cubes(wrapped, X).backward()
    close(recorder.units, errors.square().sum(0))
    assert recorder.rows == 5
