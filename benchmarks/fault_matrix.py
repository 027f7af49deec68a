"""Let every fault strike every optimizer under every front end, and say what came of it.

    neurms bench fault_matrix             # try everything
    neurms bench fault_matrix --page      # write docs/guide/fault-matrix.md from the results

Each cell checks what it says: an outcome that is not one of the stated ones is a failure.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.faults.faults import FAULTS
from benchmarks.faults.progress import PHASES
from benchmarks.harness import RESULTS, Results

PAGE = Path(__file__).parents[1] / "docs" / "guide" / "fault-matrix.md"
FRONTS = {
    "plain PyTorch": "benchmarks.faults.plain_front",
    "Lightning": "benchmarks.faults.lightning_front",
    "Keras": "benchmarks.faults.keras_front",
}
DAMAGE = {
    "checkpoint loads": "none",
    "checkpoint truncated": "truncated",
    "checkpoint with a hostile pickle": "hostile pickle",
    "checkpoint of another optimizer": "of another optimizer",
    "checkpoint of another version": "of another version",
}
PRECISION = ("bfloat16 parameters", "autocast bfloat16", "autocast float16")
NUMBERS = [name for name in FAULTS if name.startswith(("NaN", "infinity"))]
HEAD = """# What happens when things go wrong

Written by `neurms bench fault_matrix --page` from `benchmarks/results`; every cell was tried, and
what it says was checked. [Reliability](reliability.md) explains the outcomes.

- **as before**: weights and state have the bits that they had before the step; training on equals,
  bit for bit, a run that never saw the batch.
- **skipped**: with `nonfinite="skip"`, the same without an error.
- **step finished**: Ctrl-C waited for the end of the optimizer's step.
- **resumes**: a new fit from the last checkpoint ends at the bits of a run to which nothing
  happened.
- **layers above had moved**: `update="backward"` had written into layers that backward passed
  first; a `NonFiniteError` names them. Go on from the last checkpoint.
- **bad layers left out**: the same with `nonfinite="skip"`; the other layers were updated.
- **refused**: a stated refusal, before anything changed.

In every cell no hook or tap is left on the model once the optimizer is detached or the fit has
ended, and every weight is finite.
"""


def cells(module: ModuleType) -> dict[str, Callable[[str, Path], str]]:
    """Return a front end's faults with what tries each."""

    def struck(fault: str, **settings: Any) -> Callable[[str, Path], str]:
        return lambda name, folder: module.struck(name, fault, folder, **settings)

    made = {fault: struck(fault) for fault in FAULTS}
    made |= {f'{fault}, nonfinite="skip"': struck(fault, nonfinite="skip") for fault in NUMBERS}
    made["full disk while saving"] = module.full_disk
    for label, damage in DAMAGE.items():
        made[label] = lambda name, folder, d=damage: module.restored(name, folder, d)
    made["a loader's worker dies"] = module.dying_worker
    for kind in PRECISION:
        made[kind] = lambda name, folder, k=kind: module.precision(name, folder, k)
    made["GradScaler overflows"] = module.overflow
    return made


def tried(cell: Callable[[str, Path], str], name: str) -> str:
    """Return a cell's outcome; one that is not a stated one begins with FAILED."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            return cell(name, Path(folder))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"FAILED {type(error).__name__}: {str(error)[:200]} ({where.name}:{where.lineno})"


def is_bad(outcome: str) -> bool:
    """Return whether a cell is something else than one of the stated outcomes."""
    return outcome.startswith("FAILED")


def column(module: ModuleType, name: str) -> dict[str, str]:
    """Return an optimizer's outcomes by fault."""
    return {fault: tried(cell, name) for fault, cell in cells(module).items()}


KILLS = """## Killed and resumed

`neurms bench kill_resume`: a process is killed (SIGKILL) at a random moment of a step, or of a
checkpoint's writing, and resumed from the last complete checkpoint; the weights, optimizer state
and random state at its end are compared with those of a run left alone, bit by bit.

{table}
"""
SOAK = """## Long runs

`neurms bench soak`: a small network, a batch of another size in every step, inputs that are silent
for thousands of steps so that moments become denormal, denormals not flushed. Late over early is
the processor's time of the last tenth of the steps over that of the first; memory is its growth
after the first tenth; U'U - I is the largest entry over all bases and samples.

{table}
"""


def table(header: list[str], lines: list[list[str]]) -> str:
    """Return a Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def kills(content: dict[str, Any]) -> str:
    """Return the section on killed runs."""
    runs = content["runs"]
    lines = []
    for front in dict.fromkeys(key.split()[0] for key in runs):
        own = [run for key, run in runs.items() if key.startswith(front)]
        phases = [sum(run["killed in"] == phase for run in own) for phase in PHASES[:-1]]
        where = ", ".join(f"{p} {n}" for p, n in zip(PHASES, phases, strict=False) if n)
        cut = sum(run["partial file left"] for run in own)
        bad = sum(bool(run["differs in"]) for run in own)
        lines.append([front, str(len(own)), where, str(cut), str(bad)])
    header = ["front end", "kills", "killed in", "half-written files left", "differing ends"]
    return KILLS.format(table=table(header, lines))


def soak(content: dict[str, Any]) -> str:
    """Return the section on long runs."""
    lines = []
    for name, run in content["runs"].items():
        worst = run["worst_orthonormality"]
        lines.append(
            [
                name,
                f"{run['steps']:,}",
                f"{run['late_over_early']:.2f}",
                f"{run['rss_growth_bytes'] / 1024:.0f} KiB",
                str(run["compilations"]),
                "-" if worst is None else f"{worst:.1e}",
                str(run["denormal_numbers"]),
            ]
        )
    header = ["optimizer", "steps", "late over early", "memory", "compilations", "U'U - I"]
    return SOAK.format(table=table([*header, "denormal numbers at the end"], lines))


def page(content: dict[str, Any]) -> str:
    """Return the page that the results files make; this one's content is given."""
    parts = [HEAD]
    for front, module in FRONTS.items():
        found = {key: run for key, run in content["runs"].items() if key.startswith(front)}
        order = importlib.import_module(module).NAMES
        columns = {name: found[f"{front}: {name}"] for name in order if f"{front}: {name}" in found}
        names = list(columns)
        faults = list(next(iter(columns.values())))
        lines = [[fault, *(columns[name].get(fault, "") for name in names)] for fault in faults]
        parts.append(f"## {front}\n\n{table(['fault', *names], lines)}\n")
    for name, section in (("kill_resume", kills), ("soak", soak)):
        parts.append(section(json.loads((RESULTS / f"{name}.json").read_text())))
    return "\n".join(parts)


def main() -> None:
    """Try every cell, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", action="store_true", help="write the page from the results")
    parser.add_argument("--front", choices=FRONTS, action="append")
    parser.add_argument("--only", action="append", help="names of optimizers")
    parser.add_argument("--out", type=Path, default=RESULTS / "fault_matrix.json")
    arguments = parser.parse_args()
    if arguments.page:
        PAGE.write_text(page(json.loads(arguments.out.read_text())))
        return
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = Results(arguments.out, {})
    for front in arguments.front or FRONTS:
        module = importlib.import_module(FRONTS[front])
        for name in arguments.only or module.NAMES:
            key = f"{front}: {name}"
            if any(is_bad(outcome) for outcome in results.runs.get(key, {}).values()):
                del results.runs[key]
            results.run(key, lambda m=module, n=name: column(m, n))
    for key, outcomes in results.runs.items():
        print(*(f"{key}, {fault}: {text}" for fault, text in outcomes.items() if is_bad(text)))


if __name__ == "__main__":
    main()
