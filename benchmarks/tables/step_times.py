"""The section on what a training step of the perceptrons costs."""

from __future__ import annotations

from typing import Any

from benchmarks.tables.markdown import markdown
from benchmarks.tables.provenance import made_by

__all__ = ["times"]

Content = dict[str, Any]

EPOCH = 60_000 // 128

TIMES = """## What a step costs

Batch, forward, backward, update and schedule of a {net} network at batch 128, methods in
turns of twenty steps; the ratio is to fused AdamW, with quartiles over rounds. An epoch is {epoch}
steps.

{table}

Inference is the model's own: {inference}

{made}
"""


def times(content: Content) -> str:
    """Return the section, a table for each network."""
    runs = content["runs"]
    sections = []
    for net in sorted({key.split(" ")[0] for key in runs if " threads " in key}):
        keys = sorted(key for key in runs if key.startswith(f"{net} batch"))
        names = list(dict.fromkeys(name for key in keys for name in runs[key]))
        lines = [
            [
                name,
                *(part for key in keys for part in _timed(runs[key].get(name))),
                f"{runs[keys[0]][name]['ms'] * EPOCH / 1e3:.2f}",
            ]
            for name in names
        ]
        header = ["method"]
        for key in keys:
            header += [f"ms, {key.split()[-1]} thread(s)", "ratio"]
        sections.append(
            TIMES.format(
                net=net,
                epoch=EPOCH,
                table=markdown([*header, "s an epoch"], lines),
                inference=_inference(runs.get(f"{net} inference")),
                made=made_by(content),
            )
        )
    return "\n".join(sections)


def _timed(row: dict[str, float] | None) -> list[str]:
    if row is None:
        return ["", ""]
    return [f"{row['ms']:.2f}", f"{row['ratio']:.2f} ({row['low']:.2f}..{row['high']:.2f})"]


def _inference(rows: dict[str, Any] | None) -> str:
    if rows is None:
        return "NeuRMS changes no layer, and `detach()` takes its taps off."
    plain, tapped, detached = (rows[name] for name in ("plain", "tapped", "detached"))
    return (
        f"{plain['ms']:.3f} ms for a batch of 128 as it was made, x{detached['ratio']:.2f} "
        f"({detached['low']:.2f}..{detached['high']:.2f}) after NeuRMS trained it and let go "
        f"(`detach()`), x{tapped['ratio']:.2f} with the taps still on."
    )
