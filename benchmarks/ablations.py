"""NeuRMS's ablations: what each setting does to accuracy in a short run, and rho.

One setting is changed at a time from variant U or F with momentum. Each row has its own search for
the learning rate, equally many trials on held-out training images, then seeds on the test set.
``rho`` follows the correlation of G_ij^2 with v_i u_j in every layer while AdamW or NeuRMS trains.

    neurms bench ablations
    neurms bench ablations --data fashion_mnist
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import tyro
from torch.nn.functional import cross_entropy

from benchmarks.harness import RESULTS, Results
from benchmarks.perceptrons import parts
from benchmarks.tuning import tune
from benchmarks.vision import METHODS, Method, batches, perceptron, schedule, train
from neurms.cli.data import Split
from neurms.core.diagnostics.probe import FactorizationProbe

SIZES = (784, 512, 10)
BATCH = 128
TRIALS = 4
REFINED = 2
EVERY = 30


def _u(lr: float = 6e-3, **changes: Any) -> Method:
    return Method("neurms", lr, {"variant": "U", "momentum": 0.9, **changes})


def _f(lr: float = 6e-3, **changes: Any) -> Method:
    return _u(lr, variant="F", **changes)


_HEAD: dict[str, Any] = {"head": "fallback", "fallback_lr": 3e-3}

SENSITIVITY: dict[str, dict[str, Method]] = {
    variant: {
        "beta .9": make(beta=0.9),
        "beta .995": make(beta=0.995),
        "beta .999": make(beta=0.999),
        "s_max 10": make(2e-2, s_max=10.0),
        "s_max 30": make(1e-2, s_max=30.0),
        "s_max 1e4": make(s_max=1e4),
        # v_min bounds factors by v_min^(-1/2): under s_max 100, 1e-12 to 1e-4 are one setting.
        "s_max 1e4, v_min 1e-6": make(s_max=1e4, v_min=1e-6),
    }
    for variant, make in (("U", _u), ("F", _f))
}
"""The sensitivity study by variant: one of beta, s_max, v_min and (F) c_max off its default."""
SENSITIVITY["F"] |= {
    "c_max 1": _f(c_max=1.0),
    "c_max 3": _f(c_max=3.0),
    "c_max 10": _f(c_max=10.0),
}

ROWS: dict[str, Method] = {
    "AdamW": METHODS["AdamW"],
    "RMNP": METHODS["RMNP"],
    "U": _u(),
    "B": _u(variant="B"),
    "F": _f(),
    **{f"U, {change}": method for change, method in SENSITIVITY["U"].items()},
    **{f"F, {change}": method for change, method in SENSITIVITY["F"].items()},
    "no momentum": _u(2e-2, momentum=0.0),
    "momentum coupled": _u(1e-4, momentum_coupling="gradient+velocity"),
    "momentum .95": _u(3e-3, momentum=0.95),
    "bias correction off": _u(3e-3, bias_correction=False),
    "clip relative, kappa 10": _u(clip="relative"),
    "clip relative, kappa 2": _u(clip="relative", kappa=2.0),
    "head to AdamW": _u(**_HEAD),
    "F, head to AdamW": _f(**_HEAD),
    "F, c_max 1, head to AdamW": _f(c_max=1.0, **_HEAD),
    "s_max 1e4, head to AdamW": _u(s_max=1e4, **_HEAD),
    "agc 3": _u(agc=3.0),
}


def rho(method: Method, lr: float, data: Split, steps: int) -> dict[str, Any]:
    """Return each layer's rho every :data:`EVERY` steps of a training run."""
    torch.manual_seed(0)
    model = perceptron(SIZES)
    probe = FactorizationProbe(model).attach()
    optimizer = method.make(model, lr)
    plan = schedule(optimizer, steps)
    order = batches(len(data), BATCH, torch.Generator().manual_seed(0))
    read: dict[str, list[float]] = {}
    for step in range(steps):
        index = next(order)
        optimizer.zero_grad()
        cross_entropy(model(data.inputs[index]), data.labels[index]).backward()
        if step % EVERY == EVERY - 1:
            for layer, value in probe.rho().items():
                read.setdefault(layer, []).append(round(value, 4))
        optimizer.step()
        plan.step()
    probe.detach()
    return {"every": EVERY, "rho": read}


def main(
    rows: tuple[str, ...] = tuple(ROWS),
    steps: int = 300,
    seeds: int = 5,
    data: str = "mnist",
    out: Path | None = None,
) -> None:
    """Change one setting at a time.

    Args:
        rows: Which changes, by name.
        steps: Of every run.
        seeds: Runs of each row at its best learning rate.
        data: mnist or fashion_mnist.
        out: Where results are kept; by default benchmarks/results/ablations.json or, for another
            set, ablations_DATA.json.
    """
    torch.set_num_threads(1)
    shared = {"sizes": SIZES, "batch": BATCH, "trials": TRIALS + REFINED, "steps": steps}
    if data != "mnist":
        shared["data"] = data
    suffix = "" if data == "mnist" else f"_{data}"
    results = Results(out or RESULTS / f"ablations{suffix}.json", shared)
    results.expect(len(rows) * (TRIALS + REFINED + seeds))
    search, final = parts(data)

    def run(key: str, method: Method, lr: float, seed: int, part: tuple[Split, Split]) -> float:
        result = results.run(
            key,
            lambda: train(
                lambda: perceptron(SIZES),
                lambda model: method.make(model, lr),
                *part,
                steps=steps,
                batch=BATCH,
                seed=seed,
            ),
        )
        return float(result["accuracy"])

    best = {}
    for name in rows:
        method = ROWS[name]
        best[name] = tune(
            lambda lr: run(f"{name}/search/lr {lr:g}", method, lr, 0, search),  # noqa: B023
            method.lr,
            trials=TRIALS,
            refine=REFINED,
        )
        for seed in range(seeds):
            run(f"{name}/lr {best[name]:g}/seed {seed}", method, best[name], seed, final)
    for name in ("AdamW", "U", "F"):
        if name in best:
            lr = best[name]
            key = f"rho/{name}/{4 * steps} steps"
            results.run(key, lambda: rho(ROWS[name], lr, final[0], 4 * steps))  # noqa: B023


if __name__ == "__main__":
    tyro.cli(main)
