"""Many methods and their variants on text, at a small scale: who stands where, and why.

The small LLaMA of ``benchmarks.scales``, whose Muon and RMNP belong to this comparison, too. Every
variant is tuned with the same number of trials on seed 0, at the full number of steps, then run
with further seeds; all of them are set against AdamW.

    NEURMS_DATA=... python -m benchmarks.leads
    NEURMS_DATA=... python -m benchmarks.leads --only neurms
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import RESULTS, Results
from benchmarks.language import Method, Prose, Watch, prose, recorded, train, tune
from benchmarks.language_rows import best_rate
from benchmarks.scales import BASE, METHODS, STEPS

NEURMS_RATES = (2e-3, 4e-3, 8e-3)
MOMENTUM = {"momentum": 0.9}
LOW_RANK: dict[str, Any] = {"rank": 16, "interval": 50}
ALICE = LOW_RANK | {"leading": 5}
ALICE_RATES = (0.02, 0.04, 0.08)
RACS_RATES = (0.04, 0.08, 0.16)
SHARED_RATES = (1e-4, 3e-4, 1e-3)
MOMENTUM_FIRST = "shared_basis, momentum first"


def neurms(warmup: float = 0.1, rates: tuple[float, ...] = NEURMS_RATES, **changed: Any) -> Method:
    """Return NeuRMS-U with momentum, and what is changed about it."""
    return Method("neurms", rates, {"variant": "U"} | MOMENTUM | changed, warmup)


def relative(warmup: float = 0.1, **changed: Any) -> Method:
    """Return NeuRMS-U within 10 times the layer's median factor, and what is changed about it."""
    return neurms(warmup, **({"clip": "relative", "kappa": 10.0} | changed))


def alice(**changed: Any) -> Method:
    """Return Alice at a quarter of the width, and what is changed about it."""
    return Method("alice", ALICE_RATES, ALICE | changed)


def shared(**changed: Any) -> Method:
    """Return SharedBasis at rank 8, and what is changed about it."""
    return Method("shared_basis", SHARED_RATES, {"rank": 8} | changed)


GROUPS: dict[str, dict[str, Method]] = {
    "methods": {
        "racs": Method("racs", RACS_RATES),
        "alice": alice(),
        "alice-0": alice(tracking=False),
        "galore": Method("galore", ALICE_RATES, LOW_RANK),
        "fira": Method("fira", ALICE_RATES, LOW_RANK),
        "apollo-mini": Method(
            "apollo",
            (0.005, 0.01, 0.02),
            {"rank": 1, "scale_type": "tensor", "scale": 128.0, "interval": 50},
        ),
        "apollo-svd": Method("apollo", (0.01, 0.02, 0.04), LOW_RANK | {"projection": "svd"}),
        "neurms-u": neurms(),
        "shared_basis": shared(),
    },
    "neurms": {
        "U,unclipped": neurms(s_max=1e6),
        "U,s_max=1000": neurms(s_max=1e3),
        "U,relative-kappa=10": neurms(clip="relative", kappa=10.0),
        "U,relative-kappa=3": neurms(clip="relative", kappa=3.0),
        "U,relative-kappa=1": neurms(clip="relative", kappa=1.0),
        "U,plain": neurms(momentum=0.0, rates=(0.01, 0.02, 0.04)),
        "U,unclipped,head-to-adamw": neurms(s_max=1e6, head="fallback"),
        "U,unclipped,beta=.9": neurms(s_max=1e6, beta=0.9),
        "U,unclipped,beta=.999": neurms(s_max=1e6, beta=0.999),
        "U,unclipped,warmup=30%": neurms(0.3, s_max=1e6),
        "U,unclipped,momentum=.95": neurms(s_max=1e6, momentum=0.95),
        "U,unclipped,momentum=.8": neurms(s_max=1e6, momentum=0.8),
        "U,unclipped,velocity": neurms(s_max=1e6, momentum_coupling="gradient+velocity"),
        "U,unclipped,agc=.1": neurms(s_max=1e6, agc=0.1),
        "F": neurms(variant="F"),
        "F,unclipped": neurms(variant="F", s_max=1e6, c_max=1e6),
        "F,relative-kappa=3": neurms(variant="F", clip="relative", kappa=3.0),
        "B,unclipped": neurms(variant="B", s_max=1e6),
        "U,relative,beta=.9": relative(beta=0.9),
        "U,relative,beta=.999": relative(beta=0.999),
        "U,relative,warmup=30%": relative(0.3),
        "U,relative,momentum=.95": relative(momentum=0.95),
        "U,relative,momentum=.8": relative(momentum=0.8),
        "U,relative,momentum=.5": relative(momentum=0.5, rates=(0.008, 0.016, 0.032)),
        "U,relative,momentum=0": relative(momentum=0.0, rates=(0.016, 0.032, 0.064)),
        "U,relative,momentum=.8,warmup=30%": relative(0.3, momentum=0.8),
        "adamw,warmup=30%": replace(METHODS["adamw"], warmup=0.3),
        "U,relative,velocity": relative(momentum_coupling="gradient+velocity"),
        "U,relative,head-to-adamw": relative(head="fallback"),
        "U,relative,agc=.1": relative(agc=0.1),
        "F,relative": relative(variant="F"),
        "B,relative": relative(variant="B"),
    },
    "racs": {
        "corrected": Method("racs", RACS_RATES, {"bias_correction": True}),
        "paper,no-warmup": Method("racs", RACS_RATES, warmup=0.0),
        "corrected,no-warmup": Method("racs", RACS_RATES, {"bias_correction": True}, warmup=0.0),
        "no-limiter": Method("racs", RACS_RATES, {"gamma": 1e6}),
        "head-under-rule": Method("racs", RACS_RATES, {"head": "rule"}),
    },
    "alice": {
        "no-switching": alice(leading=16),
        "no-compensation": alice(compensation=0.0),
        "none-of-them": alice(tracking=False, leading=16, compensation=0.0),
        "tracking": alice(leading=16, compensation=0.0),
        "no-EMA": alice(betas=(0.0, 0.9, 0.999)),
        "head-under-rule": alice(head="rule"),
        "rotated-moments": alice(rotate_moments=True),
        "interval=10": alice(interval=10),
    },
    "rmnp": {
        f"momentum={mu:g}{',no-nesterov' * (not nesterov)}": Method(
            "rmnp", (0.01, 0.02, 0.04), {"momentum": mu, "nesterov": nesterov}
        )
        for mu, nesterov in ((0.0, False), (0.5, True), (0.8, True), (0.9, True), (0.9, False))
    },
    "muon": {
        f"momentum={mu:g}": Method("muon", (0.02, 0.04, 0.08), {"momentum": mu})
        for mu in (0.0, 0.5, 0.8, 0.9)
    },
    "shared_basis": {
        "decay=.99": shared(decay=0.99),
        "grafting=adam": shared(grafting="adam"),
        "grafting=None": Method("shared_basis", (1e-3, 3e-3, 1e-2), {"rank": 8, "grafting": None}),
        "eps=1e-3": shared(eps=1e-3),
        "eps=1e-12": shared(eps=1e-12),
        "rank=32": shared(rank=32),
        "momentum=0": Method("shared_basis", (1e-3, 3e-3, 1e-2), {"rank": 8, "momentum": 0.0}),
        "momentum=0,grafting=adam": Method(
            "shared_basis",
            (1e-3, 3e-3, 1e-2),
            {"rank": 8, "momentum": 0.0, "grafting": "adam"},
        ),
        "momentum-first": Method(MOMENTUM_FIRST, (3e-4, 1e-3, 3e-3), {"rank": 8}),
        "momentum-first,grafting=adam": Method(
            MOMENTUM_FIRST, (3e-4, 1e-3, 3e-3), {"rank": 8, "grafting": "adam"}
        ),
    },
}

# Groups whose variants all run at the rate that is best for the whole method. Not those whose
# variants change the length of a step: each of them needs a rate of its own.
ABLATIONS = {"alice": "methods:alice"}


def clipped_share(steps: int, least: int = 10) -> Watch:
    """Return a watch on which share of NeuRMS's units has its factor cut off by ``s_max``."""

    def watch(
        step: int, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> dict[str, float] | None:
        if step % max(1, steps // least):
            return None
        shares = []
        for group in optimizer.param_groups:
            if group.get("clip") != "absolute":
                continue
            floor = group["s_max"] ** -2 - group["eps"]
            moments = [
                state["v"] for p in group["params"] if "v" in (state := optimizer.state.get(p, {}))
            ]
            shares += [(v <= floor).float().mean().item() for v in moments]
        return {"clipped": sum(shares) / len(shares)} if shares else None

    return watch


def explore(
    record: Results, data: Prose, group: str, methods: Mapping[str, Method], seeds: int, lr0: float
) -> None:
    """Tune every variant of a group, or take over the whole method's rate, and run the seeds."""
    for name, method in methods.items():
        key = f"{group}:{name}"
        if group in ABLATIONS:
            lr = float(best_rate(record.runs, ABLATIONS[group]))
        else:
            lr = tune(record, data, BASE, key, method, STEPS, lr0)
        watch = clipped_share(STEPS) if group == "neurms" else None
        for seed in range(1, seeds + 1):
            record.run(
                f"final {key} lr={lr:g} seed={seed} steps={STEPS}",
                partial(train, data, BASE, method, lr, seed, STEPS, lr0, every=25, watch=watch),
            )


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, by comma")
    parser.add_argument("--variants", help="variants, by semicolon; all of a group by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "leads.json")
    arguments = parser.parse_args()
    settings = {
        "scale": asdict(BASE),
        "steps": STEPS,
        "groups": {name: recorded(methods) for name, methods in GROUPS.items()},
    }
    record, data = Results(arguments.out, settings), prose()
    adamw = {"adamw": METHODS["adamw"]}
    lr0 = tune(record, data, BASE, "methods:adamw", METHODS["adamw"], STEPS, 0.0)
    explore(record, data, "methods", adamw, arguments.seeds, lr0)
    for group in arguments.only.split(","):
        chosen = GROUPS[group]
        if arguments.variants:
            chosen = {name: chosen[name] for name in arguments.variants.split(";")}
        explore(record, data, group, chosen, arguments.seeds, lr0)


if __name__ == "__main__":
    main()
