"""What a training step of a 19 M parameter LLaMA takes on this CPU, by method: time and memory.

    neurms bench llama_cpu --threads 2            # float32, then autocast, then LoRA; resumable
    neurms bench llama_cpu --threads 2 --only "SOAP,Muon" --what float32

Width 512, 6 layers, 4 x 256 tokens. Each method has a process of its own and takes turns with one
that has fused AdamW; every ratio is to that. Forward and backward are timed in whole training
steps. Steps that read gradients alone are then timed on 200 gradients that change, so that what a
rule does once in 10, 20 or 200 steps is counted as often as it happens; the worst of them is kept
beside their mean. NeuRMS, whose taps work in forward and backward, is timed in training steps only.
Autocast changes neither gradients' dtype nor the step, whose times are those of float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, Results
from benchmarks.language import Scale
from benchmarks.llama_worker import ADAPTERS, METHODS, answer

SCALE = Scale(512, 6, 8, 4, 256)
BASELINE = "AdamW fused"
KINDS = ("float32", "bfloat16", "LoRA")
RANK = 16
CHUNK = 10
"""Steps of a turn."""
SLOW = 4000.0
"""Milliseconds above which fewer repetitions will do: products of bfloat16 without hardware."""


class Turns:
    """A worker in a process of its own."""

    def __init__(self, name: str, kind: str, scale: Scale, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.llama_cpu", "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        rank = RANK if kind == "LoRA" else 0
        low = kind == "bfloat16"
        given = {"name": name, "threads": threads, "low": low, "rank": rank}
        self._send(given | {"scale": asdict(scale)})

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _send(self, request: Any) -> None:
        assert self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)

    def ask(self, what: str, count: int = 0) -> Any:
        """Return what the worker has timed."""
        self._send([what, count])
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("error: a worker ended early; its message is above")
        return json.loads(line)


def measured(
    name: str, kind: str, scale: Scale, arguments: argparse.Namespace, known: dict[str, Any]
) -> dict[str, Any]:
    """Time a method beside fused AdamW; return milliseconds, ratios and bytes.

    Args:
        name: The method.
        kind: One of :data:`KINDS`.
        scale: The model.
        arguments: ``rounds``, ``interval`` and ``threads``.
        known: The runs so far. Forward and backward of methods without taps are fused AdamW's, and
            with autocast their steps are those of float32.
    """
    own = _is_tapped(name) or name == BASELINE
    rounds = arguments.rounds if own else 0
    with ExitStack() as stack:
        names = (BASELINE, name)
        pair = [stack.enter_context(Turns(n, kind, scale, arguments.threads)) for n in names]
        trained: list[list[list[float]]] = [[], []]
        if kind == "bfloat16" and own and pair[0].ask("train")[0] > SLOW:
            # A processor without products of bfloat16 numbers: 40 times the time of float32.
            rounds = 2
        for number in range(rounds + 2):
            for index in (0, 1) if number % 2 else (1, 0):
                spent = pair[index].ask("train")
                trained[index] += [spent] if number >= 2 else []
        memory = pair[1].ask("memory")
        if own:
            passes = [statistics.median(row[0] for row in rows) for rows in trained]
        else:
            passes = [known[f"{kind} {BASELINE}"]["passes_ms"]] * 2
        if _is_tapped(name):
            steps = [[row[1] for row in rows] for rows in trained]
            return summary(passes, steps, scale) | memory
        before = known.get(f"float32 {name}", {}) if kind == "bfloat16" else {}
        steps = before.get("steps") or alternating(pair, arguments.interval)
    rounded = [[round(ms, 3) for ms in times] for times in steps]
    return summary(passes, steps, scale) | memory | {"steps": rounded}


def _is_tapped(name: str) -> bool:
    return METHODS[name][0] == "neurms"


def alternating(pair: Sequence[Turns], interval: int) -> list[list[float]]:
    """Return the milliseconds of an interval's steps of both, a chunk of each in turn."""
    if max(pair[1].ask("steps", 2)) > SLOW and min(pair[1].ask("steps", 2)) > SLOW:
        interval //= 10
    steps: list[list[float]] = [[], []]
    for number in range(0, interval, CHUNK):
        for index in (0, 1) if number % (2 * CHUNK) else (1, 0):
            steps[index] += pair[index].ask("steps", min(CHUNK, interval - number))
    return steps


def summary(
    passes: Sequence[float], steps: Sequence[Sequence[float]], scale: Scale
) -> dict[str, Any]:
    """Return what a method's times and fused AdamW's come to.

    Args:
        passes: Milliseconds of forward and backward, fused AdamW's first.
        steps: Milliseconds of steps, likewise.
        scale: How many tokens a step has.
    """
    means = [statistics.fmean(own) for own in steps]
    whole, own = (p + s for p, s in zip(passes, means, strict=True))
    return {
        "passes_ms": passes[1],
        "passes_ratio": passes[1] / passes[0],
        "step_ms": means[1],
        "worst_step_ms": max(steps[1]),
        "adamw_step_ms": means[0],
        "ms": own,
        "ratio": own / whole,
        "tokens_per_s": 1e3 * scale.batch * scale.context / own,
    }


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9, help="training steps of each method")
    parser.add_argument("--interval", type=int, default=200, help="steps on changing gradients")
    parser.add_argument("--only", default=",".join(METHODS), help="methods, by comma")
    parser.add_argument("--what", default=",".join(KINDS), help="of " + ", ".join(KINDS))
    parser.add_argument("--out", type=Path, default=RESULTS / "llama_cpu.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return answer()
    settings = {k: getattr(arguments, k) for k in ("threads", "rounds", "interval")}
    record = Results(arguments.out, settings | {"model": str(SCALE), "rank of adapters": RANK})
    kinds, names = arguments.what.split(","), arguments.only.split(",")
    if unknown := sorted({*names} - {*METHODS}) + sorted({*kinds} - {*KINDS}):
        raise SystemExit(f"error: {unknown} not known; --only has {[*METHODS]}, --what {[*KINDS]}")
    runs = [
        (kind, name)
        for kind in kinds
        for name in dict.fromkeys([BASELINE, *names])
        if name in (ADAPTERS if kind == "LoRA" else METHODS)
    ]
    record.expect(len(runs))
    for kind, name in runs:
        work = partial(measured, name, kind, SCALE, arguments, record.runs)
        record.run(f"{kind} {name}", work)
    return None


if __name__ == "__main__":
    main()
