"""Trainings on meshes of two axes: tensor parallelism beside data parallelism."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import neurms
from neurms.core.ground.errors import UnsupportedTrainingError
from neurms.core.ground.shards import local
from tests.core.distributed.trainings import result

STEPS, ROWS = 4, 8


class Pair(nn.Module):
    """Layers that tensor parallelism cuts by units and by features, and one that it leaves."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up = nn.Linear(8, hidden)
        self.down = nn.Linear(hidden, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))
        return out


def cut(model: nn.Module, parts: int, shards: int) -> tuple[int, int]:
    """Cut a model over a mesh; return this rank's place among those with other rows of a batch."""
    mesh = init_device_mesh("cpu", (shards, parts), mesh_dim_names=("data", "model"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh["model"], plan)
    if shards > 1:
        for layer in model.children():
            fully_shard(layer, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    return mesh.get_local_rank("data"), shards


def steps(model: nn.Module, optimizer: Any, place: int, places: int) -> None:
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x, y = (
            torch.randn(ROWS, n, generator=generator, dtype=torch.float64).chunk(places)[place]
            for n in (8, 3)
        )
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def train(
    rank: int = 0,
    ranks: int = 1,
    *,
    rule: str,
    settings: dict[str, Any],
    parts: int = 2,
    hidden: int = 12,
) -> dict[str, Any]:
    """Train with tensors cut in ``parts`` and batches by the rest of the ranks."""
    model = Pair(hidden).double()
    place = (0, 1)
    with warnings.catch_warnings():
        # torch's, of two gathers where one would do.
        warnings.simplefilter("ignore")
        if ranks > 1:
            place = cut(model, parts, ranks // parts)
        optimizer = neurms.create(rule, model, lr=0.05, **settings)
        steps(model, optimizer, *place)
        states = [optimizer.state[p] for p in model.parameters()]
        lengths = [
            {k: len(local(v)) for k, v in state.items() if isinstance(v, Tensor) and v.ndim}
            for state in states
        ]
        return {**result(model, optimizer), "state_rows": lengths}


def refused(rank: int, ranks: int, *, variant: str, alone: bool) -> str:
    """Return what a variant that reads layers says of a model cut by units, or by features, too."""
    model = Pair(12).double()
    mesh = init_device_mesh("cpu", (ranks,))
    plan: dict[str, Any] = {"up": ColwiseParallel(output_layouts=Replicate())}
    if not alone:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    before = [p.detach().clone() for p in model.parameters()]
    try:
        optimizer = neurms.NeuRMS(model, variant=variant)
        steps(model, optimizer, 0, 1)
    except UnsupportedTrainingError as error:
        same = all(bool((a == b).all()) for a, b in zip(before, model.parameters(), strict=True))
        return f"{error}; unchanged: {same}"
    return ""


class Stage(nn.Module):
    """A stage of a pipeline: layers of its own sizes."""

    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.layers = nn.Sequential(nn.Linear(4 + number, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def stage(rank: int = 0, ranks: int = 1, *, number: int = -1, variant: str = "U") -> list[Tensor]:
    """Train a stage of its own on each half of the ranks, its statistics over that half alone.

    As in a pipeline gradients come from elsewhere; here each stage has a loss of its own, and the
    other half's signals are a hundred times as large.
    """
    places = max(ranks // 2, 1)
    own = number if ranks == 1 else rank // places
    group = None
    if ranks > 1:
        groups = [torch.distributed.new_group([i * places, i * places + 1]) for i in (0, 1)]
        group = groups[own]
    model = Stage(own).double()
    optimizer = neurms.NeuRMS(model, lr=0.05, variant=variant, process_group=group)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(10 * step + own)
        x = 100.0**own * torch.randn(ROWS, 4 + own, generator=generator, dtype=torch.float64)
        model(x.chunk(places)[rank % places]).square().mean().backward()
        if ranks > 1:
            # Averaged as a pipeline's schedule does it, without DistributedDataParallel.
            for parameter in model.parameters():
                assert parameter.grad is not None
                torch.distributed.all_reduce(parameter.grad.div_(places), group=group)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]
