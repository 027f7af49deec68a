"""What each process of the distributed tests runs; imported afresh by spawned interpreters."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from neurms import NeuRMS
from neurms.core.ground.errors import NonFiniteError, UnsupportedTrainingError

STEPS = 4
ROWS = 8


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64)
    return x * (1 + step), torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)


def result(model: nn.Module, optimizer: NeuRMS) -> dict[str, Any]:
    return {
        "weights": [p.detach().clone() for p in model.parameters()],
        "state": [optimizer.state[p].get("v") for p in model.parameters()],
    }


def trained(settings: dict[str, Any], rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Train on this rank's share of every batch, in ``parts`` micro-batches.

    ``order`` is the order of rows that gives one process the micro-batches of all ranks together.
    """
    settings = dict(settings)
    parts, order = settings.pop("parts", 1), settings.pop("order", list(range(ROWS)))
    inner = network().double()
    optimizer = NeuRMS(inner, lr=0.05, momentum=0.5, **{"variant": "U", **settings})
    model: nn.Module = DistributedDataParallel(inner) if ranks > 1 else inner
    for step in range(STEPS):
        x, y = (t if ranks > 1 else t[order] for t in batch(step))
        x, y = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
        for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
            loss = (model(part_x) - part_y).square().mean() / parts
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return result(inner, optimizer)


def unequal(rank: int, ranks: int) -> dict[str, Any]:
    """Train where one rank does not use a branch, and has an empty batch in another layer."""
    model = network().double()
    branch = nn.Linear(5, 3).double()
    holder = nn.ModuleDict({"model": model, "branch": branch})
    optimizer = NeuRMS(holder, lr=0.05, process_group=dist.group.WORLD, variant="U")
    for step in range(2):
        x, y = batch(step)
        loss = (model(x) - y).square().mean()
        if rank == 0:
            loss = loss + (branch(x) - y).square().mean()
        loss.backward()
        for parameter in holder.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
    rules = {row.name: row.rule for row in optimizer.plan()}
    return {**result(holder, optimizer), "rules": rules}


def empty(rank: int, ranks: int) -> dict[str, Any]:
    """Train B where one rank has no rows: nobody waits for ever."""
    model = network().double()
    optimizer = NeuRMS(
        model, lr=0.05, variant="B", loss_reduction="sum", process_group=dist.group.WORLD
    )
    for step in range(2):
        x, y = (t if rank == 0 else t[:0] for t in batch(step))
        (model(x) - y).square().sum().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
    return result(model, optimizer)


def nonfinite(rank: int, ranks: int) -> dict[str, Any]:
    """Overflow one rank's statistics alone: all ranks refuse, and all go on."""
    model = network().double()
    optimizer = NeuRMS(model, lr=0.05, variant="F", process_group=dist.group.WORLD)
    before = result(model, optimizer)
    x, y = batch(0)
    (model(x) - y).square().mean().backward()
    if rank == 1:
        layer = next(iter(optimizer.layers))
        layer.pending.units = layer.pending.units * float("inf")
    try:
        optimizer.step()
    except NonFiniteError as error:
        raised = str(error)
    else:
        raised = ""
    after = result(model, optimizer)
    try:
        NeuRMS(network(), update="backward", variant="U")
    except UnsupportedTrainingError as error:
        refused = str(error)
    else:
        refused = ""
    unchanged = all(map(torch.equal, before["weights"], after["weights"]))
    return {"raised": raised, "unchanged": unchanged, "refused": refused}


def work(rank: int, ranks: int, folder: str, cases: dict[str, dict[str, Any]]) -> None:
    """Run every case and leave what came out in ``folder``."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=30)
    )
    try:
        found: dict[str, Any] = {
            name: trained(settings, rank, ranks) for name, settings in cases.items()
        }
        found["unequal"] = unequal(rank, ranks)
        found["empty"] = empty(rank, ranks)
        found["nonfinite"] = nonfinite(rank, ranks)
        torch.save(found, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()
