"""Trainings in which every matrix has an owner, beside those in which every rank does all."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import neurms
from neurms.core.ground.shards import is_sharded, mesh_of
from tests.core.distributed.trainings import train

FORMS = ("replicate", "owner")


def forms(rank: int, ranks: int, *, settings: dict[str, Any], **job: Any) -> dict[str, Any]:
    """Train once in each form."""
    return {
        form: train(rank, ranks, settings={**settings, "distribute": form}, **job) for form in FORMS
    }


class Tower(nn.Module):
    """Matrices of three shapes, under the rule all of them, and more than ranks."""

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
    return {
        "bytes": optimizer.state_bytes(),
        "planned": optimizer.plan().state_bytes,
        "operations": counter.get_total_flops(),
        "owners": [row.reason for row in optimizer.plan()],
    }
