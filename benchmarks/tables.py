"""Write ``docs/results.md`` from the results kept in the repository.

python -m benchmarks.tables          # rewrite the page
python -m benchmarks.tables --check  # fail if the page is not what the files say
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS
from benchmarks.llama import rows as llama_rows

PAGE = Path(__file__).parents[1] / "docs" / "results.md"

HEAD = """# Results

Every table here is written by `python -m benchmarks.tables` from a file under
`benchmarks/results/`, which also holds the settings, versions and machine of its runs. Seconds come
from a small shared machine and are good for rough ratios only.
"""

MNIST = """## MNIST, two epochs

`neurms bench mnist`: a 784-512-512-10 ReLU network, batch 128, cosine schedule, 2 epochs. The
learning rate of each method is the best of the same grid on held-out training images; test accuracy
is the mean over {seeds} seeds, compared with AdamW seed by seed (difference in points, p of a
paired t-test).

{table}

AdamW, SGD with momentum and NeuRMS-U cannot be told apart here. NeuRMS-F and B stand behind, and U
without momentum does too.
"""

LLAMA = """## A small LLaMA on English prose

`python -m benchmarks.llama`: bytes as tokens, 3 layers, width 128, context {context}, batch
{batch}, {steps} steps with warmup and cosine. Every optimizer had at least four learning rates,
{tune} steps each, a factor of two or three apart, until the best lay inside or the budget was
spent, then {seeds} at the best one. Parameters outside the rule go to AdamW at the rate that is
best for AdamW alone. Step ratio: AdamW's steps over the optimizer's to AdamW's final loss.
Effective throughput: the same in seconds. Above 1 is better than AdamW; a dash means that AdamW's
final loss was not reached.

{table}

Muon, Alice and RACS need fewer steps than AdamW at their papers' settings. RMNP does not at its
own momentum of .95, whose best rate lies inside the grid; with momentum .8 (chosen afterwards, its
best rate at the grid's upper edge) it does, so in a run this short its memory is too long.
SharedBasis, at the lowest rate of its grid, stays behind in {steps} steps.
"""


SPEED = """## Speed

Medians of interleaved rounds in one process, fresh data each round, denormals flushed, {threads}
threads; ratios are medians of paired ratios. Below 1 is faster than the baseline.

`neurms bench kernels`: the optimizer's step alone on one matrix, in ms and against torch's fused
AdamW.

{kernels}

`neurms bench step`: forward, backward and update of a ReLU network, against torch's fused SGD.

{step}

On large matrices RMNP's step costs what fused AdamW's does and RACS's 1.3 to 1.7 times as much; at
1024 x 1024 both cost about twice as much. `update="backward"` pays where weights are large beside
the batch; where they are not, NeuRMS costs 4 to 11 percent more than fused SGD.
"""


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, first column left, the others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def mnist(content: dict[str, Any]) -> str:
    """Return the MNIST section."""
    lines = []
    for row in content["summary"]:
        against = row.get("against_baseline")
        lines.append(
            [
                row["method"],
                f"{row['lr']:g}",
                f"{row['mean']:.4f}",
                f"{row['std']:.4f}",
                f"{100 * against['difference']:+.2f}" if against else "",
                f"{against['p']:.3f}" if against else "",
                f"{row['cpu_seconds']:.1f}",
            ]
        )
    header = ["method", "lr", "test accuracy", "std", "minus AdamW", "p", "CPU s"]
    return MNIST.format(seeds=len(content["summary"][0]["scores"]), table=markdown(header, lines))


def llama(content: dict[str, Any]) -> str:
    """Return the language model's section."""
    steps, tune = 600, 200
    found = sorted(llama_rows(content["runs"], steps), key=lambda row: row["loss"])
    show: Callable[[float | None], str] = lambda x: "-" if x is None else f"{x:.2f}"  # noqa: E731
    lines = [
        [
            row["optimizer"],
            row["lr"],
            f"{row['loss']:.4f}",
            "-" if row["std"] is None else f"{row['std']:.4f}",
            f"{row['seconds']:.0f}",
            show(row["step_ratio"]),
            show(row["throughput"]),
        ]
        for row in found
    ]
    header = ["optimizer", "lr", "loss", "std", "s", "step ratio", "effective throughput"]
    counts = sorted({row["seeds"] for row in found})
    seeds = f"{' to '.join(map(str, counts))} seed{'' if counts == [1] else 's'}"
    settings = content["settings"]
    return LLAMA.format(
        context=settings["context"],
        batch=settings["batch"],
        steps=steps,
        tune=tune,
        seeds=seeds,
        table=markdown(header, lines),
    )


def speed(kernels: dict[str, Any], step: dict[str, Any]) -> str:
    """Return the section on speed."""

    def table(content: dict[str, Any], cell: str) -> str:
        runs = content["runs"]
        names = list(dict.fromkeys(name for run in runs.values() for name in run))
        lines = [
            [name, *(cell.format(**run[name]) if name in run else "" for run in runs.values())]
            for name in names
        ]
        return markdown(["optimizer", *runs], lines)

    return SPEED.format(
        threads=kernels["settings"]["threads"],
        kernels=table(kernels, "{ms:.2f} (x{ratio:.2f})"),
        step=table(step, "x{ratio:.3f}"),
    )


def page() -> str:
    """Return the page that the results files make."""

    def read(name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
        return content

    made = [mnist(read("mnist")), llama(read("llama")), speed(read("kernels"), read("step"))]
    return "\n".join([HEAD, *made])


def main() -> None:
    """Write the page, or check it."""
    if "--check" in sys.argv[1:]:
        if PAGE.read_text() != page():
            raise SystemExit(
                "docs/results.md is not what benchmarks/results says; run it without --check"
            )
    else:
        PAGE.write_text(page())


if __name__ == "__main__":
    main()
