"""A whole training step of a comparison's rows, side by side in one process.

Each row has the settings that its search chose. Batch, forward, backward, update and schedule, as
in training; the rows take turns of ten steps, so that a drift of the machine hits all alike. The
chart on the first page turns steps into seconds by this file.

    neurms bench contest_step --threads 1
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.evidence import entrants
from benchmarks.evidence.ledger import Row, rows
from benchmarks.harness import RESULTS, Results
from benchmarks.interleaved import Turn, interleaved, shown
from benchmarks.language import Scale, batch_of, loss_of
from benchmarks.vision import schedule

TASK = "text-64"
ROWS = ("AdamW", "AdamW, two rates", "RACS", "P", "P momentum")
TURN = 10


def turn(row: Row, scale: Scale) -> Turn:
    """Return a turn of ten training steps of the row's own model, on random bytes."""
    model = scale.model(0)
    optimizer = entrants.text()[row.name].make(model, dict(row.chosen))
    plan = schedule(optimizer, 1_000_000)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (100_000,), generator=generator, dtype=torch.uint8)

    def steps() -> None:
        for _ in range(TURN):
            inputs, targets = batch_of(tokens, generator, scale)
            optimizer.zero_grad()
            loss_of(model, inputs, targets).backward()
            optimizer.step()
            plan.step()

    def prepare(number: int) -> Any:
        return steps

    return prepare


def measured(names: tuple[str, ...], rounds: int) -> dict[str, dict[str, float]]:
    """Return milliseconds of a step and its ratio to AdamW's, by row."""
    content = json.loads((RESULTS / "contests" / f"{TASK}.json").read_text())
    found = {row.name: row for row in rows(content) if row.complete and row.name in names}
    details = content["settings"]["design"]["details"]
    scale = Scale(**{name: details[name] for name in Scale.__dataclass_fields__})
    turns = {name: turn(row, scale) for name, row in found.items()}
    result = interleaved(turns, "AdamW", rounds=rounds)
    for row in result.values():
        row["ms"] /= TURN
    return result


def main(
    threads: int = 1,
    rounds: int = 15,
    methods: tuple[str, ...] = ROWS,
    out: Path = RESULTS / "contest_step.json",
) -> None:
    """Measure and keep.

    Args:
        threads: Of the process.
        rounds: Turns of ten steps of every row.
        methods: The rows.
        out: The results file; times that it holds already are measured again.
    """
    torch.set_num_threads(threads)
    out.unlink(missing_ok=True)
    record = Results(out, {"threads": threads, "rounds": rounds, "turn": TURN})
    record.runs[TASK] = measured(methods, rounds)
    record.save()
    print(shown(record.runs[TASK]))


if __name__ == "__main__":
    tyro.cli(main)
