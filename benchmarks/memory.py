"""What a training step takes at its peak, by optimizer, each in a process of its own.

    neurms bench memory

A ReLU network 1024-4096-4096-1024, batch 128, gradients set to None. Twice: the peak of the
resident set during three steps, over what the process held before the model; and the peak of what
torch allocates in a step, from its profiler's memory events, over what is alive between steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

import neurms
from benchmarks.harness import RESULTS, Results
from neurms.core.optimizers.plan import tensor_bytes

SIZES = (1024, 4096, 4096, 1024)
BATCH = 128
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {}),
    "sgd fused": ("sgd", {"fused": True}),
    "sgd momentum": ("sgd", {"momentum": 0.9}),
    "adamw": ("adamw", {}),
    "adamw fused": ("adamw", {"fused": True}),
    "NeuRMS-P step": ("neurms", {"variant": "P"}),
    "NeuRMS-P backward": ("neurms", {"variant": "P", "update": "backward"}),
    "NeuRMS-U step": ("neurms", {"variant": "U"}),
    "NeuRMS-F step": ("neurms", {"variant": "F"}),
    "NeuRMS-U backward": ("neurms", {"variant": "U", "update": "backward"}),
    "NeuRMS-F backward": ("neurms", {"variant": "F", "update": "backward"}),
    "NeuRMS-F backward, momentum": (
        "neurms",
        {"variant": "F", "update": "backward", "momentum": 0.9},
    ),
    "NeuRMS-F backward bf16": (
        "neurms",
        {"variant": "F", "update": "backward", "gemm": "bfloat16"},
    ),
    "NeuRMS-F backward bf16, momentum": (
        "neurms",
        {"variant": "F", "update": "backward", "gemm": "bfloat16", "momentum": 0.9},
    ),
    "rmnp": ("rmnp", {"head": "rule"}),
    "rmnp backward": ("rmnp", {"head": "rule", "nesterov": False, "update": "backward"}),
    "racs": ("racs", {"head": "rule"}),
}
# Blocks of 64 KiB and more are mapped one by one and given back at once, so that the resident set
# follows what is alive; one arena, so that threads do not hoard.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}


def measured(name: str) -> dict[str, Any]:
    """Measure one optimizer in this process, which should have done nothing else."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(BATCH, SIZES[0]), torch.randn(BATCH, SIZES[-1])
    _warm(inputs)
    before = _status("VmRSS")
    model = _network()
    kind, settings = OPTIMIZERS[name]
    optimizer = neurms.create(kind, model, lr=1e-4, **settings)
    gradients = 0

    def step() -> None:
        nonlocal gradients
        mse_loss(model(inputs), targets).backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    # Writing 5 resets the peak of the resident set.
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        step()
    peak = _status("VmHWM")
    state = sum(tensor_bytes(dict(entry)) for entry in optimizer.state.values())
    weights = sum(p.nbytes for p in model.parameters())
    return {
        "weight_bytes": weights,
        "gradient_bytes": gradients,
        "state_bytes": state,
        "resident_bytes": peak - before,
        "allocated_bytes": weights + state + _allocated(step)[0],
        # Held until backward by whoever trains: no way of updating can stay below this.
        "forward_bytes": _allocated(lambda: model(inputs))[1],
        "before_bytes": before,
    }


def _network() -> nn.Module:
    layers: list[nn.Module] = []
    for features, units in pairwise(SIZES):
        layers += [nn.Linear(features, units), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _warm(inputs: torch.Tensor) -> None:
    """Load what torch and the library load at first use, on a network of no size."""
    modes: tuple[Any, ...] = ("step", "backward")
    for update in modes:
        small = nn.Sequential(nn.Linear(SIZES[0], 64), nn.ReLU(), nn.Linear(64, 64))
        optimizer = neurms.NeuRMS(small, variant="F", update=update)
        small(inputs).square().mean().backward()
        optimizer.step()
        optimizer.detach()


def _allocated(step: Callable[[], Any]) -> tuple[int, int]:
    """Return what is allocated and not yet freed, in bytes: at its peak, and with the result."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as trace:
        result = step()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return peak, live


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _in_a_process(name: str, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.memory", "--child", name]
    found = subprocess.run(
        command,
        env={**os.environ, **MALLOC, "OMP_NUM_THREADS": str(threads)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if found.returncode:
        raise SystemExit(f"error: {name!r} failed:\n{found.stderr}")
    result: dict[str, Any] = json.loads(found.stdout)
    return result


def comparison(runs: dict[str, Any]) -> dict[str, float]:
    """Return what was to be shown: bytes below SGD, and AdamW's bytes over ours."""
    tapped = sum(4 * a * b for a, b in pairwise(SIZES))
    found: dict[str, float] = {"tapped_gradient_bytes": tapped}
    for measure in ("resident_bytes", "allocated_bytes"):
        for name in ("NeuRMS-U backward", "NeuRMS-F backward"):
            key = f"{name}, {measure} below sgd"
            found[key] = runs["sgd"][measure] - runs[name][measure]
    for measure in ("resident_bytes", "allocated_bytes"):
        key = f"rmnp backward, {measure} below rmnp"
        found[key] = runs["rmnp"][measure] - runs["rmnp backward"][measure]
    held = {n: run["gradient_bytes"] + run["state_bytes"] for n, run in runs.items()}
    for name in ("NeuRMS-F step", "NeuRMS-F backward", "rmnp", "racs"):
        found[f"adamw over {name}"] = held["adamw"] / held[name]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--child", choices=OPTIMIZERS, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        print(json.dumps(measured(given.child)))
        return
    settings = {"sizes": SIZES, "batch": BATCH, "threads": given.threads, "malloc": MALLOC}
    results = Results(given.out, settings)
    for name in OPTIMIZERS:
        results.run(name, partial(_in_a_process, name, given.threads))
    results.save(comparison=comparison(results.runs))
    for key, value in results.content["comparison"].items():
        print(f"{key}: {value:,.2f}" if value < 1e4 else f"{key}: {value / 2**20:,.1f} MiB")


if __name__ == "__main__":
    main()
