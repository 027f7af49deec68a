"""The first screen of the results page: which optimizer, at what cost, and how sure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.perceptron_rows import Cell, cells
from benchmarks.tables import text
from benchmarks.tables.duels import alone, float32, matrix, outcomes, places, summary
from benchmarks.tables.markdown import counted, markdown

Content = Mapping[str, Any]

NAMES = ("perceptrons", "step_times", "llama", "llama_step")
"""The results files that the answers are drawn from."""

COSTS_OF = ("step", "memory", "kernels")
STEPS = {
    "NeuRMS-P": "NeuRMS-P",
    "rmnp": "RMNP",
    "racs": "RACS",
    "racs tracked": '`RACS(fit="tracked")`',
    "racs sums": '`RACS(fit="sums")`',
}
"""What the first screen says of the step alone: rows of ``kernels.json``, and their names."""
"""The results files that memory and step times are drawn from."""

ANSWERS = """## Which optimizer should I use on my CPU?

**Language models and transformers.** A small LLaMA, 600 steps, {language_seeds} seeds, every
method tuned with the same number of trials:

{language}

**Small perceptrons.** At equal wall-clock, one thread, {seeds} seeds: test accuracy of the
NeuRMS that validation images choose less that of the best other method, in points, bold where *p*,
a paired t-test's after Holm's correction, is below .05:

{perceptrons}

{summary} {small}{bf16}

How sure: a few seeds, minutes of training. Rankings with p below .05 should hold elsewhere at these
scales; seconds will not, their ratios roughly. [Another machine](again.md) ran some of it
again. No run here took longer than about a quarter of an hour, most a minute or two, so nothing
here says what happens in long ones.
"""

COSTS = """## What it costs

**Large layers, little memory.** {backward}

**What a step costs**, against torch's fused AdamW on one matrix, two threads:

{steps}
"""


def answers(contents: Mapping[str, Content]) -> str:
    """Return the section on accuracies and losses.

    Args:
        contents: Of the results files of :data:`NAMES`, by name.
    """
    found = cells(contents["perceptrons"]["runs"], contents["step_times"]["runs"])
    return ANSWERS.format(
        language_seeds=text.seeds(contents["llama"]),
        seeds=counted(len(cell.scores) for cell in found),
        language=text.answers(contents["llama"], contents["llama_step"]),
        perceptrons=matrix(outcomes(float32(found))),
        summary=summary(outcomes(float32(found))),
        bf16=_narrow(found),
        small=_stateless(found),
    )


def costs(contents: Mapping[str, Content]) -> str:
    """Return the section on memory and step times.

    Args:
        contents: Of the results files of :data:`COSTS_OF`, by name.
    """
    return COSTS.format(
        backward=_backward(contents["step"]["runs"], contents["memory"]["runs"]),
        steps=_steps(contents["kernels"]["runs"]),
    )


def _narrow(found: Sequence[Cell]) -> str:
    """Return how NeuRMS stands with its product in bfloat16, empty where that was not run."""
    if len(float32(found)) == len(found):
        return ""
    every = outcomes(found)
    return (
        "\n\nWith its product of errors and inputs in bfloat16, on a processor that has it, "
        f"against the same others in float32:\n\n{matrix(every)}\n\n{summary(every)} {alone(every)}"
    )


def _stateless(found: Sequence[Cell]) -> str:
    net, lines = places(found)[0][1], []
    for place in places(found):
        at = {cell.method: cell for cell in found if cell.place == place}
        if place[1] == net and "NeuRMS-U" in at and "AdamW" in at:
            points = 100 * (at["NeuRMS-U"].mean - at["AdamW"].mean)
            lines.append([f"{place[0]}, {place[2]:g} s", f"{points:+.2f}"])
    state = {c.method: c.state_bytes for c in found if c.place[1] == net}
    return (
        f"For {net} NeuRMS-U without momentum keeps {state['NeuRMS-U'] / 1e3:.0f} kB of state "
        f"where AdamW keeps {state['AdamW'] / 1e3:,.0f}; what that costs in points:\n\n"
        f"{markdown(['budget', 'to AdamW'], lines)}"
    )


def _backward(steps: Content, memory: Content) -> str:
    wide = next(run for name, run in steps.items() if "4096" in name)
    narrow = next(run for name, run in steps.items() if "4096" not in name)
    name, rounded = "NeuRMS-U backward", "NeuRMS-U backward bf16"
    peak = {k: run["resident_bytes"] / 2**20 for k, run in memory.items()}
    sgd, fused = peak["sgd"], peak["adamw fused"]
    wide_ratio = {method: f"{run['ratio']:.2f}" for method, run in wide.items()}
    weights = memory[name]["weight_bytes"] / 2**20
    return (
        '`NeuRMS(model, update="backward")` never holds the gradients. A training step of\n'
        f"1024-4096-4096-1024 takes {wide_ratio[name]} of fused SGD's time (fused AdamW "
        f"{wide_ratio['adamw fused']}, default AdamW\n{wide_ratio['adamw']}); at its peak "
        f"the process holds {peak[name]:.0f} MiB, {weights:.0f} of them the weights, where SGD "
        f"{sgd:.0f} and fused AdamW {fused:.0f}. At 784-1024-1024-10, batch 128, "
        f"it takes {narrow[name]['ratio']:.2f} of fused\nSGD's time "
        f'(`update="step"`: {narrow["NeuRMS-U step"]["ratio"]:.2f}). '
        f'With `gemm="bfloat16"`, where the processor multiplies such numbers itself, the larger\n'
        f"network's step takes {wide_ratio[rounded]} and the smaller one's "
        f"{narrow[rounded]['ratio']:.2f}."
    )


def _steps(kernels: Content) -> str:
    sizes = {name: run for name, run in kernels.items() if name[0].isdigit()}
    lines = [
        [shown, *(f"{run[method]['ratio']:.2f}" for run in sizes.values())]
        for method, shown in STEPS.items()
    ]
    return markdown(["", *sizes], lines)
