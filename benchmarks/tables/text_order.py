"""The section on RMNP's place over steps, batch, width and depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.language import final
from benchmarks.language_rows import best_rate, finals
from benchmarks.tables.markdown import markdown
from benchmarks.tables.provenance import made_by

__all__ = ["cell_losses", "order"]

Content = dict[str, Any]
Cells = Mapping[str, Mapping[str, float]]

LEAST_TRIALS = 2
RMNP = {"rmnp": "RMNP at its own momentum of .95", "rmnp-momentum.8": "RMNP at momentum .8"}

ORDER = """## Where the published order of RMNP begins

The smaller LLaMA again, one thing changed at a time; at each scale each method is tuned anew at the
full number of steps. Cells: mean loss on seeds that were not tuned on (where a row says so, the
best loss on the seed that was), and in brackets the gap to AdamW there; then the share of Muon's
gain on AdamW that RMNP has. The paper's order is RMNP about Muon, both ahead of AdamW: a share
about 100 %.

{table}

{verdict}

![Final loss against AdamW's over steps](figures/text-order.svg)

{made}
"""


def order(content: Content) -> str:
    """Return the section on RMNP over scales."""
    lines, names = [], list(content["settings"]["methods"])
    found: dict[str, dict[str, float]] = {}
    for name in content["settings"]["cells"]:
        losses, seeds = cell_losses(content, name)
        if len(losses) > 1:
            found[name] = losses
            line = [f"{name}, {seeds}", *(_gap(losses, method) for method in names)]
            lines.append([*line, *(_percent(_share(losses, method)) for method in RMNP)])
    base = "width 64, 2 layers, batch 8, 300 steps, but for:"
    header = [base, *names, *(f"{method}, share" for method in RMNP)]
    return ORDER.format(
        table=markdown(header, lines),
        verdict=f"{_verdict(found)}{_edges(content, found)}",
        made=made_by(content),
    )


def cell_losses(content: Content, name: str) -> tuple[dict[str, float], str]:
    """Return each method's loss in a cell of ``scales.json``, and over which seeds it is.

    Where some method has no run but those that chose its rate, all are compared by these.
    """
    steps = content["settings"]["cells"][name]["steps"]
    runs, prefix = content["runs"], f"{name} "
    tried = [key.split()[2] for key in runs if key.startswith(f"{prefix}tune ")]
    found = finals(runs, steps, prefix)
    if found and set(tried) <= set(found):
        losses = {m: sum(map(final, own.values())) / len(own) for m, own in found.items()}
        return losses, f"{len(found['adamw'])} seeds"
    best = {
        method: min(
            final(run) for k, run in runs.items() if k.startswith(f"{prefix}tune {method} ")
        )
        for method in dict.fromkeys(tried)
        if tried.count(method) >= LEAST_TRIALS
    }
    return best, "the tuning seed"


def _share(losses: Mapping[str, float], method: str) -> float | None:
    """Return which part of Muon's gain on AdamW a method has, None where Muon has none."""
    if not losses.keys() >= {method, "muon"} or losses["muon"] >= losses["adamw"]:
        return None
    return (losses["adamw"] - losses[method]) / (losses["adamw"] - losses["muon"])


def _verdict(found: Cells) -> str:
    """Return in words where RMNP is ahead of AdamW, and how near it comes to Muon."""
    parts = []
    for method, title in RMNP.items():
        gaps = {n: cell[method] - cell["adamw"] for n, cell in found.items() if method in cell}
        shares = {
            name: share for name in gaps if (share := _share(found[name], method)) is not None
        }
        ahead = [name for name, gap in gaps.items() if gap < 0]
        behind = [name for name in gaps if name not in ahead]
        text = [f"ahead of AdamW at {', '.join(ahead)}"] if ahead else []
        text += [f"behind it at {', '.join(behind)}"] if behind else []
        if not text:
            continue
        parts.append(f"{title} is {' and '.join(text)}")
        if shares:
            most, least = max(shares, key=shares.__getitem__), min(shares, key=shares.__getitem__)
            parts[-1] += (
                f"; of Muon's gain it has from {shares[least]:.0%} ({least}) to "
                f"{shares[most]:.0%} ({most})"
            )
        parts[-1] += "."
    return " ".join(parts)


def _edges(content: Content, found: Cells) -> str:
    """Return which best rates are the outermost of those tried, which understates their method."""
    edges = []
    for name, losses in found.items():
        for method in losses:
            start = f"{name} tune {method} lr="
            keys = [key for key in content["runs"] if key.startswith(start)]
            tried = sorted({float(key.removeprefix(start).split()[0]) for key in keys})
            best = float(best_rate(content["runs"], method, f"{name} "))
            if len(tried) > 1 and best in (tried[0], tried[-1]):
                edges.append(f"{method} at {name}")
    if not edges:
        return ""
    return f" The best rate is the outermost of those tried for {', '.join(edges)}."


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _gap(losses: Mapping[str, float], method: str) -> str:
    if method not in losses:
        return ""
    return f"{losses[method]:.3f} ({losses[method] - losses['adamw']:+.3f})"
