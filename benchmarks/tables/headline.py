"""The first screen of the README and of the site: a chart, three lines, five lines of code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from benchmarks.tables import contests
from benchmarks.tables.choices import IMAGES, LANGUAGE, LARGER, choice, lines
from benchmarks.tables.headline_chart import TASK, chart, described
from benchmarks.tables.naming import constructed

__all__ = ["NAMES", "block", "replaced"]

NAMES = (*contests.NAMES, "contest_step_text", *LARGER)
"""The results files that it reads."""

BEGIN = "<!-- begin: written by python -m benchmarks.tables -->"
END = "<!-- end: written by python -m benchmarks.tables -->"

BLOCK = """{begin}

{chart}{lines}

```python
import neurms, torch

model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
{optimizer}
model(torch.randn(16, 64)).square().mean().backward()
optimizer.step()
```

{end}"""

CHART = """![{described}]({path})

"""

PLAIN = 'optimizer = neurms.NeuRMS(model, lr=0.01, variant="P")'
"""Where no comparison has a row beside AdamW."""


def block(contents: Mapping[str, Any], path: str) -> str:
    """Return the block between its markers.

    Args:
        contents: Of the results files of :data:`NAMES` that there are, by name.
        path: Of the chart, from where the block stands.
    """
    drawn = chart(contents)
    best = choice(contents, (*LANGUAGE, *IMAGES))
    return BLOCK.format(
        begin=BEGIN,
        end=END,
        chart=CHART.format(described=described(contents[TASK]), path=path) if drawn else "",
        lines="\n".join(f"- {line}" for line in lines(contents, contents.get("contest_step_text"))),
        optimizer=PLAIN if best is None else constructed(best.row),
    )


def replaced(page: str, block: str) -> str:
    """Return a page with what stands between its markers replaced.

    Raises:
        ValueError: The page has not exactly one pair of markers.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(page)) != 1:
        raise ValueError(f"the page must hold {BEGIN!r} and {END!r} once; write them where it goes")
    return pattern.sub(lambda _: block, page)
