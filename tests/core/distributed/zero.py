"""Trainings under torch's ZeroRedundancyOptimizer, and what its state is good for."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import neurms
from neurms.core.optimizers.registry import optimizer_class
from tests.core.distributed.trainings import STEPS, Network, batch


def replicas(start: nn.Module | None = None) -> DistributedDataParallel:
    inner = Network().double() if start is None else copy.deepcopy(start)
    return DistributedDataParallel(inner)


def divided(model: nn.Module, rule: str, settings: dict[str, Any], **options: Any) -> Any:
    """Return the rule inside of ZeroRedundancyOptimizer."""
    return ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=optimizer_class(rule), **settings, **options
    )


def train(model: nn.Module, optimizer: Any, rank: int, steps: range) -> None:
    for step in steps:
        x, y = (t.chunk(dist.get_world_size())[rank] for t in batch(step, torch.float64))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def beside_itself(
    rank: int, ranks: int, *, rule: str, settings: dict[str, Any], views: bool = False
) -> dict[str, Any]:
    """Train by the rule in parts and by the rule alone, under one schedule."""
    found = {}
    for name in ("parts", "alone"):
        model = replicas()
        if name == "parts":
            optimizer = divided(model, rule, settings, parameters_as_bucket_view=views)
        else:
            optimizer = neurms.create(rule, list(model.parameters()), **settings)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(STEPS):
            train(model, optimizer, rank, range(step, step + 1))
            schedule.step()
        found[name] = weights(model)
    return found


def handed_over(rank: int, ranks: int, *, rule: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Go on as it was, by the rule alone from the parts' state, and by parts from that one's."""
    model = replicas()
    optimizer = divided(model, rule, settings)
    train(model, optimizer, rank, range(STEPS))
    optimizer.consolidate_state_dict(to=0)
    held: list[Any] = [copy.deepcopy(optimizer.state_dict()) if rank == 0 else None]
    dist.broadcast_object_list(held, src=0)
    single = replicas(model.module)
    alone = neurms.create(rule, list(single.parameters()), **settings)
    alone.load_state_dict(copy.deepcopy(held[0]))
    # What receives a state may have trained before.
    again = replicas()
    parts = divided(again, rule, settings)
    train(again, parts, rank, range(90, 91))
    with torch.no_grad():
        for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    parts.load_state_dict(copy.deepcopy(alone.state_dict()))
    for trained, by in ((model, optimizer), (single, alone), (again, parts)):
        train(trained, by, rank, range(STEPS, 2 * STEPS))
    return {"as it was": weights(model), "alone": weights(single), "parts": weights(again)}


def refused(rank: int, ranks: int, *, settings: dict[str, Any], named: bool = False) -> str:
    """Return what NeuRMS says of parameters alone, or of names for other parameters."""
    model = Network()
    params: Any = list(model.parameters())
    if named:
        params = [{"params": params, "param_names": [n for n, _ in model.named_parameters()]}]
    try:
        ZeroRedundancyOptimizer(params, optimizer_class=neurms.NeuRMS, **settings)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""
