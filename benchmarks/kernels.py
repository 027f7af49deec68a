"""The optimizer's step alone, on one matrix, against torch's fused AdamW.

    neurms bench kernels --threads 2

Fresh gradients in every round, denormals flushed, medians of interleaved rounds. ``reach`` is how
near a step comes to its limit, the bytes that it must move at the speed of a plain copy in the same
rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import neurms
from benchmarks.evidence.entrants import AVERAGE
from benchmarks.harness import RESULTS, Results
from benchmarks.interleaved import Turn, interleaved, shown
from benchmarks.peers import GROUPS, against_peers

SHAPES = ((1024, 1024), (4096, 1024), (4096, 4096))
OURS = ("rmnp", "racs")
FITS = ("tracked", "sums")
MOMENTS: dict[str, dict[str, Any]] = {
    "NeuRMS-P": {},
    "NeuRMS-P momentum": {"momentum": 0.8},
    "NeuRMS-P average": {"momentum": 0.8, **AVERAGE},
}

COPY = "copy"
PASSES = {
    "adamw fused": 7,
    "sgd fused": 3,
    "rmnp": 5,
    "racs": 8,
    "racs tracked": 4,
    "racs sums": 4,
    "NeuRMS-P": 4,
    "NeuRMS-P momentum": 6,
    "NeuRMS-P average": 7,
    COPY: 2,
}
"""Reads and writes of a matrix that a step cannot do without: RACS as published reads G five times
for its fit, and all read G and read and write W to move it; P by averages reads M with G twice."""


def turn(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> Turn:
    """Return a turn that steps on a fresh gradient."""

    def prepare(number: int) -> object:
        parameter.grad = torch.randn_like(parameter)
        return optimizer.step

    return prepare  # type: ignore[return-value]


def copying(parameter: torch.nn.Parameter) -> Turn:
    """Return a turn that copies a fresh matrix over another one."""
    target = parameter.detach()

    def prepare(number: int) -> object:
        source = torch.randn_like(target)
        return lambda: target.copy_(source)

    return prepare  # type: ignore[return-value]


def with_reach(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Add to each row the time that its bytes take in a copy, over its own."""
    one = found[COPY]["ms"] / PASSES[COPY]
    return {
        name: {**row, "reach": PASSES[name] * one / row["ms"]} if name in PASSES else row
        for name, row in found.items()
    }


def contenders(shape: tuple[int, int]) -> dict[str, Turn]:
    """Return what is compared at one shape; each has a matrix of its own."""
    made: dict[str, Turn] = {}
    fits, eager = [f"racs {fit}" for fit in FITS], [f"{name} eager" for name in OURS]
    for name in ("adamw fused", "adamw", "sgd fused", *OURS, *fits, *MOMENTS, *eager, COPY):
        parameter = torch.nn.Parameter(0.02 * torch.randn(shape))
        if name == COPY:
            made[name] = copying(parameter)
            continue
        if name in MOMENTS:
            made[name] = turn(neurms.NeuRMS([parameter], lr=1e-3, **MOMENTS[name]), parameter)
            continue
        kind, _, form = name.partition(" ")
        ours = kind in OURS
        settings: dict[str, Any] = {"fit": form} if form in FITS else {"backend": form or "auto"}
        settings = settings if ours else {"fused": form == "fused"}
        made[name] = turn(neurms.create(kind, [parameter], lr=1e-3, **settings), parameter)
    return made


def add_peers(results: Results, groups: Sequence[str]) -> None:
    """Measure other libraries' optimizers at 1024 x 1024, beside ours."""
    ours = {name: partial(neurms.create, name, lr=1e-3) for name in OURS}
    for group in groups:
        torch.manual_seed(0)
        found = against_peers((1024, 1024), ours, group, rounds=8)
        timed = {name: row for name, row in found.items() if "ms" in row}
        print(f"peers of {group}, 1024x1024\n{shown(timed)}", flush=True)
        results.runs[f"peers {group}"] = found
        results.save()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--muon", action="store_true", help="torch.optim.Muon against RMNP too")
    parser.add_argument("--peers", nargs="*", choices=GROUPS, help="only other libraries' (all)")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = Results(arguments.out, {"threads": arguments.threads})
    if arguments.peers is not None:
        add_peers(results, arguments.peers or GROUPS)
        return
    for shape in SHAPES:
        torch.manual_seed(0)
        timed = interleaved(contenders(shape), "adamw fused", rounds=arguments.rounds)
        found = with_reach(timed)
        key = f"{shape[0]}x{shape[1]}"
        print(f"{key}, {arguments.threads} threads\n{shown(found)}", flush=True)
        results.runs[key] = found
    if arguments.muon:
        parameters = [torch.nn.Parameter(0.02 * torch.randn(4096, 1024)) for _ in range(2)]
        pair = {
            "rmnp": turn(neurms.RMNP([parameters[0]]), parameters[0]),
            "torch.optim.Muon": turn(torch.optim.Muon([parameters[1]]), parameters[1]),
        }
        found = interleaved(pair, "rmnp", rounds=10)
        print(f"against Muon, 4096x1024\n{shown(found)}", flush=True)
        results.runs["muon 4096x1024"] = found
    results.save()


if __name__ == "__main__":
    main()
