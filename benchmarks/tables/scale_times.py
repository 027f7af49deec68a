"""The page on step times of sharded training: the model, its check, its predictions."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.markdown import markdown
from benchmarks.tables.provenance import made_by

PAGE = """# Step times under FSDP2, by a model

What a step of the optimizer takes where FSDP2 cuts every weight: a rank's share of the work, timed
on one rank, and its exchanges one after the other, none overlapped. R ranks reduce b bytes in
2 (R - 1) (L + b / (R B)), L the latency of a message and B the bandwidth. FSDP2's own traffic is
not in it. Rules that work by rows; float32. Written by `python -m benchmarks.tables` from
`benchmarks/results/scale_times.json`.

## Checked here

A LLaMA of two layers, {elements:.0f}M parameters, on 1, 2 and 4 ranks of {cores} cores over gloo;
L and B as small and large all-reduces had them at the same time. Each cell: CPU ms of a rank and
what one rank's give for it, then ms by the clock and the model's share of them. Four ranks on two
cores count as half a core each. The model is low in every cell: with matrices this small a part of
a rank's CPU time is calls, which no number of ranks divides (the first pair of figures), and ranks
wait for each other at every exchange (the second). Latency could not be shaped: netem is no part
of this machine's kernel.

{checks}

## Predicted

{matters}: ms of a step, as work + exchanges for each of the two networks. The work is this
machine's, one core for each rank, and a GPU takes other times; L and B are stated, not measured.
Of 512 ranks the exchanges are too long: a ring passes R - 1 messages, where NCCL has trees for
small ones. What they show is what counts there: the number of calls.

{predictions}

{source}
"""

Content = dict[str, Any]


def page(files: dict[str, Content]) -> str:
    """Return the page, from the content of ``scale_times.json``."""
    content = files["scale_times"]
    runs = content["runs"]
    checks = [name for name in runs if name.startswith("check")]
    large = [name for name in runs if not name.startswith("check")]
    return PAGE.format(
        elements=content["settings"]["elements"] / 1e6,
        cores=content["settings"]["cores"],
        checks=_checks({name: runs[name] for name in checks}),
        matters=_links(runs[large[0]]),
        predictions=_predictions({name: runs[name] for name in large}),
        source=made_by(content),
    )


def _methods(found: Content) -> list[str]:
    return [name for name, row in found.items() if isinstance(row, dict)]


def _checks(runs: Content) -> str:
    columns = [(name, ranks) for name in runs for ranks in ("2", "4")]
    lines = [
        [method, *(_checked(runs[name][ranks][method]) for name, ranks in columns)]
        for method in _methods(runs[columns[0][0]]["1"])
    ]
    network = [
        f"{found['latency_us']:.0f} us, {found['bytes_per_s'] / 1e9:.2g} GB/s"
        for found in (runs[name][ranks] for name, ranks in columns)
    ]
    header = [f"{ranks} ranks{name.removeprefix('check')}" for name, ranks in columns]
    return markdown(["optimizer", *header], [["L, B as measured", *network], *lines])


def _checked(row: Content) -> str:
    share = row["predicted_ms"] / row["ms"]
    return f"{row['cpu_ms']:.1f} ({row['work_ms']:.1f}), {row['ms']:.1f} ({share:.2f})"


def _links(found: Content) -> str:
    return "; ".join(next(iter(found.values()))["exchange_ms"])


def _predictions(runs: Content) -> str:
    methods = _methods(next(iter(runs.values())))
    lines = [
        [
            f"{name} ranks",
            *(
                f"{row['work_ms']:.1f} + "
                + " or ".join(f"{ms:.2g}" for ms in row["exchange_ms"].values())
                for row in (found[method] for method in methods)
            ),
        ]
        for name, found in runs.items()
    ]
    return markdown(["model", *methods], lines)
