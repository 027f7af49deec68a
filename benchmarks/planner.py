"""State and step cost by model size, rule and number of ranks: the data of the site's planner.

    neurms bench planner --rates        # nanoseconds of each rule for one element of a matrix
    neurms bench planner --predict      # bytes and work, by plan() on parameters without storage

What ``benchmarks.scale`` computes for 64 ranks, for the rules and ranks that one may choose on the
page. Float32; under FSDP2 (``fully_shard``) each rank holds what belongs to its rows, or that of
the matrices that it owns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import neurms
from benchmarks.harness import RESULTS, Results
from benchmarks.interleaved import interleaved, shown
from benchmarks.scale import MATRIX, SIZES, Size, cost, llama, stepping, work

SHAPES = {"19M": Size(256, 4, 4, 688)} | {
    name: SIZES[name] for name in ("60M", "130M", "350M", "1.3B", "7B")
}
RANKS = (1, 2, 4, 8, 16, 64)
RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("rmnp", {"exclude": ("*",)}),
    "NeuRMS P": ("neurms", {"variant": "P", "head": "fallback"}),
    "NeuRMS P, momentum": ("neurms", {"variant": "P", "head": "fallback", "momentum": 0.5}),
    "NeuRMS U": ("neurms", {"variant": "U", "head": "fallback"}),
    "RACS": ("racs", {}),
    "RMNP": ("rmnp", {}),
    "Muon": ("muon", {}),
    "Alice": ("alice", {"rank": 256, "leading": 40}),
}


def made(rule: str, model: nn.Module) -> Any:
    """Return a rule's optimizer."""
    name, settings = RULES[rule]
    return neurms.create(name, model, **settings)


def predicted(rule: str, model: nn.Module, ranks: int) -> dict[str, Any]:
    """Return bytes of state and work, in the units of the rates, of the rank that has most.

    Args:
        rule: One of :data:`RULES`.
        model: The parameters, divided among the ranks already.
        ranks: Among how many.
    """
    optimizer = made(rule, model)
    state = optimizer.plan().state_bytes + optimizer.sharing.beyond()
    found = {"state_bytes": state, "work": work(rule, optimizer, ranks)}
    if rule.startswith("NeuRMS"):
        optimizer.detach()
    return found


def size(shape: Size, ranks: int) -> dict[str, Any]:
    """Return every rule's figures for one model on some ranks of torch's fake process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with torch.device("meta"):
        model = llama(shape)
    parameters = sum(p.numel() for p in model.parameters())
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        if ranks > 1:
            mesh = init_device_mesh("cpu", (ranks,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        rules = {rule: predicted(rule, model, ranks) for rule in RULES}
    finally:
        dist.destroy_process_group()
    return {"parameters": parameters, "rules": rules}


def timed(rounds: int) -> dict[str, Any]:
    """Return nanoseconds for each unit of work, all rules in turns on one matrix each."""
    turns = {}
    for rule in RULES:
        model = nn.Sequential(nn.Linear(MATRIX[1], MATRIX[0], bias=False), nn.Linear(MATRIX[0], 1))
        optimizer = made(rule, model)
        if rule == "NeuRMS U":
            # The step alone: its statistics come from backward passes, of which there is one.
            model(torch.randn(4, MATRIX[1])).square().mean().backward()
            optimizer.step()
        turns[rule] = stepping(optimizer, [model[0].weight])
    found = interleaved(turns, "AdamW", rounds=rounds, warmup=1)
    print(shown(found), flush=True)
    return {
        rule: {**row, "ns_per_unit": 1e6 * row["ms"] / cost(rule, MATRIX)}
        for rule, row in found.items()
    }


def main(
    rates: bool = False,
    predict: bool = False,
    rounds: int = 7,
    threads: int = 2,
    out: Path = RESULTS / "planner.json",
) -> None:
    """Time one matrix, or predict, and save.

    Args:
        rates: Time one matrix.
        predict: State and work from shapes.
        rounds: Of the timing.
        threads: Of the process while it times.
        out: The results file.
    """
    torch.set_num_threads(threads)
    results = Results(out, {"matrix": MATRIX, "threads": threads})
    if rates:
        results.runs["rates"] = timed(rounds)
    if predict:
        for name, shape in SHAPES.items():
            for ranks in RANKS:
                results.runs[f"{name} on {ranks}"] = size(shape, ranks)
                print(f"  {name} on {ranks}", flush=True)
    results.save()


if __name__ == "__main__":
    tyro.cli(main)
