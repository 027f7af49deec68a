"""The data of the site's planner, bytes of state and seconds of a step, as a script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.planner import RANKS, RULES, SHAPES

__all__ = ["NAMES", "data", "script"]

Content = Mapping[str, Any]

NAMES = ("planner", "scale")
"""The results files that it reads."""

LIKE = {"AdamW": "AdamW", "NeuRMS U": "NeuRMS-U", "RACS": "RACS", "RMNP": "RMNP"} | {
    name: name for name in ("Muon", "Alice")
}
"""Rules that ``scale.json`` has timed, for a ``planner.json`` without rates."""


def data(contents: Mapping[str, Content]) -> dict[str, Any]:
    """Return what the page shows.

    Args:
        contents: ``planner.json`` and ``scale.json`` by name.

    Returns:
        ``ranks`` and ``rules``, ``sizes`` with their ``parameters``, and by size, ranks and rule
        ``bytes`` of state on one rank and ``seconds`` of its step, None for a rule without rate.
    """
    runs = contents["planner"]["runs"]
    rates = _rates(contents)
    table = {
        size: {
            str(ranks): {
                rule: {
                    "bytes": found["state_bytes"],
                    "seconds": _seconds(found["work"], rates),
                }
                for rule, found in runs[f"{size} on {ranks}"]["rules"].items()
            }
            for ranks in RANKS
        }
        for size in SHAPES
    }
    parameters = {size: runs[f"{size} on 1"]["parameters"] for size in SHAPES}
    return {"ranks": RANKS, "rules": list(RULES), "sizes": parameters, "table": table}


def script(contents: Mapping[str, Content]) -> str:
    """Return the data as a script: a page that is opened from a disk may not fetch files."""
    made = json.dumps(data(contents), separators=(",", ":"))
    return f"// Written by python -m benchmarks.tables.\nwindow.neurmsPlanner = {made};\n"


def _rates(contents: Mapping[str, Content]) -> dict[str, float]:
    """Return nanoseconds for each unit of work, all of them from one run side by side."""
    if own := contents["planner"]["runs"].get("rates"):
        return {rule: row["ns_per_unit"] for rule, row in own.items()}
    timed = contents["scale"]["runs"]["rates"]
    return {rule: timed[name]["ns_per_unit"] for rule, name in LIKE.items()}


def _seconds(work: Mapping[str, float], rates: Mapping[str, float]) -> float | None:
    if any(units and rule not in rates for rule, units in work.items()):
        return None
    total = sum(1e-9 * units * rates[rule] for rule, units in work.items() if units)
    return float(f"{total:.4g}")
