"""The section on a language model that people train on CPUs: tokens per second and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.tables.markdown import markdown
from benchmarks.tables.provenance import made_by

__all__ = ["llama_cpu"]

KINDS = {
    "float32": "float32",
    "bfloat16": "under autocast to bfloat16",
    "LoRA": "fine-tuning adapters of rank {rank}, float32",
}

SECTION = """## A language model on a CPU

`neurms bench llama_cpu`: a LLaMA of 19 M parameters (width 512, 6 layers, 4 x 256 tokens),
{threads} threads. Each method in a process of its own, in turns with one that has fused AdamW; the
ratio is of a whole training step to that. A step is the mean over {interval} steps, so that what a
rule does once in a while is counted as often as it happens; the worst of them stands beside it.
State is the optimizer's, peak the most that the process held. Alice-0 and GaLore have rank 128 and
interval 200, SharedBasis has rank 32, SOAP interval 10 (with one basis it
leaves sides of 1,376 alone), Shampoo interval 20.

{tables}

{made}
{elsewhere}"""

ELSEWHERE = """
The same model {where}:

{tables}

{made}
"""


def llama_cpu(
    content: dict[str, Any], elsewhere: Mapping[str, dict[str, Any] | None] | None = None
) -> str:
    """Return the section, a table for each kind of training that was timed.

    Args:
        content: ``llama_cpu.json``.
        elsewhere: The same of other machines, by where that was; None where it was not timed.
    """
    settings = content["settings"]
    return SECTION.format(
        threads=settings["threads"],
        interval=settings["interval"],
        tables=_tables(content),
        made=made_by(content),
        elsewhere="".join(
            ELSEWHERE.format(where=where, tables=_tables(other), made=made_by(other))
            for where, other in (elsewhere or {}).items()
            if other is not None
        ),
    )


def _tables(content: dict[str, Any]) -> str:
    tables = []
    for kind, title in KINDS.items():
        prefix = f"{kind} "
        runs = {k.removeprefix(prefix): v for k, v in content["runs"].items() if prefix in k}
        if runs:
            said = title.format(rank=content["settings"]["rank of adapters"])
            tables.append(f"{said[0].upper()}{said[1:]}:\n\n{_table(runs)}")
    return "\n\n".join(tables)


def _table(runs: dict[str, dict[str, Any]]) -> str:
    header = ["", "tokens/s", "ratio", "forward, backward ms", "step ms", "worst ms", "state MB"]
    lines = [
        [
            name,
            f"{run['tokens_per_s']:,.0f}",
            f"{run['ratio']:.2f}",
            f"{run['passes_ms']:,.0f}",
            f"{run['step_ms']:,.1f}",
            f"{run['worst_step_ms']:,.0f}",
            f"{run['state_bytes'] / 1e6:,.1f}",
            f"{run['peak_bytes'] / 1e6:,.0f}",
        ]
        for name, run in runs.items()
    ]
    return markdown([*header, "peak MB"], lines)
