"""How fast the optimizers are: their step alone and a whole training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.tables.markdown import markdown
from benchmarks.tables.provenance import made_by

SPEED = """## Speed

Medians of interleaved rounds in one process, fresh data each round, denormals flushed, {threads}
threads; ratios are medians of paired ratios. Below 1 is faster than the baseline.

`neurms bench kernels`: the optimizer's step alone on one matrix, in ms and against torch's fused
AdamW.

{kernels}
{reach}{kernels_too}
`neurms bench step`: forward, backward and update of a ReLU network, against torch's fused SGD. In
rows marked bf16 NeuRMS's own product, which stands for the gradient of the weights, is in bfloat16
and all others are in float32; in rows marked all in bf16 the model's own are, too
(`torch.set_float32_matmul_precision("medium")`).

{step}

{made}
{elsewhere}{small}"""

REACH = """
How near these come to their limit, the bytes that they must read and write at the speed of a plain
copy in the same rounds, in percent (over 100: kept in the processor's caches, or a copy that is not
the fastest that memory allows):

{table}
"""

KERNELS_TOO = """
The same on AMD's Zen 3, later, with the forms of NeuRMS-P that keep an average of gradients:

{table}

{made}
"""

ELSEWHERE = """
The same {where}:

{step}

{made}
"""


SMALL = """
A network that is small enough to wait for Python, one thread:

{step}

{made}
"""


def speed(
    kernels: dict[str, Any],
    step: dict[str, Any],
    elsewhere: Mapping[str, dict[str, Any] | None],
    small: dict[str, Any] | None = None,
    kernels_too: dict[str, Any] | None = None,
) -> str:
    """Return the section on speed.

    Args:
        kernels: ``kernels.json``.
        step: ``step.json``.
        elsewhere: Steps on other processors by what tells those apart, None if not timed there.
        small: Steps of a small network, if they were timed.
        kernels_too: As ``kernels``, of another machine.
    """

    def table(content: dict[str, Any], cell: str) -> str:
        # Other libraries' have a table of their own.
        runs = {k: run for k, run in content["runs"].items() if not k.startswith("peers ")}
        names = list(dict.fromkeys(name for run in runs.values() for name in run))
        lines = [
            [name, *(cell.format(**run[name]) if name in run else "" for run in runs.values())]
            for name in names
        ]
        return markdown(["optimizer", *runs], lines)

    cell = "{ms:.2f} (x{ratio:.2f})"
    return SPEED.format(
        reach=_reach(kernels["runs"]),
        threads=kernels["settings"]["threads"],
        kernels=table(kernels, cell),
        kernels_too=""
        if kernels_too is None
        else KERNELS_TOO.format(table=table(kernels_too, cell), made=made_by(kernels_too)),
        step=table(step, "x{ratio:.3f}"),
        made=made_by(step),
        elsewhere="".join(
            ELSEWHERE.format(where=where, step=table(other, "x{ratio:.3f}"), made=made_by(other))
            for where, other in elsewhere.items()
            if other is not None
        ),
        small=""
        if small is None
        else SMALL.format(step=table(small, "x{ratio:.3f}"), made=made_by(small)),
    )


def _reach(runs: dict[str, Any]) -> str:
    """Return the table of how near steps come to their limit, empty for files without it."""
    sizes = {k: run for k, run in runs.items() if any("reach" in row for row in run.values())}
    names = dict.fromkeys(n for run in sizes.values() for n, row in run.items() if "reach" in row)
    lines = [
        [name, *(f"{100 * run[name]['reach']:.0f}" for run in sizes.values())] for name in names
    ]
    return REACH.format(table=markdown(["optimizer", *sizes], lines)) if lines else ""
