"""What neurms adds to a process's start."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.markdown import markdown

STARTUP = """## Start

`neurms bench startup`: medians over fresh processes. `import neurms` loads an index; each name's
module comes when it is first used, which the warm-up has in it. The warm-up builds NeuRMS-F with
momentum and takes a first step, with every kernel's earlier compilations found on disk.

{table}

With `backend="inductor"` the larger part is importing torch's compiler and tracing the
kernels anew.
"""


def startup(content: dict[str, Any]) -> str:
    """Return the section on importing and warming up."""
    lines = [
        [name, f"{run['median_s']:.4f}", f"{run['max_s']:.4f}"]
        for name, run in content["runs"].items()
    ]
    return STARTUP.format(table=markdown(["", "median, s", "longest, s"], lines))
