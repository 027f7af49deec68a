"""Trainings in which every matrix has an owner, beside those in which every rank does all."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import neurms
from neurms.core.ground.errors import NonFiniteError, UnsupportedTrainingError
from neurms.core.ground.shards import is_sharded, mesh_of
from neurms.core.optimizers import by_owner
from neurms.core.optimizers.recipe import Recipe
from neurms.core.structures.base import Transform
from tests.core.distributed import counting
from tests.core.distributed.trainings import Network, sharded, train, whole

FORMS = ("replicate", "owner")


def forms(rank: int, ranks: int, *, settings: dict[str, Any], **job: Any) -> dict[str, Any]:
    """Train once in each form."""
    return {
        form: train(rank, ranks, settings={**settings, "distribute": form}, **job) for form in FORMS
    }


class Tower(nn.Module):
    """Matrices of five shapes, under the rule all of them, and more than ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        sides = [(12, 24), (24, 24), (24, 24), (24, 40), (40, 24)] * 3 + [(24, 12)]
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for n, m in sides)


def factorization(shape: Any, *_: Any, **__: Any) -> int:
    """Return the operations of a factorization of n x n matrices: n^3, whatever its constant."""
    *batch, m, n = shape
    return math.prod(batch) * m * n * min(m, n)


FACTORIZATIONS = {
    operation: factorization
    for operation in (
        torch.ops.aten._linalg_eigh,
        torch.ops.aten.linalg_qr,
        torch.ops.aten._linalg_svd,
        torch.ops.aten.linalg_cholesky_ex,
        torch.ops.aten.linalg_inv_ex,
    )
}


def shares(
    rank: int, ranks: int, *, rule: str, settings: dict[str, Any], wrap: str
) -> dict[str, Any]:
    """Return this rank's bytes of state, and the operations of its steps: products and factors."""
    inner: nn.Module = Tower()
    if wrap == "fsdp":
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in inner.layers:
            fully_shard(layer, mesh=mesh)
        inner = fully_shard(inner, mesh=mesh)
    model = DistributedDataParallel(inner) if wrap == "ddp" else inner
    optimizer = neurms.create(rule, inner, head="rule", **settings)
    counter = FlopCounterMode(display=False, custom_mapping=FACTORIZATIONS)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        for parameter in inner.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            if is_sharded(parameter):
                place = mesh_of(parameter), parameter.placements
                gradient = distribute_tensor(gradient, *place, src_data_rank=None)
            parameter.grad = gradient
        with counter:
            optimizer.step()
    del model
    more = {"process_group": torch.distributed.group.WORLD} if wrap == "ddp" else {}
    report = neurms.memory_report(inner, rule, head="rule", **settings, **more)
    return {
        "reported": report.state_bytes,
        "bytes": optimizer.state_bytes(),
        "planned": optimizer.plan().state_bytes,
        "operations": counter.get_total_flops(),
        "reasons": [row.reason for row in optimizer.plan()],
    }


@contextmanager
def small_rounds() -> Iterator[None]:
    """Rounds of one matrix of each owner."""
    before, by_owner.ROUND_LIMIT = by_owner.ROUND_LIMIT, 1
    try:
        yield
    finally:
        by_owner.ROUND_LIMIT = before


def in_small_rounds(rank: int, ranks: int, **job: Any) -> dict[str, Any]:
    """Train once in each form."""
    with small_rounds():
        return forms(rank, ranks, **job)


def sent_in_small_rounds(rank: int, ranks: int, **job: Any) -> dict[str, Any]:
    """Return the calls of a step."""
    with small_rounds():
        return counting.calls(rank, ranks, **job)


def _replicas(**settings: Any) -> tuple[nn.Module, Any]:
    """Return a model that nothing wraps, and its optimizer."""
    model = Network().double()
    group = torch.distributed.group.WORLD
    return model, neurms.SOAP(model, distribute="owner", process_group=group, **settings)


def _gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def odd_gradients(rank: int, ranks: int) -> dict[str, Any]:
    """Step on gradients that one rank lacks, or that are bad where their owner is."""
    model, optimizer = _replicas()
    _gradients(model, 0)
    optimizer.step()
    found: dict[str, Any] = {}
    for name in ("conv.weight", "up.weight", "down.weight"):
        weight = model.get_parameter(name)
        owner = optimizer.sharing.owner_of(weight)
        _gradients(model, 1)
        before = weight.detach().clone()
        # Whoever is not the owner is not asked.
        weight.grad = weight.grad if rank == owner else None
        optimizer.step()
        found[name] = not torch.equal(before, weight)
        before = weight.detach().clone()
        _gradients(model, 2)
        weight.grad = None if rank == owner else weight.grad
        optimizer.step()
        found[f"{name} without its owner"] = torch.equal(before, weight)
        _gradients(model, 3)
        if rank == owner:
            weight.grad[0, 0] = float("nan")
        before = [p.detach().clone() for p in model.parameters()]
        try:
            optimizer.step()
        except NonFiniteError as error:
            found[f"{name} is bad"] = f"'{name}'" in str(error)
        found[f"{name} is bad for all"] = all(map(torch.equal, before, model.parameters()))
    steps = {s["step"] for p, s in optimizer.state.items() if p.ndim == 2}
    return {"found": found, "steps": steps, "weights": [p.detach() for p in model.parameters()]}


def skipped(rank: int, ranks: int) -> int:
    """Return how many steps are left out, of which one is bad at one owner."""
    model, optimizer = _replicas(nonfinite="skip")
    for step in range(3):
        _gradients(model, step)
        if step == 1 and optimizer.sharing.owner_of(model.up.weight) == rank:
            model.up.weight.grad.fill_(float("inf"))
        optimizer.step()
    return int(optimizer.skipped_steps)


class Breaks(neurms.SOAP):
    """Fails as LAPACK does where a factorization does not converge, on the owner of one shape."""

    rule = "breaks"

    @classmethod
    def recipe(cls, settings: Any) -> Any:
        return Recipe((Broken(),))


@dataclass(frozen=True)
class Broken(Transform):
    def __call__(self, update: Tensor, state: Any, context: Any) -> Tensor:
        if update.shape[-1] == 12:
            raise torch.linalg.LinAlgError("did not converge")
        return update


def broken(rank: int, ranks: int, *, wrap: str) -> str:
    """Return what a rank raises when an owner cannot go on."""
    model: nn.Module = Network().double()
    if wrap == "fsdp":
        model = sharded(model, ranks)
    group = torch.distributed.group.WORLD
    optimizer = Breaks(model, distribute="owner", process_group=group)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except NonFiniteError as error:
        return str(error)
    return ""


def changes(rank: int, ranks: int) -> dict[str, Any]:
    """Copy an optimizer, freeze and add parameters, load a state before anybody is known."""
    model, optimizer = _replicas()
    model.down.weight.requires_grad_(False)
    for step in range(2):
        _gradients(model, step)
        model.down.weight.grad = None
        optimizer.step()
    owners = {row.name: row.reason for row in optimizer.plan()}
    model.down.weight.requires_grad_(True)
    later = nn.Parameter(torch.ones(9, 4, dtype=torch.float64))
    optimizer.add_param_group({"params": [("later", later)]})
    _gradients(model, 2)
    later.grad = torch.randn(9, 4, generator=torch.Generator().manual_seed(9)).double()
    optimizer.step()
    after = {row.name: row.reason for row in optimizer.plan()}
    twin_model, twin = copy.deepcopy((model, optimizer))
    # Process groups are not copied; DistributedDataParallel shows its own.
    wrapped = DistributedDataParallel(twin_model)
    for own, its in ((model, optimizer), (twin_model, twin)):
        _gradients(own, 3)
        its.param_groups[1]["params"][0].grad = None
        its.step()
    del wrapped
    same = all(map(torch.equal, model.parameters(), twin_model.parameters()))
    saved = optimizer.state_dict()
    _, fresh = _replicas()
    fresh.add_param_group({"params": [("later", later.detach().clone().requires_grad_())]})
    fresh.load_state_dict(saved)
    return {
        "before": owners,
        "after": after,
        "twin": same,
        "bytes": (optimizer.state_bytes(), fresh.state_bytes()),
        "again": whole_states(fresh) == whole_states(optimizer),
    }


def whole_states(optimizer: Any) -> list[Any]:
    """Return all states as lists, for comparison."""
    states = optimizer.state_dict()["state"]
    return [
        {k: whole(v).tolist() if isinstance(v, Tensor) else v for k, v in states[i].items()}
        for i in sorted(states)
    ]


def refusals(rank: int, ranks: int) -> list[str]:
    """Return the messages of what cannot be divided."""
    parts = sharded(Network(), ranks)
    mesh = init_device_mesh("cpu", (1, ranks))
    twice = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)]))
    unknown = neurms.SOAP([nn.Parameter(torch.ones(4, 4))], distribute="owner")
    unknown.param_groups[0]["params"][0].grad = torch.ones(4, 4)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    tries: list[Any] = [
        lambda: neurms.SOAP(parts, distribute="rows"),
        lambda: neurms.SOAP([twice], distribute="owner"),
        unknown.step,
        lambda: neurms.NeuRMS(plain, distribute="owner"),
        lambda: neurms.RMNP(plain, distribute="owner", update="backward", nesterov=False),
        lambda: neurms.JoinableOptimizer(
            neurms.SOAP(plain, distribute="owner"), DistributedDataParallel(plain)
        ),
    ]
    messages = []
    for attempt in tries:
        try:
            attempt()
        except UnsupportedTrainingError as error:
            messages.append(str(error))
    return messages
