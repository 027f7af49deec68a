"""Many steps of a small model whose batches change shape: memory, compilations, bases, denormals.

    neurms bench soak --steps 200000

Times are of the processor, which other processes disturb less than the clock.

Inputs follow a slow cycle in which whole features, and with them columns of the gradients, are zero
for thousands of steps, so that moments decay to denormal numbers; denormals are *not* flushed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

import neurms
from benchmarks.harness import RESULTS, Results
from neurms.compiled.backends import Kernel, compilations

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "neurms F": ("neurms", {"variant": "F", "momentum": 0.9}),
    "alice": ("alice", {"rank": 6, "leading": 3, "interval": 200}),
    "racs": ("racs", {}),
    "soap": ("soap", {"interval": 10}),
    "neurms backward": ("neurms", {"variant": "B", "update": "backward", "momentum": 0.9}),
    "rmnp": ("rmnp", {}),
    "shared_basis": ("shared_basis", {"rank": 2, "decay": 0.99}),
}
SAMPLES = 40
"""Points of the run at which memory and time are read."""


def resident() -> int:
    """Return the bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def compiled_graphs() -> int:
    """Return how often a kernel was compiled by TorchInductor."""
    kernels = {id(o): o for o in gc.get_objects() if type(o) is Kernel}
    return sum(compilations(kernel) for kernel in kernels.values())


def orthonormality(optimizer: torch.optim.Optimizer) -> float | None:
    """Return the largest entry of |U^T U - I| over all bases in the state, None without any."""
    worst = []
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and "basis" in key and value.ndim == 2:
                basis = value.double() if value.shape[0] >= value.shape[1] else value.double().mT
                gram = basis.mT @ basis
                worst.append(float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max()))
    return max(worst) if worst else None


def slope(values: list[int], every: int) -> float:
    """Return the least-squares slope in bytes per 1000 steps."""
    return 1000.0 * statistics.linear_regression(range(len(values)), values).slope / every


def soak(name: str, steps: int) -> dict[str, Any]:
    """Train and return what was read on the way."""
    torch.manual_seed(0)
    torch.set_flush_denormal(False)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
    model.append(nn.Linear(16, 3))
    kind, settings = CASES[name]
    optimizer = neurms.create(kind, model, lr=1e-4, **settings)
    inputs, targets = torch.randn(32, 12), torch.randn(32, 3)
    muted = inputs * (torch.arange(12) < 6)
    every = max(1, steps // SAMPLES)
    memory, times, graphs, drift, bad = [], [], compiled_graphs(), [], 0
    started = time.process_time()
    for step in range(steps):
        rows = 1 + step % 31
        # Half of the inputs are silent for nine tenths of the run's samples.
        seen = inputs if (step // every) % 10 == 0 else muted
        loss = mse_loss(model(seen[:rows]), targets[:rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % every == 0:
            times.append(1e6 * (time.process_time() - started) / every)
            memory.append(resident())
            drift.append(orthonormality(optimizer))
            bad += not bool(torch.isfinite(loss))
            started = time.process_time()
    tenth = len(times) // 10
    return {
        "steps": steps,
        "us_per_step": statistics.median(times),
        "late_over_early": statistics.median(times[-tenth:]) / statistics.median(times[:tenth]),
        "slow_over_median": max(times) / statistics.median(times),
        # The first tenth fills caches and pools.
        "rss_slope_bytes_per_1000_steps": slope(memory[tenth:], every),
        "rss_growth_bytes": memory[-1] - memory[tenth],
        "compilations": compiled_graphs() - graphs,
        "worst_orthonormality": max((d for d in drift if d is not None), default=None),
        "last_orthonormality": drift[-1],
        "denormal_numbers": denormals(optimizer),
        "nonfinite_samples": bad,
        "us_by_sample": [round(t, 1) for t in times],
    }


def denormals(optimizer: torch.optim.Optimizer) -> int:
    """Return how many numbers of the state are denormal."""
    tiny = torch.finfo(torch.float32).tiny
    values = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    return sum(int(((v != 0) & (v.abs() < tiny)).sum()) for v in values if v.is_floating_point())


def main() -> None:
    """Soak every case, one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--only", action="append", choices=CASES)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(arguments.out, {})
    for name in arguments.only or CASES:
        results.run(name, lambda n=name: soak(n, arguments.steps))
    results.save()


if __name__ == "__main__":
    main()
