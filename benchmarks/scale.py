"""State, traffic and step cost of the optimizers for LLaMA of 60M to 70B parameters, on paper.

    python -m benchmarks.scale --predict        # shapes alone: state and traffic, seconds of work
    python -m benchmarks.scale --rates          # time one matrix, from which steps are scaled
    python -m benchmarks.scale --check 60M      # whole models that fit here, against both
    python -m benchmarks.scale --check 130M

Nothing of the large models exists: their parameters are on the meta device, and the ranks are those
of torch's fake process group. Float32 throughout.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import neurms
from benchmarks.harness import RESULTS, Results
from benchmarks.interleaved import Turn, interleaved, shown
from benchmarks.llama_model import Block
from neurms.core.distributed.traffic import step_exchanges

RANKS = 64
VOCABULARY = 32_000


@dataclass(frozen=True)
class Size:
    """Width, layers, heads, hidden width of the feed-forward, width of keys and values."""

    width: int
    layers: int
    heads: int
    hidden: int
    keys: int = 0


SIZES = {
    "60M": Size(512, 8, 8, 1376),
    "130M": Size(768, 12, 12, 2048),
    "350M": Size(1024, 24, 16, 2736),
    "1.3B": Size(2048, 24, 32, 5461),
    "7B": Size(4096, 32, 32, 11008),
    "13B": Size(5120, 40, 40, 13824),
    "70B": Size(8192, 80, 64, 28672, 1024),
}
WAYS = ("ddp", "ddp, owners", "fsdp2")
"""Replicas that repeat the work on matrices, replicas that divide it, and parts of parameters."""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("rmnp", {"exclude": ("*",)}),
    "NeuRMS-U": ("neurms", {"variant": "U", "head": "fallback"}),
    "NeuRMS-F": ("neurms", {"variant": "F", "head": "fallback"}),
    "RMNP": ("rmnp", {}),
    "RACS": ("racs", {}),
    "Alice": ("alice", {"rank": 256, "leading": 40}),
    "Muon": ("muon", {}),
    "SOAP": ("soap", {}),
}
TIMED = ("AdamW", "NeuRMS-U", "NeuRMS-F", "RMNP", "RACS", "Alice", "Muon")
MATRIX = (4096, 1024)


def llama(size: Size) -> nn.Module:
    """Return the parameters of a LLaMA in their modules."""
    model = nn.Module()
    model.embedding = nn.Embedding(VOCABULARY, size.width)
    model.blocks = nn.ModuleList(
        Block(size.width, size.heads, size.hidden) for _ in range(size.layers)
    )
    if size.keys:
        for block in model.blocks:
            block.attention.k_proj = nn.Linear(size.width, size.keys, bias=False)
            block.attention.v_proj = nn.Linear(size.width, size.keys, bias=False)
    model.norm = nn.RMSNorm(size.width)
    model.head = nn.Linear(size.width, VOCABULARY, bias=False)
    return model


def made(method: str, model: nn.Module, **more: Any) -> Any:
    """Return the method's optimizer."""
    rule, settings = METHODS[method]
    return neurms.create(rule, model, **settings, **more)


# ------------------------------------------------------------------------------ on paper


def predicted(method: str, size: Size) -> dict[str, Any]:
    """Return state bytes of the fullest rank, traffic and work, by way of sharing the model."""
    found: dict[str, Any] = {}
    for way in WAYS:
        with torch.device("meta"):
            model = llama(size)
        parameters = sum(p.numel() for p in model.parameters())
        if way == "fsdp2":
            mesh = init_device_mesh("cpu", (RANKS,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        more: dict[str, Any] = {} if way == "fsdp2" else {"process_group": dist.group.WORLD}
        if way == "ddp, owners" and not method.startswith("NeuRMS"):
            more["distribute"] = "owner"
        optimizer = made(method, model, **more)
        exchanges = step_exchanges(optimizer)
        found["parameters"] = parameters
        found[way] = {
            "state_bytes": optimizer.plan().state_bytes + optimizer.sharing.beyond(),
            "calls": len(exchanges),
            "traffic_bytes": sum(exchange.bytes for exchange in exchanges),
            "work": work(method, optimizer, RANKS if way == "fsdp2" else 1),
        }
    return found


def work(method: str, optimizer: Any, ranks: int) -> dict[str, float]:
    """Return how much each timed rate is to be multiplied with, on the busiest rank.

    Elements for passes over memory, floating-point operations for products of matrices. A rule that
    works on rows shares its work among ranks, and owners share whole matrices.
    """
    units = {"AdamW": 0.0, method: 0.0}
    owned: dict[int, float] = {}
    for parameter, route in optimizer.routes.items():
        if route.is_fallback:
            units["AdamW"] += parameter.numel() / ranks
            continue
        amount = cost(method, parameter.shape)
        if optimizer.sharing.crew_of(parameter) is not None:
            owner = optimizer.sharing.owner_of(parameter)
            owned[owner] = owned.get(owner, 0.0) + amount
        else:
            units[method] += amount / ranks
    units[method] += max(owned.values(), default=0.0)
    return units


def cost(method: str, shape: Sequence[int]) -> float:
    """Return the work on one matrix, in the unit of its rate."""
    n, m = sorted(shape)
    if method in ("Muon", "SOAP"):
        # Newton-Schulz: a Gram matrix, its square, and their product with X, five times.
        return 5.0 * (4.0 * m * n * n + 2.0 * n**3)
    if method == "Alice":
        # U^T G, U z and U w.
        return 6.0 * min(METHODS["Alice"][1]["rank"], n) * m * n
    return float(m * n)


# ------------------------------------------------------------------------------ measured


def stepping(optimizer: Any, parameters: list[nn.Parameter]) -> Turn:
    """Return a turn that steps on fresh gradients."""

    def prepare(number: int) -> Callable[[], Any]:
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        return optimizer.step  # type: ignore[no-any-return]

    return prepare


def rates(rounds: int) -> dict[str, Any]:
    """Return nanoseconds for each unit of work, from one matrix."""
    turns = {}
    for method in TIMED:
        model = nn.Sequential(nn.Linear(MATRIX[1], MATRIX[0], bias=False), nn.Linear(MATRIX[0], 1))
        optimizer = made(method, model)
        if method.startswith("NeuRMS"):
            # The step alone: statistics come from backward passes, of which there is one.
            model(torch.randn(4, MATRIX[1])).square().mean().backward()
            optimizer.step()
        turns[method] = stepping(optimizer, [model[0].weight])
    found = interleaved(turns, "AdamW", rounds=rounds)
    print(shown(found), flush=True)
    return {
        method: {**row, "ns_per_unit": 1e6 * row["ms"] / cost(method, MATRIX)}
        for method, row in found.items()
    }


def checked(name: str, rounds: int) -> dict[str, Any]:
    """Return the state and the step of whole models, as measured."""
    found: dict[str, Any] = {}
    for method in TIMED:
        torch.manual_seed(0)
        model = llama(SIZES[name])
        optimizer = made(method, model)
        if method.startswith("NeuRMS"):
            observe(model)
            optimizer.step()
        turn = stepping(optimizer, list(model.parameters()))
        slow = method == "Muon"
        row = interleaved({method: turn}, method, rounds=2 if slow else rounds, warmup=1)[method]
        found[method] = {"ms": row["ms"], "state_bytes": optimizer.state_bytes()}
        print(f"  {name} {method}: {row['ms']:.1f} ms", flush=True)
    return found


def observe(model: nn.Module) -> None:
    """Let every linear layer see a backward pass of two rows."""
    loss = torch.zeros(())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            loss = loss + module(torch.randn(2, module.in_features)).square().mean()
    loss.backward()


def main() -> None:
    """Predict, time or check, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--predict", action="store_true", help="state and traffic from shapes")
    parser.add_argument("--rates", action="store_true", help="time one matrix")
    parser.add_argument("--check", choices=SIZES, action="append", default=[])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = Results(
        arguments.out, {"ranks": RANKS, "matrix": MATRIX, "threads": arguments.threads}
    )
    if arguments.rates:
        results.runs["rates"] = rates(arguments.rounds)
    for name in arguments.check:
        results.runs[f"check {name}"] = checked(name, arguments.rounds)
    if arguments.predict:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
        for name, size in SIZES.items():
            results.runs[name] = {method: predicted(method, size) for method in METHODS}
            print(f"  {name}", flush=True)
        dist.destroy_process_group()
    results.save()


if __name__ == "__main__":
    main()
