"""A small LLaMA on English prose: which optimizer needs how many steps, and how many seconds.

Every optimizer gets the same budget: the same number of learning rates, tried for the same number
of steps with the same seed, then the same seeds at the best rate. Parameters outside the rule
(embedding, head, norms) go to AdamW at the rate that was best for AdamW alone.

    NEURMS_DATA=... python -m benchmarks.llama                 # the table in docs, resumable
    NEURMS_DATA=... python -m benchmarks.llama --only racs     # one optimizer
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, Results
from benchmarks.language import Method, Scale, bytes_per_word, prose, train, tune

SCALE = Scale()
STEPS, TUNE_STEPS, SEEDS = 600, 200, 3

# Four rates for each, a factor of two (SharedBasis: three) apart.
LOW_RANK: dict[str, Any] = {"rank": 32, "interval": 50}
ALICE = LOW_RANK | {"leading": 10}
METHODS = {
    "adamw": Method(
        "adamw", (2e-3, 4e-3, 8e-3, 16e-3), {"betas": (0.9, 0.95), "weight_decay": 0.0}
    ),
    "racs": Method("racs", (0.02, 0.04, 0.08, 0.16)),
    "racs-corrected": Method("racs", (0.02, 0.04, 0.08, 0.16), {"bias_correction": True}),
    "rmnp": Method("rmnp", (0.0025, 0.005, 0.01, 0.02)),
    "rmnp-momentum.8": Method("rmnp", (0.0025, 0.005, 0.01, 0.02), {"momentum": 0.8}),
    "alice": Method("alice", (0.01, 0.02, 0.04, 0.08), ALICE),
    "alice-0": Method("alice", (0.01, 0.02, 0.04, 0.08), ALICE | {"tracking": False}),
    "galore": Method("galore", (0.01, 0.02, 0.04, 0.08), LOW_RANK),
    "fira": Method("fira", (0.01, 0.02, 0.04, 0.08), LOW_RANK),
    "apollo-mini": Method(
        "apollo",
        (0.0025, 0.005, 0.01, 0.02),
        {"rank": 1, "scale_type": "tensor", "scale": 128.0, "interval": 50},
    ),
    "apollo-svd": Method("apollo", (0.005, 0.01, 0.02, 0.04), LOW_RANK | {"projection": "svd"}),
    "muon": Method("muon", (0.01, 0.02, 0.04, 0.08), {"weight_decay": 0.0}),
    "shared_basis": Method("shared_basis", (1e-4, 3e-4, 1e-3, 3e-3), {"rank": 16}),
    "neurms-u": Method("neurms", (0.004, 0.008, 0.016, 0.032), {"variant": "U", "momentum": 0.9}),
    "neurms-relative": Method(
        "neurms",
        (0.004, 0.008, 0.016),
        {"variant": "U", "momentum": 0.9, "clip": "relative", "kappa": 10.0},
    ),
    "neurms-relative-momentum.8": Method(
        "neurms",
        (0.004, 0.008, 0.016, 0.032),
        {"variant": "U", "momentum": 0.8, "clip": "relative", "kappa": 10.0},
    ),
}


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the final runs")
    parser.add_argument("--tune-steps", type=int, default=TUNE_STEPS, help="steps of a tuning run")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--only", default=",".join(METHODS), help="optimizers, by comma")
    parser.add_argument("--out", type=Path, default=RESULTS / "llama.json")
    arguments = parser.parse_args()
    settings = {
        "batch": SCALE.batch,
        "context": SCALE.context,
        "optimizers": {name: m.settings for name, m in METHODS.items() if m.settings},
    }
    record, data = Results(arguments.out, settings), prose()
    record.content["bytes_per_word"] = bytes_per_word(data[1])

    def rate_of(name: str, fallback_lr: float) -> float:
        return tune(record, data, SCALE, name, METHODS[name], arguments.tune_steps, fallback_lr)

    fallback_lr = rate_of("adamw", 0.0)
    for seed in range(arguments.seeds):
        for name in arguments.only.split(","):
            lr = rate_of(name, fallback_lr)
            record.run(
                f"final {name} lr={lr:g} seed={seed} steps={arguments.steps}",
                partial(
                    train,
                    data,
                    SCALE,
                    METHODS[name],
                    lr,
                    seed,
                    arguments.steps,
                    fallback_lr,
                    every=25,
                ),
            )


if __name__ == "__main__":
    main()
