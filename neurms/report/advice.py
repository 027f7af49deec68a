"""Which rule suits which layer, with the numbers that say so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from neurms.core.diagnostics.dominance import Dominance
from neurms.report.formats import number
from neurms.report.rows import LayerRow

__all__ = ["Advice", "Rule", "advise"]

Rule = Literal["F", "U", "P", "RMNP", "AdamW", "undecided"]

HOLDS = 0.7
"""Share of what exact factors would show from which on the factorisation is taken to hold."""
DOMINANT = 5.0
"""r_avg from which rows count as nearly orthogonal, if no r_i is below 1."""
SPREAD = 10.0
"""Quotient of the .95 and .05 quantiles of v from which units count as differently scaled."""
EVEN = 0.1
"""Rho of exact factors below which v u^T is so flat that there is nothing to correlate with."""
ENOUGH = 3
"""Profiled steps below which nothing is said."""


@dataclass(frozen=True)
class Advice:
    """One layer's advice.

    Args:
        layer: The layer's name.
        rule: ``"F"``, ``"U"`` or ``"P"`` (NeuRMS's variants), ``"RMNP"``, ``"AdamW"``, or
            ``"undecided"``.
        reason: Why, with the numbers.
    """

    layer: str
    rule: Rule
    reason: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.rule} ({self.reason})"


def advise(rows: Iterable[LayerRow]) -> list[Advice]:
    """Return advice for each layer.

    In this order, the first that applies:

    1. embeddings, and matrices with a single row or column: AdamW;
    2. rho reaches 70 % of what exact factors would show: the factorisation holds, **F**;
    3. the gradient's own margins foretell G^2 as well: **P**, and RACS, which scales by a fit of
       the same kind;
    4. r_avg is 5 or more and no r_i below 1: rows are nearly orthogonal, so that normalising them
       whitens: **RMNP**;
    5. units differ tenfold in v: **U** scales them alike;
    6. none of the premises holds: **AdamW**, which has none.

    What a rule does to the loss is not measured here: the advice says whose premise holds.

    Args:
        rows: The rows of a report.
    """
    return [Advice(row.layer, *_judged(row)) for row in rows]


def _judged(row: LayerRow) -> tuple[Rule, str]:
    if row.kind.startswith("Embedding"):
        return "AdamW", "an embedding's rows are seen as often as their tokens come"
    if min(row.units, row.width) < 2:
        return "AdamW", f"a {row.units} x {row.features} matrix has no rows to compare"
    if row.samples < ENOUGH:
        return "undecided", f"{row.samples} profiled steps; {ENOUGH} are needed"
    when = _when(row)
    fits, fidelity = _describe_fit(row), row.fidelity
    if fidelity is not None and fidelity >= HOLDS and not _flat(row.rho_expected):
        return "F", f"{fits} {when}: the factorisation holds"
    failed = f"{fits} {when}: the factorisation does not hold" if fits else "D and H were not seen"
    if _flat(row.rho_expected) and fidelity is not None:
        known = f"even exact factors would show rho {_number(row.rho_expected)}"
        failed = f"v and u are nearly constant ({known})"
    return _without_factors(row, failed)


def _without_factors(row: LayerRow, failed: str) -> tuple[Rule, str]:
    margins = row.gradient_fidelity
    if margins is not None and margins >= HOLDS and not _flat(row.rho_gradient_expected):
        seen = _against(row.rho_gradient, row.rho_gradient_expected)
        known = "but G's own rows and columns foretell G^2, as RACS needs it, too"
        return "P", f"{failed}, {known}: {seen}"
    if row.dominance is not None and _is_dominant(row.dominance):
        least = _number(row.dominance.r_min)
        seen = f"rows of the {row.dominance_of} are nearly orthogonal"
        return "RMNP", f"{failed}; {seen} (r_avg {_number(row.dominance.r_avg)}, r_min {least})"
    spread = row.unit_spread
    if spread is not None and spread >= SPREAD:
        return "U", f"{failed}; units differ {_number(spread)}-fold in v, which U levels"
    rest = [f"r_avg {_number(row.dominance.r_avg)}" if row.dominance is not None else ""]
    rest += [f"units differ {_number(spread)}-fold" if spread is not None else ""]
    numbers = ", ".join(part for part in rest if part)
    return "AdamW", f"{failed}, and nothing else does" + (f" ({numbers})" if numbers else "")


def _is_dominant(dominance: Dominance) -> bool:
    # Rows of very different norm raise r_avg by themselves, and leave small rows far below 1.
    return dominance.r_avg >= DOMINANT and dominance.r_min >= 1.0


def _describe_fit(row: LayerRow) -> str:
    if row.rho is None or row.fidelity is None:
        return ""
    return _against(row.rho, row.rho_expected)


def _against(rho: float | None, expected: float | None) -> str:
    # A typical value, no bound: in small layers about half of all exact factors show more.
    return f"rho {_number(rho)} (about {_number(expected)} if the factors were exact)"


def _when(row: LayerRow) -> str:
    first, last = row.steps
    return f"over {last - first + 1:,} steps"


def _flat(expected: float | None) -> bool:
    return expected is not None and expected < EVEN


def _number(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:.2f}" if abs(value) < 10 else number(value)
