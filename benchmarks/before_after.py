"""The timings of this checkout against those of another one, turn by turn, on one machine.

    git worktree add ../before COMMIT
    neurms bench before_after --before ../before --what step --threads 1

Each checkout runs in a process of its own, and they take turns: one round times a contender of the
one and then the same contender of the other, in an order that turns around. torch's own optimizers
are among the contenders: they are the same code on both sides, so that what their ratios differ
from 1 by is the noise of the measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, Results
from neurms.core.ground.errors import check_choice

HERE = Path(__file__).resolve().parents[1]
SERVER = """
import json, sys, time
import torch
from neurms.compiled import warm_up

what, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
torch.set_flush_denormal(True)
warm_up()
turns = {}
if what == "step":
    from benchmarks import step
    for sizes, batch in step.CASES[:2]:
        for name in step.OPTIMIZERS:
            case = "-".join(map(str, sizes))
            turns[f"{case} batch {batch}: {name}"] = step.turn(name, sizes, batch)
else:
    from benchmarks import kernels
    for shape in kernels.SHAPES:
        for name, turn in kernels.contenders(shape).items():
            if "eager" not in name:
                turns[f"{shape[0]}x{shape[1]}: {name}"] = turn
print(json.dumps(list(turns)), flush=True)
for line in sys.stdin:
    name, number = json.loads(line)
    timed = turns[name](number)
    start = time.perf_counter()
    timed()
    print(time.perf_counter() - start, flush=True)
"""
"""Runs in each checkout, with that checkout's benchmarks."""


class Checkout:
    """A process that takes turns with the code of one checkout."""

    def __init__(self, root: Path, what: str, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, what, str(threads)],
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.names: list[str] = json.loads(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self._process.args!r} ended; see its error above")
        return line

    def seconds(self, name: str, number: int) -> float:
        """Take one turn and return its time."""
        assert self._process.stdin is not None
        print(json.dumps([name, number]), file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@contextmanager
def checkouts(roots: dict[str, Path], what: str, threads: int) -> Iterator[dict[str, Checkout]]:
    """Start one process for each checkout, and end them all."""
    started: dict[str, Checkout] = {}
    try:
        for key, root in roots.items():
            started[key] = Checkout(root, what, threads)
        yield started
    finally:
        for checkout in started.values():
            checkout.close()


def compared(sides: dict[str, Checkout], rounds: int, warmup: int = 3) -> dict[str, Any]:
    """Return, by contender, the median ratio of after to before, its quartiles, and both times."""
    before, after = sides["before"], sides["after"]
    names = [name for name in after.names if name in before.names]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds + warmup):
        for name in names if number % 2 else names[::-1]:
            pair = {key: sides[key].seconds(name, number) for key in _order(number)}
            if number >= warmup:
                times[name].append((pair["before"], pair["after"]))
    result = {}
    for name, pairs in times.items():
        low, middle, high = statistics.quantiles([new / old for old, new in pairs], n=4)
        old, new = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
        result[name] = {"before": old, "after": new, "ratio": middle, "low": low, "high": high}
    return result


def _order(number: int) -> tuple[str, str]:
    return ("before", "after") if number % 4 < 2 else ("after", "before")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--after", type=Path, default=HERE)
    parser.add_argument("--what", default="step", help="step or kernels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=RESULTS / "before_after.json")
    arguments = parser.parse_args()
    check_choice("what", arguments.what, ("step", "kernels"))
    roots = {"before": arguments.before.resolve(), "after": arguments.after.resolve()}
    with checkouts(roots, arguments.what, arguments.threads) as sides:
        found = compared(sides, arguments.rounds)
    for name, row in found.items():
        print(
            f"  {name:55}{row['before']:9.3f} ->{row['after']:9.3f} ms   x{row['ratio']:.3f}"
            f"  ({row['low']:.3f} .. {row['high']:.3f})"
        )
    results = Results(arguments.out, {"threads": arguments.threads, "what": arguments.what})
    results.runs[arguments.what] = found
    results.save()


if __name__ == "__main__":
    main()
