"""Ranks that hold different models: what they run, by themselves and in one process."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import neurms

__all__ = ["alone", "member", "some_train"]

ROWS = 6


def _model(number: int) -> nn.Module:
    torch.manual_seed(number)
    layers = (
        nn.Conv1d(2, 4, 3, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.Linear(5, 3),
    )
    return nn.Sequential(*layers).double()


def _data(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + number)
    # Members see signals of other sizes, so that a mean over all of them would show.
    return torch.randn(ROWS, 2, 5, dtype=torch.float64, generator=generator) * 10.0**number


def _trained(inner: nn.Module, model: nn.Module, data: Tensor, **settings: Any) -> list[Tensor]:
    kind = settings.pop("kind", "optimizer")
    if kind == "optimizer":
        optimizer: Any = neurms.NeuRMS(inner, lr=0.05, **{"variant": "U", **settings})
        scale = None
    else:
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.05)
        scale = neurms.GradientPreconditioner(inner, **{"variant": "U", **settings})
    for _ in range(3):
        optimizer.zero_grad()
        model(data).square().mean().backward()
        if scale is not None:
            scale.precondition_(optimizer)
        optimizer.step()
    return [parameter.detach() for parameter in inner.parameters()]


def alone(number: int, **settings: Any) -> list[Tensor]:
    """Train one member in one process, on all of its rows."""
    inner = _model(number)
    return _trained(inner, inner, _data(number), **settings)


def member(rank: int, ranks: int, **settings: Any) -> list[Tensor]:
    """Train an ensemble of two, each by half of the ranks."""
    size = ranks // 2
    groups = [torch.distributed.new_group(list(range(i * size, (i + 1) * size))) for i in (0, 1)]
    number = rank // size
    inner = _model(number)
    model = DistributedDataParallel(inner, process_group=groups[number])
    return _trained(inner, model, _data(number).chunk(size)[rank % size], **settings)


def some_train(rank: int, ranks: int, trains: tuple[int, ...], **settings: Any) -> Any:
    """Train on some ranks only, each a model of its own, and return what was warned of."""
    if rank not in trains:
        return None
    inner = _model(rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = _trained(inner, inner, _data(rank), **settings)
    return weights, [str(warning.message) for warning in caught]
