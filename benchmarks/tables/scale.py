"""The page on large models: state, traffic and step cost, on paper and checked."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.markdown import markdown
from benchmarks.tables.provenance import made_by

PAGE = """# Scale, on paper

What the optimizers would need for LLaMA of 60M to 70B parameters on {ranks} ranks, in float32. No
large model was made: state comes from `optimizer.plan()` and traffic from `step_exchanges` on
parameters without storage, under torch's fake process group. Each cell says DDP / DDP with
`distribute="owner"` / FSDP2. Written by `python -m benchmarks.tables` from
`benchmarks/results/scale.json`.

## State of the fullest rank, GB

Under DDP every rank holds all of it, or with owners that of its own matrices and all of AdamW's.
Under FSDP2 it holds what belongs to its rows, and what was computed from whole matrices (Alice,
SOAP) of those that it owns.

{state}

## Sent in one step, MB (calls)

Beside DDP's or FSDP2's own traffic, on rank 0. Under DDP only NeuRMS and owners send anything: an
owner the weights of its matrices, once to all. Under FSDP2 a rank sends its parts of all gradients
to their owners, and owners send parts of what they made.

{traffic}

## Step of one rank, seconds on the machine below

Work on one rank times the rate of one {m} x {n} matrix ({threads} threads, CPU): what counts is
one column against another. It is the busiest rank: under FSDP2 work on rows is shared by all, and
products of matrices are done by owners. Alice without its refreshes, NeuRMS without its
statistics, which come with the backward pass. SOAP was not timed.

{steps}

## Checked where it fits

Whole models stepped here: predicted state over measured, and predicted step over measured (ms).

{checks}

Rates of one matrix that lies in the cache in part, and one rate for products of all shapes, are a
simple picture: the last column says how good it is.

{source}
"""

WAYS = ("ddp", "ddp, owners", "fsdp2")
Content = dict[str, Any]


def page(files: dict[str, Content]) -> str:
    """Return the page, from the content of ``scale.json``."""
    content = files["scale"]
    runs, settings = content["runs"], content["settings"]
    sizes = [name for name in runs if name != "rates" and not name.startswith("check")]
    sizes.sort(key=lambda name: runs[name]["AdamW"]["parameters"])
    rates = {name: row["ns_per_unit"] for name, row in runs["rates"].items()}
    m, n = settings["matrix"]

    def table(cell: Any) -> str:
        methods = list(runs[sizes[0]])
        lines = [
            [method, *(" / ".join(cell(runs[size][method][way]) for way in WAYS) for size in sizes)]
            for method in methods
        ]
        return markdown(["optimizer", *sizes], lines)

    return PAGE.format(
        ranks=settings["ranks"],
        threads=settings["threads"],
        m=m,
        n=n,
        state=table(lambda found: f"{found['state_bytes'] / 1e9:.3g}"),
        traffic=table(_sent),
        steps=table(lambda found: _seconds(found["work"], rates)),
        checks=_checks(runs, rates),
        source=made_by(content),
    )


def _sent(found: Content) -> str:
    if not found["calls"]:
        return "0"
    return f"{found['traffic_bytes'] / 1e6:.3g} ({found['calls']})"


def _seconds(work: dict[str, float], rates: dict[str, float]) -> str:
    if any(units and name not in rates for name, units in work.items()):
        return "-"
    return f"{_predicted(work, rates):.3g}"


def _predicted(work: dict[str, float], rates: dict[str, float]) -> float:
    return sum(1e-9 * units * rates[name] for name, units in work.items() if units)


def _checks(runs: Content, rates: dict[str, float]) -> str:
    lines = []
    for name in sorted(run for run in runs if run.startswith("check ")):
        size = name.removeprefix("check ")
        for method, found in runs[name].items():
            paper = runs[size][method]["ddp"]
            step = 1e3 * _predicted(paper["work"], rates)
            lines.append(
                [
                    size,
                    method,
                    f"{paper['state_bytes'] / found['state_bytes']:.3f}",
                    f"{step:.1f}",
                    f"{found['ms']:.1f}",
                    f"{step / found['ms']:.2f}",
                ]
            )
    header = ["model", "optimizer", "state", "step predicted", "step measured", "ratio"]
    return markdown(header, lines)
