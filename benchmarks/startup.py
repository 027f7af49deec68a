"""What neurms adds to a process's start: importing it, and the first call of its kernels.

    neurms bench startup

Each figure is the median over fresh processes. ``warm-up`` is the first call of every kernel that a
NeuRMS step uses, by a process that finds the caches of an earlier one on disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import RESULTS, Results

_IMPORT = """
import time, torch
start = time.perf_counter()
import neurms
print(time.perf_counter() - start)
"""

_WARM_UP = """
import sys, time, torch, neurms
from neurms.compiled import warm_up
start = time.perf_counter()
warm_up()
model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256))
optimizer = neurms.NeuRMS(model, variant="F", momentum=0.9, backend=sys.argv[1])
model(torch.randn(300, 256)).square().mean().backward()
optimizer.step()
print(time.perf_counter() - start)
"""


def seconds(code: str, *arguments: str) -> float:
    """Run a fresh interpreter and return what it prints last."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measured(code: str, *arguments: str, runs: int) -> dict[str, float]:
    """Return the median of some runs, and the first, which may have had to fill a cache."""
    first = seconds(code, *arguments)
    found = [seconds(code, *arguments) for _ in range(runs)]
    return {"median_s": statistics.median(found), "max_s": max(found), "first_s": first}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / "startup.json")
    arguments = parser.parse_args()
    results = Results(arguments.out, {"runs": arguments.runs})
    results.runs["import neurms after torch"] = measured(_IMPORT, runs=arguments.runs)
    for backend in ("auto", "inductor"):
        key = f"warm-up, {backend}"
        results.runs[key] = measured(_WARM_UP, backend, runs=max(1, arguments.runs // 3))
    print(json.dumps(results.runs, indent=1))
    results.save()


if __name__ == "__main__":
    main()
