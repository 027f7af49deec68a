"""Small trainings that every number of ranks must bring to the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import neurms
from neurms.core.ground.errors import NonFiniteError, UnsupportedTrainingError
from neurms.core.ground.shards import is_sharded, local

ROWS = 8
STEPS = 4
NEEDS: dict[str, dict[str, Any]] = {
    "galore": {"rank": 3},
    "fira": {"rank": 3},
    "apollo": {"rank": 3},
    "low_rank_soap": {"rank": 3, "leading": 1},
    "shared_basis": {"lr": 0.01},
}


class Network(nn.Module):
    """Sides that no number of ranks divides, and fewer rows than ranks in the last layer."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv1d(4, 6, 2, groups=2)
        self.up = nn.Linear(12, width)
        self.down = nn.Linear(width, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x)).flatten(1)
        h = torch.tanh(self.down(torch.tanh(self.up(h))))
        out: Tensor = self.head(h)
        return out


def batch(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 4, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(ROWS, 3, generator=generator, dtype=torch.float64)
    return (x * (1 + step)).to(dtype), y.to(dtype)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if is_sharded(tensor) else tensor).detach().clone()


def whole_state(model: nn.Module, optimizer: Any) -> list[dict[str, Any]]:
    """Return each parameter's state, put together of what all ranks hold."""
    places = [id(p) for group in optimizer.param_groups for p in group["params"]]
    held = optimizer.state_dict()["state"]
    own = [held.get(places.index(id(p)), {}) for p in model.parameters()]
    return [{k: whole(v) if isinstance(v, Tensor) else v for k, v in s.items()} for s in own]


def result(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    return {
        "weights": [whole(p) for p in model.parameters()],
        "state": whole_state(model, optimizer),
        "local_bytes": optimizer.state_bytes(),
        "planned_bytes": optimizer.plan().state_bytes,
        "reasons": [row.reason for row in optimizer.plan()],
        "local_sizes": [local(p).numel() for p in model.parameters()],
    }


def sharded(model: nn.Module, ranks: int, replicas: int = 0, reshard: bool = True) -> nn.Module:
    """Shard each layer and the rest, on a one-axis mesh or on (replicas, shards)."""
    if replicas:
        shape = (replicas, ranks // replicas)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (ranks,))
    for layer in model.children():
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(model, mesh=mesh)


def train(
    rank: int = 0,
    ranks: int = 1,
    *,
    rule: str,
    settings: dict[str, Any] | None = None,
    wrap: str = "none",
    dtype: str = "float64",
    width: int = 7,
    parts: int = 1,
    steps: int = STEPS,
) -> dict[str, Any]:
    """Train on this rank's share of each batch; ``wrap`` is none, ddp, fsdp or hsdp."""
    precision = getattr(torch, dtype)
    inner = Network(width).to(precision)
    model: nn.Module = inner
    if wrap == "ddp":
        model = DistributedDataParallel(inner)
    elif wrap in ("fsdp", "hsdp"):
        model = inner = sharded(inner, ranks, 2 if wrap == "hsdp" else 0)
    optimizer = neurms.create(rule, inner, **(settings or {}))
    for step in range(steps):
        x, y = batch(step, precision)
        x, y = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
        for x_part, y_part in zip(x.chunk(parts), y.chunk(parts), strict=True):
            ((model(x_part) - y_part).square().mean() / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    return result(inner, optimizer)


def no_sync(rank: int, ranks: int, *, rule: str, settings: dict[str, Any], views: bool) -> Any:
    """Train in two micro-batches, of which DDP exchanges the second alone."""
    inner = Network().double()
    model = DistributedDataParallel(inner, gradient_as_bucket_view=views)
    optimizer = neurms.create(rule, inner, **settings)
    for step in range(STEPS):
        x, y = (t.chunk(ranks)[rank].chunk(2) for t in batch(step, torch.float64))
        with model.no_sync():
            ((model(x[0]) - y[0]).square().mean() / 2).backward()
        ((model(x[1]) - y[1]).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return result(inner, optimizer)


class Branches(nn.Module):
    """A layer for each rank, of which a rank uses its own alone, and one for all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.arms = nn.ModuleList(nn.Linear(12, 6) for _ in range(2))
        self.rest = nn.Linear(6, 3)

    def forward(self, x: Tensor, arm: int) -> Tensor:
        out: Tensor = self.rest(torch.tanh(self.arms[arm](x.flatten(1))))
        return out


def branches(rank: int, ranks: int, *, rule: str, settings: dict[str, Any]) -> Any:
    """Train with ``find_unused_parameters``: each half of a batch goes through its own arm."""
    inner = Branches().double()
    model: nn.Module = inner
    if ranks > 1:
        model = DistributedDataParallel(inner, find_unused_parameters=True)
    optimizer = neurms.create(rule, inner, head="rule", **settings)
    for step in range(STEPS):
        x, y = (t.chunk(2) for t in batch(step, torch.float64))
        for arm in range(2) if ranks == 1 else [rank]:
            loss = (model(x[arm], arm) - y[arm]).square().mean()
            (loss / (2 if ranks == 1 else 1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return result(inner, optimizer)


def half_empty(rank: int, ranks: int, *, rule: str, settings: dict[str, Any]) -> Any:
    """Train on sums of losses where the second rank has no rows in odd steps."""
    inner = Network().double()
    model: nn.Module = DistributedDataParallel(inner) if ranks > 1 else inner
    optimizer = neurms.create(rule, inner, **settings)
    for step in range(STEPS):
        x, y = batch(step, torch.float64)
        if ranks > 1:
            cut = ROWS if step % 2 else ROWS // 2
            x, y = (x[:cut], y[:cut]) if rank == 0 else (x[cut:], y[cut:])
        # DDP averages over ranks what is meant as a sum.
        ((model(x) - y).square().sum() / 100).backward()
        if ranks > 1:
            for parameter in inner.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(ranks)
        optimizer.step()
        optimizer.zero_grad()
    return result(inner, optimizer)


def bad_on_one_rank(rank: int, ranks: int, *, rule: str) -> dict[str, Any]:
    """Put a NaN into the rows of one rank, then go on with a good gradient."""
    model = sharded(Network().double(), ranks)
    optimizer = neurms.create(rule, model)
    x, y = (t.chunk(ranks)[rank] for t in batch(0, torch.float64))
    (model(x) - y).square().mean().backward()
    before = [whole(p) for p in model.parameters()]
    gradient = local(model.up.weight.grad)
    if rank == 1:
        gradient[0, 0] = float("nan")
    raised = ""
    try:
        optimizer.step()
    except NonFiniteError as error:
        raised = str(error)
    unchanged = all(map(torch.equal, before, [whole(p) for p in model.parameters()]))
    gradient.nan_to_num_()
    optimizer.step()
    moved = not torch.equal(before[2], whole(model.up.weight))
    return {"raised": raised, "unchanged": unchanged, "went_on": moved}


def cut_by_features(rank: int, ranks: int) -> dict[str, Any]:
    """Step RACS and Alice on a weight with Shard(1), and offer it to NeuRMS."""
    mesh = init_device_mesh("cpu", (ranks,))
    same = []
    for name in ("racs", "alice", "rmnp"):
        weights = []
        for cut in (False, True):
            torch.manual_seed(3)
            start, gradient = torch.randn(5, 3), torch.randn(5, 3)
            if cut:
                start, gradient = (
                    distribute_tensor(t, mesh, [Shard(1)]) for t in (start, gradient)
                )
            weight = nn.Parameter(start)
            optimizer = neurms.create(name, [weight])
            for _ in range(2):
                weight.grad = gradient
                optimizer.step()
            weights.append(whole(weight))
        same.append(torch.equal(*weights))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(1)]))
    refused = ""
    try:
        neurms.NeuRMS(model, variant="U")
    except UnsupportedTrainingError as error:
        refused = str(error)
    return {"same": all(same), "refused": refused}
