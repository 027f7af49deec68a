"""Ranks that run out of batches at different times, and models that are wrapped."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import neurms
from neurms.core.ground.errors import UnsupportedTrainingError
from tests.core.distributed.trainings import Network, batch, result


def uneven(
    rank: int, ranks: int, *, rule: str, settings: dict[str, Any], accumulate: bool = False
) -> Any:
    """Train in an epoch of 2 steps on the first rank and 4 on the second, then 2 even ones."""
    inner = Network().double()
    model = DistributedDataParallel(inner)
    optimizer = neurms.create(rule, inner, **settings)

    def step(number: int) -> None:
        x, y = (t.chunk(ranks)[rank] for t in batch(number, torch.float64))
        if accumulate:
            with model.no_sync():
                (model(x) - y).square().mean().backward()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    with Join([model, neurms.JoinableOptimizer(optimizer, model)]):
        for number in range(2 + 2 * rank):
            step(number)
    after_epoch = result(inner, optimizer)
    # Both again, from equal weights and, one hopes, equal statistics.
    for number in range(4, 6):
        step(number)
    return {"epoch": after_epoch, "end": result(inner, optimizer)}


def by_hand(ranks: int, *, rule: str, settings: dict[str, Any]) -> Any:
    """What :func:`uneven` amounts to on one process: missing halves count as loss zero."""
    model = Network().double()
    optimizer = neurms.create(rule, model, **settings)
    for number in range(6):
        x, y = (t.chunk(ranks) for t in batch(number, torch.float64))
        halves = [1] if number in (2, 3) else [0, 1]
        for half in halves:
            ((model(x[half]) - y[half]).square().mean() / ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
    return result(model, optimizer)


def refused(rank: int, ranks: int) -> list[str]:
    """Return the messages of refusals: variant B in a Join, a model under FSDP1."""
    messages = []
    model = DistributedDataParallel(Network())
    try:
        neurms.JoinableOptimizer(neurms.NeuRMS(model, variant="B"), model)
    except UnsupportedTrainingError as error:
        messages.append(str(error))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.distributed.fsdp import FullyShardedDataParallel

        # Made without its __init__, which needs an accelerator.
        inside = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
        nn.Module.__init__(inside)
        inside.module = nn.Linear(4, 4)
        flat = nn.Sequential(inside)
        for make in (neurms.RACS, neurms.NeuRMS):
            try:
                make(flat)
            except UnsupportedTrainingError as error:
                messages.append(str(error))
    return messages


def names(rank: int, ranks: int) -> list[list[str]]:
    """Return the plan's names for a model and for the same model under DDP."""
    model = Network()
    wrapped = DistributedDataParallel(model)
    return [
        [row.name for row in neurms.Alice(m, rank=2, leading=1).plan()] for m in (model, wrapped)
    ]
