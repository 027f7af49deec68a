"""One plain sentence on top of a report: what it costs here, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from neurms.report.advice import HOLDS, Rule, advise
from neurms.report.curves import diverged_at
from neurms.report.formats import percent
from neurms.report.rows import LayerRow
from neurms.report.summary import Summary

__all__ = ["recommendation"]

_WHY: dict[Rule, str] = {
    "F": "rho holds",
    "P": "rho does not hold, but the gradient's own rows and columns foretell it,",
    "RMNP": "rho does not hold, but rows are nearly orthogonal",
    "U": "rho does not hold",
    "AdamW": "no premise holds",
}
_NAMED = 3
"""Layers that are named one by one; more are counted."""


def recommendation(report: Summary) -> str:
    """Return what to do, in one sentence: cost, then which rule where.

    Layers without a choice (embeddings, single rows) are left out. A rule says whose premise holds,
    see :func:`~neurms.report.advice.advise`; the layers' table has the numbers.

    Args:
        report: The report; without a profiled step, the sentence says so.
    """
    if not len(report):
        return "No step was profiled: lower warmup_steps or every_n_steps, or train longer."
    broken = diverged_at(report.run.logged)
    if broken is not None:
        return (
            f"The loss was not finite from step {broken:,} on: lower the learning rate before "
            "anything else; what follows describes a training that failed."
        )
    parts = [*_cost(report), *_where(report)]
    sentence = "; ".join(parts)
    return f"{sentence[:1].upper()}{sentence[1:]}."


def _cost(report: Summary) -> list[str]:
    share = report.overhead
    if not share:
        return []
    whole = report.overhead_with_bookkeeping
    more = f" ({percent(whole)} with bookkeeping)" if whole and whole >= 2 * share else ""
    return [f"reduce + scale cost {percent(share)} here{more}"]


def _where(report: Summary) -> list[str]:
    open_ = [row for row in report if not _without_choice(row)]
    if not open_:
        return ["no layer here has a choice: keep AdamW"]
    advised = {one.layer: one.rule for one in advise(open_)}
    groups: dict[Rule, list[LayerRow]] = {}
    for row in open_:
        groups.setdefault(advised[row.layer], []).append(row)
    few = groups.pop("undecided", [])
    kept = [row for row in groups.get("F", []) if _lives_on_margins(report, row)]
    if kept:
        groups["F"] = [row for row in groups["F"] if row not in kept]
    parts = [
        f"{_WHY[rule]} in {_named(own, len(open_))}: {_verb(report, own, rule)}"
        for rule, own in sorted(groups.items(), key=lambda group: -len(group[1]))
        if own
    ]
    if kept:
        there = "" if len(kept) == len(open_) else " there"
        parts.insert(
            0,
            f"variant P's premise holds in {_named(kept, len(open_))}, as F's does: keep P{there}",
        )
    if few:
        parts.append(f"too few profiled steps to judge {_named(few, len(open_))}")
    return parts


def _lives_on_margins(report: Summary, row: LayerRow) -> bool:
    """Whether a layer is under variant P, and its premise holds: that F's does is no reason."""
    layer = report.run.header.get("layers", {}).get(row.layer, {})
    margins = row.gradient_fidelity
    return layer.get("variant") == "P" and margins is not None and margins >= HOLDS


def _verb(report: Summary, rows: Sequence[LayerRow], rule: Rule) -> str:
    layers = report.run.header.get("layers", {})
    now = {layers.get(row.layer, {}).get("variant") or row.rule for row in rows}
    keeps = {str(name).lower() for name in now} == {rule.lower()}
    tool = f"NeuRMS's variant {rule}" if rule in ("F", "P", "U") else rule
    return f"{'keep' if keeps else 'use'} {tool}" + (" there" if len(rows) < len(report) else "")


def _named(rows: Sequence[LayerRow], of: int) -> str:
    if len(rows) == of:
        return "all layers" if of > 1 else f"`{rows[0].layer}`"
    if len(rows) > _NAMED:
        return f"{len(rows)} of {of} layers"
    names = [f"`{row.layer}`" for row in rows]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _without_choice(row: LayerRow) -> bool:
    return row.kind.startswith("Embedding") or min(row.units, row.width) < 2
