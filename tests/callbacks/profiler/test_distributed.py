"""Two gloo processes: statistics are those of the whole batch, on both ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import neurms
from neurms.callbacks.metrics import (
    ClippedFraction,
    FactorizationCorrelation,
    FactorizationError,
    RowDominance,
    SubspaceEnergy,
    UnitMoments,
)
from neurms.callbacks.profiler import profile
from tests.callbacks.profiler import truth

RANKS, STEPS = 2, 3


def batches(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(16, 12, generator=generator) * torch.linspace(0.2, 3, 12)
    return inputs, torch.randint(4, (16,), generator=generator)


def profiled(model: nn.Module, kind: str, rank: int, ranks: int) -> list[dict[str, Any]]:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(inner.parameters(), lr=1e-3)
    if kind == "neurms":
        optimizer = neurms.NeuRMS(inner, variant="F", beta=0.9, lr=1e-3)
    settings: dict[str, Any] = {"every_n_steps": 1, "warmup_steps": 0, "beta": 0.9}
    with profile(model, optimizer, **settings) as profiler:
        for step in range(STEPS):
            inputs, targets = batches(step)
            share = slice(rank * 16 // ranks, (rank + 1) * 16 // ranks)
            nn.functional.cross_entropy(model(inputs[share]), targets[share]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return profiler.samples


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    store = distributed.FileStore(f"{folder}/store", RANKS)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    found = {"samples": trained(rank), "metrics": metrics(rank, RANKS)}
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def trained(rank: int) -> dict[str, Any]:
    # In a frame of their own: a DDP model that outlives its group may hang when it goes.
    return {
        kind: profiled(DistributedDataParallel(truth.mlp()), kind, rank, RANKS)
        for kind in ("adamw", "neurms")
    }


def metrics(rank: int, ranks: int) -> dict[str, Any]:
    """Every metric fed with this rank's share, over two updates."""
    rho, error, moments = FactorizationCorrelation(), FactorizationError(6, 5), UnitMoments(6)
    dominance, clipped, energy = RowDominance(), ClippedFraction(0.0, 1.0), SubspaceEnergy()
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        d, h = torch.randn(8, 6, generator=generator), torch.randn(8, 5, generator=generator)
        share = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
        rows = slice(rank * 6 // ranks, (rank + 1) * 6 // ranks)
        v, u = d.square().mean(0), h.square().mean(0)
        rho.update((d.T @ h)[rows], v[rows], u)
        error.update(d[share], h[share])
        moments.update(d[share])
        energy.update(d.T @ h, torch.eye(6)[:, :2])
        clipped.update(d[share])
        dominance.update(d.T @ h * (step + 1))
    return {
        "rho": rho.compute(),
        "error": error.compute(),
        "moments": moments.compute(),
        "energy": energy.compute(),
        "clipped": clipped.compute(),
        **dominance.compute(),
    }


@pytest.mark.distributed
def test_two_ranks_see_what_one_would(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
    for kind in ("adamw", "neurms"):
        alone = profiled(truth.mlp(), kind, 0, 1)
        for rank in ranks:
            for ours, expected in zip(rank["samples"][kind], alone, strict=True):
                for layer in ("0", "2", "4"):
                    a, b = ours["layers"][layer], expected["layers"][layer]
                    for key in ("rho", "rho_batch", "factorization_error", "rho_expected"):
                        assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), (layer, key)
                    for key in ("v", "u"):
                        assert a[key] == pytest.approx(b[key], rel=1e-4)
                    assert a["dominance"] == pytest.approx(b["dominance"], rel=1e-3)
                    assert (a["rows"], a["dead_units"]) == (b["rows"], b["dead_units"])
    expected = metrics(0, 1)
    for rank in ranks:
        for name, value in rank["metrics"].items():
            assert torch.allclose(value, expected[name], atol=1e-12), name
