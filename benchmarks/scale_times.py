"""Step times of sharded training by a model of work and network, checked here; 1B to 70B on paper.

    neurms bench scale_times --check            # 1, 2 and 4 ranks here, the loopback as it is
    neurms bench scale_times --check --rate 1   # the loopback shaped to 1 Gbit/s by tc
    neurms bench scale_times --predict          # 1.3B, 7B, 70B on 8 to 512 ranks

The model: a rank's step takes the time of its share of the work, measured on one rank, and that of
its exchanges one after the other, none overlapped. On R ranks a ring's all-reduce of b bytes takes
2 (R - 1) (L + b / (R B)), its all-gather half of that; L (latency of a message) and B (bandwidth)
are measured where it is checked and stated where it is not. Where ranks are more than cores they
wait for each other. Exchanges are those of ``step_exchanges``; FSDP2's own are not in it, nor in
what is timed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import neurms
from benchmarks.harness import RESULTS, Results
from benchmarks.scale import SIZES, Size, llama
from neurms.core.distributed.traffic import Exchange, step_exchanges
from neurms.core.ground.shards import local

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("rmnp", {"exclude": ("*",)}),
    "RMNP": ("rmnp", {}),
    "RACS": ("racs", {}),
    "RACS tracked": ("racs", {"fit": "tracked"}),
    "NeuRMS-P": ("neurms", {}),
    "LAMB": ("lamb", {}),
}
"""Rules that work by rows, whose work is divided evenly."""
CHECKED = Size(256, 2, 4, 688)
ROUNDS = 4
NETWORKS = {"10 us, 50 GB/s": (1e-5, 50e9), "30 us, 3 GB/s": (3e-5, 3e9)}
"""Latency of a message and bandwidth of a rank: fast and slow links between machines."""


def exchange_seconds(exchanges: list[Exchange], ranks: int, latency: float, rate: float) -> float:
    """Return what exchanges take by the model."""
    seconds = 0.0
    for exchange in exchanges:
        once = (ranks - 1) * (latency + exchange.bytes / (ranks * rate))
        seconds += once * (2.0 if exchange.kind == "all-reduce" else 1.0)
    return seconds


def sharded(size: Size, ranks: int, device: str) -> nn.Module:
    """Return a LLaMA's parameters, cut by FSDP2 block by block."""
    with torch.device("meta"):
        model = llama(size)
    if device != "meta":
        model.to_empty(device=device)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.01)
    mesh = init_device_mesh("cpu", (ranks,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def made(method: str, model: nn.Module) -> Any:
    """Return the method's optimizer."""
    rule, settings = METHODS[method]
    return neurms.create(rule, model, **settings)


# ------------------------------------------------------------------------------ measured


def timed(work: Any, rounds: int = ROUNDS) -> tuple[float, float]:
    """Return median seconds of work that all ranks begin together, by the clock and of the CPU."""
    seconds = []
    for number in range(rounds + 1):
        dist.barrier()
        start, used = time.perf_counter(), time.process_time()
        work()
        both = time.perf_counter() - start, time.process_time() - used
        took = torch.tensor(both, dtype=torch.float64)
        # The slowest rank's: a step ends when all have ended.
        dist.all_reduce(took, dist.ReduceOp.MAX)
        if number >= 1:
            seconds.append(took.tolist())
    clock, cpu = (statistics.median(column) for column in zip(*seconds, strict=True))
    return clock, cpu


def network(ranks: int) -> tuple[float, float]:
    """Return latency and bandwidth as small and large all-reduces have them."""
    if ranks == 1:
        return 0.0, 1e12
    small, large = torch.zeros(2), torch.zeros(1 << 21)
    least, _ = timed(lambda: dist.all_reduce(small), 10)
    most, _ = timed(lambda: dist.all_reduce(large))
    rate = 2.0 * (ranks - 1) * large.nbytes / (ranks * max(most - least, 1e-9))
    return least / (2.0 * (ranks - 1)), rate


def steps(rank: int, ranks: int, folder: str) -> None:
    """Time every method's step on this rank; the first leaves what all have found."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    latency, rate = network(ranks)
    found: dict[str, Any] = {"latency_us": 1e6 * latency, "bytes_per_s": rate}
    for method in METHODS:
        model = sharded(CHECKED, ranks, "cpu")
        optimizer = made(method, model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
            local(parameter.grad).normal_()
        seconds, cpu = timed(optimizer.step)
        exchanges = step_exchanges(optimizer)
        found[method] = {
            "ms": 1e3 * seconds,
            "cpu_ms": 1e3 * cpu,
            "calls": len(exchanges),
            "bytes": sum(exchange.bytes for exchange in exchanges),
            "exchange_ms": 1e3 * exchange_seconds(exchanges, ranks, latency, rate),
            "state_bytes": optimizer.state_bytes(),
            "planned_bytes": optimizer.plan().state_bytes,
        }
    if rank == 0:
        torch.save(found, f"{folder}/found")
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(ranks: int, gigabits: float) -> dict[str, Any]:
    """Start ranks, in a network of their own if it is to be shaped, and return what they found."""
    with tempfile.TemporaryDirectory() as folder:
        ran = f"{sys.executable} -m benchmarks.scale_times --ranks {ranks} --folder {folder}"
        shape = "ip link set lo up && tc qdisc add dev lo root tbf "
        shape += f"rate {gigabits}gbit burst 256kb latency 100ms && exec {ran}"
        command = ["unshare", "-rn", "bash", "-c", shape] if gigabits else ran.split()
        subprocess.run(command, check=True)
        return dict(torch.load(f"{folder}/found"))


def checked(gigabits: float) -> dict[str, Any]:
    """Return measured steps, and what the model makes of one rank's."""
    cores = len(os.sched_getaffinity(0))
    found: dict[str, Any] = {}
    for ranks in (1, 2, 4):
        found[str(ranks)] = on_ranks(ranks, gigabits)
    for ranks in (2, 4):
        for method in METHODS:
            row = found[str(ranks)][method]
            row["work_ms"] = found["1"][method]["cpu_ms"] / ranks
            share = row["work_ms"] * max(1.0, ranks / cores)
            row["predicted_ms"] = share + row["exchange_ms"]
            ratio = row["predicted_ms"] / row["ms"]
            print(
                f"  {ranks} ranks, {method}: {row['ms']:.1f} ms, predicted / measured {ratio:.2f}"
            )
    return found


# ------------------------------------------------------------------------------ on paper


def predicted(size: Size, ranks: int, one: dict[str, Any], elements: int) -> dict[str, Any]:
    """Return each method's step, traffic and state on a rank, from one rank's time here."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    found = {}
    for method in METHODS:
        model = sharded(size, ranks, "meta")
        parameters = sum(parameter.numel() for parameter in model.parameters())
        optimizer = made(method, model)
        exchanges = step_exchanges(optimizer)
        found[method] = {
            "work_ms": one[method]["cpu_ms"] * parameters / elements / ranks,
            "calls": len(exchanges),
            "bytes": sum(exchange.bytes for exchange in exchanges),
            "state_bytes": optimizer.plan().state_bytes,
            "exchange_ms": {
                name: 1e3 * exchange_seconds(exchanges, ranks, *own)
                for name, own in NETWORKS.items()
            },
        }
    dist.destroy_process_group()
    return found


def numbers(size: Size) -> int:
    """Return a LLaMA's parameters."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in llama(size).parameters())


def main() -> None:
    """Check or predict, and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="time steps on 1, 2 and 4 ranks here")
    parser.add_argument("--rate", type=float, default=0.0, help="Gbit/s of the loopback, by tc")
    parser.add_argument("--predict", action="store_true", help="from one rank's times of --check")
    parser.add_argument("--ranks", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "scale_times.json")
    arguments = parser.parse_args()
    if arguments.ranks:
        options = {"nprocs": arguments.ranks, "args": (arguments.ranks, arguments.folder)}
        torch.multiprocessing.spawn(steps, **options)
        return
    results = Results(
        arguments.out,
        {"cores": len(os.sched_getaffinity(0)), "threads": 1, "elements": numbers(CHECKED)},
    )
    if arguments.check:
        name = f"check at {arguments.rate:g} Gbit/s" if arguments.rate else "check"
        results.runs[name] = checked(arguments.rate)
    if arguments.predict:
        one, elements = results.runs["check"]["1"], numbers(CHECKED)
        for name in ("1.3B", "7B", "70B"):
            for ranks in (8, 64, 512):
                found = predicted(SIZES[name], ranks, one, elements)
                results.runs[f"{name} on {ranks}"] = found
                results.save()
                print(f"  {name} on {ranks}", flush=True)
    results.save()


if __name__ == "__main__":
    main()
