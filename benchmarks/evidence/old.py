"""Results files from before the rules: their tables stand until their runs are made anew.

A file leaves this list when it is run again as a contest; nothing may be added.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

__all__ = ["MEASUREMENTS", "OLD", "notice"]

OLD = {
    "ablations": "its rates are chosen on the split of a seed that is reported",
    "ablations_fashion_mnist": "as ablations",
    "ablations_fashion_mnist_110": "as ablations",
    "again/mnist": "as mnist",
    "again/scales": "as scales",
    "autoencoder": "no momenta searched, unequal seeds",
    "cifar": "no momenta searched, three seeds, unequal searches",
    "gpt2": "no momenta searched, chosen on the reported text",
    "leads": "no momenta searched, chosen on the reported text, three seeds",
    "llama": "AdamW's betas not searched, chosen on the reported text, unequal seeds",
    "mnist": "no momenta searched, seed 0 both tunes and counts",
    "perceptrons": "no momenta searched, bfloat16 beside float32, five seeds",
    "scales": "AdamW's betas not searched, chosen on the reported text, two or three seeds",
}
"""Comparisons of losses or accuracies under the old rules, with what they break."""

MEASUREMENTS = (
    "again/llama_step",
    "calls",
    "compiled_step",
    "contest_step",
    "fault_matrix",
    "kernels",
    "kill_resume",
    "llama_cpu",
    "llama_cpu_zen3",
    "llama_cpu_zen4",
    "llama_step",
    "memory",
    "overhead",
    "overhead_moments",
    "planner",
    "profiler/*",
    "profiler_cost",
    "scale",
    "scale_times",
    "shapes",
    "soak",
    "startup",
    "step",
    "step_amx",
    "step_avx2",
    "step_images",
    "step_small",
    "step_times",
    "step_zen4",
    "contest_step_text",
    "contest_step_zen3",
    "kernels_zen3",
    "zero_adapter",
)
"""Files of times, bytes and faults, which compare no losses."""


def notice(names: Iterable[str]) -> str:
    """Return what a page says of its files that are under the old rules, empty for none."""
    old = [name for name in names if name in OLD]
    if not old:
        return ""
    files = "; ".join(f"`{name}` ({OLD[name]})" for name in old)
    text = (
        "What these files compare is from before the rules in benchmarks/README.md and is to be "
        f"run again: {files}."
    )
    body = textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    ")
    return f'!!! warning "Under the old rules"\n\n{body}\n'
