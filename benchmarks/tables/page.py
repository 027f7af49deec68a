"""The sections of the results page, in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS
from benchmarks.tables import contests, text_page
from benchmarks.tables.accuracy import mnist
from benchmarks.tables.answers import NAMES, answers
from benchmarks.tables.speed import speed

PAGE = Path(__file__).parents[2] / "docs" / "results.md"

SHOWN = (*NAMES, "mnist")
"""The results files of the page."""

HEAD = """# Results

Every table here is written by `python -m benchmarks.tables` from a file under
`benchmarks/results/`, which also holds the settings, versions and machine of its runs. Seconds come
from a small shared machine and are good for rough ratios only.
"""


def read(name: str) -> dict[str, Any]:
    """Return the content of one results file."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def page() -> str:
    """Return the page that the results files make."""
    judged = {n: read(n) for n in contests.NAMES if (RESULTS / f"{n}.json").is_file()}
    sections = [
        contests.summary(judged),
        answers({name: read(name) for name in NAMES}),
        mnist(read("mnist")),
        text_page.summary({name: read(name) for name in ("llama", "llama_step")}),
        speed(read("kernels"), read("step")),
    ]
    return "\n".join([HEAD, *filter(None, sections)])
