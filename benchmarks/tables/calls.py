"""Python calls of a layer and a step."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.markdown import markdown

CALLS = """## Python calls

`neurms bench calls`: what each optimizer adds to a linear layer (a weight and a bias) of a step,
its hooks in forward and backward included, counted by cProfile over networks of {shallow} and
{deep} hidden layers of {width} units. Small networks wait for these on a CPU, and every network
does on an accelerator.

{table}

`update="backward"` runs a layer's product from Python, which is most of its count.
"""


def calls(content: dict[str, Any]) -> str:
    """Return the section on Python calls."""
    shallow, deep = content["settings"]["layers"]
    lines = [[name, f"{run['calls']:.0f}"] for name, run in content["runs"].items()]
    return CALLS.format(
        shallow=shallow,
        deep=deep,
        width=content["settings"]["width"],
        table=markdown(["", "calls a layer and step"], lines),
    )
