"""AdamW, Muon and RMNP over steps, batch, width and depth: where the published order begins.

A smaller LLaMA than that of ``benchmarks.llama``, so that one thing at a time can be changed. At
every scale every method is tuned anew with the same number of trials, at the full number of steps;
long runs begin at the rates around the best of the run a third as long.

    NEURMS_DATA=... python -m benchmarks.scales
    NEURMS_DATA=... python -m benchmarks.scales --only "steps=900"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from benchmarks.harness import RESULTS, Results
from benchmarks.language import Method, Prose, Scale, prose, recorded, train, tune
from benchmarks.language_rows import best_rate

BASE = Scale(width=64, layers=2, heads=2, batch=8, context=64)
STEPS = 300
METHODS = {
    "adamw": Method("adamw", (4e-3, 8e-3, 16e-3), {"betas": (0.9, 0.95), "weight_decay": 0.0}),
    "muon": Method("muon", (0.02, 0.04, 0.08), {"weight_decay": 0.0}),
    "rmnp": Method("rmnp", (0.01, 0.02, 0.04)),
    "rmnp-momentum.8": Method("rmnp", (0.01, 0.02, 0.04), {"momentum": 0.8}),
}
# What is changed, to which scale and number of steps, with how many seeds.
CELLS: dict[str, tuple[Scale, int, int]] = {
    "steps=100": (BASE, 100, 3),
    "steps=300": (BASE, 300, 3),
    "steps=900": (BASE, 900, 2),
    "batch=2": (replace(BASE, batch=2), STEPS, 3),
    "batch=32": (replace(BASE, batch=32), STEPS, 2),
    "depth=4": (replace(BASE, layers=4), STEPS, 2),
    "width=128": (replace(BASE, width=128, heads=4), STEPS, 2),
    "steps=2700": (BASE, 2700, 2),
}


def begun(record: Results, name: str, method_name: str) -> Method:
    """Return a method with the rates to begin with in a cell."""
    method, steps = METHODS[method_name], CELLS[name][1]
    shorter = f"steps={steps // 3} "
    if steps <= STEPS or not any(key.startswith(shorter) for key in record.runs):
        return method
    best = float(best_rate(record.runs, method_name, shorter))
    return replace(method, rates=(best / 2, best, 2 * best))


def cell(record: Results, data: Prose, name: str, methods: Sequence[str]) -> None:
    """Tune methods at one scale and run their further seeds."""
    scale, steps, seeds = CELLS[name]
    fallback_lr, prefix = 0.0, f"{name} "
    # AdamW first: what is outside a rule goes by its best rate.
    for method_name in dict.fromkeys(["adamw", *methods]):
        method = begun(record, name, method_name)
        lr = tune(record, data, scale, method_name, method, steps, fallback_lr, prefix)
        if method_name == "adamw":
            fallback_lr = lr
        # Seeds that were not tuned on; the tuning run's own loss is not counted.
        for seed in range(1, seeds + 1):
            key = f"{name} final {method_name} lr={lr:g} seed={seed} steps={steps}"
            record.run(
                key,
                partial(
                    train,
                    data,
                    scale,
                    method,
                    lr,
                    seed,
                    steps,
                    fallback_lr,
                    every=max(1, steps // 12),
                ),
            )


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default=",".join(CELLS), help="cells, by comma")
    parser.add_argument("--methods", default=",".join(METHODS), help="optimizers, by comma")
    parser.add_argument("--out", type=Path, default=RESULTS / "scales.json")
    arguments = parser.parse_args()
    cells = {name: {**asdict(scale), "steps": steps} for name, (scale, steps, _) in CELLS.items()}
    record, data = Results(arguments.out, {"cells": cells, "methods": recorded(METHODS)}), prose()
    for name in arguments.only.split(","):
        cell(record, data, name, arguments.methods.split(","))


if __name__ == "__main__":
    main()
