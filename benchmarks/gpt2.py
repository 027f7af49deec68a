"""A small GPT-2 on English prose: AdamW, Muon and RMNP, and how dominant their diagonals are.

RMNP normalises rows where Muon whitens; the two agree where V V^T of the momentum is diagonal. So
the dominance ratios r_i = (V V^T)_ii / mean_{j != i} |(V V^T)_ij| of every hidden matrix are
recorded over training.

    NEURMS_DATA=... python -m benchmarks.gpt2
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import RESULTS, Results
from benchmarks.language import (
    Method,
    Scale,
    Watch,
    bytes_per_word,
    prose,
    recorded,
    train,
    tune,
)
from neurms.core.diagnostics.dominance import Dominance, row_dominance, whitening_gap

SCALE = Scale(width=128, layers=4, heads=4, batch=2, context=128, kind="gpt2")
STEPS, SEEDS, LOOKS = 300, 3, 10
METHODS = {
    "adamw": Method("adamw", (1e-3, 2e-3, 4e-3), {"betas": (0.9, 0.95), "weight_decay": 0.0}),
    "muon": Method("muon", (0.01, 0.02, 0.04), {"weight_decay": 0.0}),
    "rmnp": Method("rmnp", (0.005, 0.01, 0.02)),
}


def averages(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the averaged gradients of the blocks' matrices by name."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and parameter.ndim == 2:
            state = optimizer.state[parameter]
            average = state["momentum"] if "momentum" in state else state["exp_avg"]
            found[name] = average.reshape(parameter.shape)
    return found


def dominance_watch(steps: int) -> Watch:
    """Return a watch on the dominance ratios, at ten steps spread over training."""

    def watch(
        step: int, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> dict[str, Any] | None:
        if step % max(1, steps // LOOKS):
            return None
        return {name: _ratios(average) for name, average in averages(model, optimizer).items()}

    return watch


def _ratios(average: Tensor) -> dict[str, float]:
    """Return one matrix's r_avg, r_min and r_max, and how far Muon's update of it is from RMNP's.

    The page's table joins the matrices: mean of r_avg, least r_min, greatest r_max, a departure
    from the paper, which reports r_avg, r_min and r_max of each layer.
    """
    found = row_dominance(average) or Dominance(0.0, 0.0, 0.0)
    ratios = {"r_avg": found.r_avg, "r_min": found.r_min, "r_max": found.r_max}
    return ratios | {"whitening_gap": whitening_gap(average)}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--methods", default=",".join(METHODS), help="optimizers, by comma")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpt2.json")
    arguments = parser.parse_args()
    settings = {"scale": asdict(SCALE), "steps": STEPS, "methods": recorded(METHODS)}
    record, data = Results(arguments.out, settings), prose()
    record.content["bytes_per_word"] = bytes_per_word(data[1])
    record.content["parameters"] = sum(p.numel() for p in SCALE.model(0).parameters())
    rates: dict[str, float] = {}
    methods = arguments.methods.split(",")
    # AdamW first: what is outside a rule goes by its best rate.
    for name in dict.fromkeys(["adamw", *methods]):
        lr0 = rates.get("adamw", 0.0)
        rates[name] = tune(record, data, SCALE, name, METHODS[name], STEPS // 2, lr0)
    for seed in range(1, arguments.seeds + 1):
        for name in methods:
            lr = rates[name]
            record.run(
                f"final {name} lr={lr:g} seed={seed} steps={STEPS}",
                partial(
                    train,
                    data,
                    SCALE,
                    METHODS[name],
                    lr,
                    seed,
                    STEPS,
                    rates["adamw"],
                    watch=dominance_watch(STEPS),
                ),
            )


if __name__ == "__main__":
    main()
