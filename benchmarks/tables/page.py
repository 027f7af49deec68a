"""The sections of the results page, in order, and of the page on what is older than the rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.tables import contests, headline, headline_chart, text_page
from benchmarks.tables.accuracy import mnist
from benchmarks.tables.answers import COSTS_OF, NAMES, answers, costs
from benchmarks.tables.llama_cpu import llama_cpu
from benchmarks.tables.speed import speed

__all__ = ["OLDER", "SHOWN", "older", "page"]

Content = dict[str, Any]

OTHERS = {
    "step_zen4": "on AMD's Zen 4, later: NeuRMS-P and RACS take their steps in one call here",
    "step_avx2": "where the processor has no products of bfloat16 numbers (AVX2)",
    "step_amx": "where it has a matrix unit for them (AMX), of an older state of the library",
}
"""Results files of whole steps on other processors, and what tells those apart."""

LLAMAS = {
    "llama_cpu_zen4": "on AMD's Zen 4, later",
    "llama_cpu_zen3": "on AMD's Zen 3: P by averages, and Muon with three rounds in the place of "
    "five",
}
"""Results files of the larger LLaMA on other processors, and what tells those apart."""

SHOWN = (
    *headline.NAMES,
    *COSTS_OF,
    *OTHERS,
    "step_small",
    "kernels_zen3",
    "llama_cpu",
    *LLAMAS,
)
"""The results files of the page."""

OLDER = (*NAMES, "mnist")
"""The results files of the older page."""

HEAD = """# Results

Every table and figure here is written by `python -m benchmarks.tables` from a file under
`benchmarks/results/`, which also holds the settings, versions and machine of its runs. Seconds come
from a small shared machine and are good for rough ratios only. What was compared before there were
rules for it stands on [a page of its own](results/before.md).
"""

CHART = """![{described}](assets/contest.svg)
"""

BEFORE = """# Before the rules

Comparisons that are older than the rules in benchmarks/README.md, with what they broke. They stand
until they are run again.
"""


def page(contents: Mapping[str, Content]) -> str:
    """Return the results page, which leads with what holds under the rules."""
    judged = {name: contents[name] for name in contests.NAMES if name in contents}
    drawn = headline_chart.chart(contents)
    sections = [
        CHART.format(described=headline_chart.described(contents[headline_chart.TASK]))
        if drawn
        else "",
        contests.summary(judged),
        llama_cpu(contents["llama_cpu"], {w: contents.get(name) for name, w in LLAMAS.items()})
        if "llama_cpu" in contents
        else "",
        costs(contents),
        speed(
            contents["kernels"],
            contents["step"],
            {where: contents.get(name) for name, where in OTHERS.items()},
            contents.get("step_small"),
            contents.get("kernels_zen3"),
        ),
    ]
    return "\n".join([HEAD, *filter(None, sections)])


def older(contents: Mapping[str, Content]) -> str:
    """Return the page on comparisons from before the rules."""
    sections = [
        answers(contents),
        mnist(contents["mnist"]),
        text_page.summary({name: contents[name] for name in ("llama", "llama_step")}),
    ]
    return "\n".join([BEFORE, *sections])
