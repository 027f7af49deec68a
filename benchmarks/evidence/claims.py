"""What was to be shown, as tests, and how each came out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.significance import below, equivalent, holm, paired

__all__ = ["CLAIMS", "Claim", "Outcome", "outcomes"]

SURE = 0.05


@dataclass(frozen=True)
class Claim:
    """A statement about some rows of one comparison, each against one other row.

    Args:
        task: The comparison.
        rows: Which rows; p values are corrected for their number.
        kind: ``"ahead"`` (better, paired t-test), ``"level"`` (within the margin on both sides) or
            ``"near"`` (not worse by the margin or more).
        against: The other row.
        margin: In units of the figure; 0 for ``"ahead"``.
    """

    task: str
    rows: tuple[str, ...]
    kind: Literal["ahead", "level", "near"]
    against: str
    margin: float = 0.0

    def __str__(self) -> str:
        words = {
            "ahead": f"ahead of {self.against}",
            "level": f"level with {self.against} (margin {self.margin:g})",
            "near": f"not behind {self.against} by {self.margin:g}",
        }
        return words[self.kind]


@dataclass(frozen=True)
class Outcome:
    """How a claim came out for one row.

    Args:
        row: Its name.
        difference: Its mean figure less the other row's.
        p: Of the claim's test, after Holm's correction.
        holds: Whether p is below .05 and the sign is the claimed one.
    """

    row: str
    difference: float
    p: float
    holds: bool


PROBED = ("P", "P 4 probes", "P backward")
"""Variant P at the step, with probes of a gradient that was formed, and within backward."""

CLAIMS = (
    Claim("text-64", PROBED, "ahead", "AdamW"),
    Claim("text-64", PROBED, "near", "RACS", 0.01),
    Claim("text-64", PROBED, "ahead", "AdamW, two rates"),
    Claim("text-64", ("P average",), "ahead", "AdamW, two rates"),
    Claim("text-128", ("P average",), "ahead", "AdamW"),
    Claim("text-128", ("P momentum",), "near", "AdamW", 0.02),
    Claim("text-128", PROBED, "near", "AdamW", 0.03),
    Claim("mnist", ("NeuRMS-U normalized",), "level", "AdamW", 0.002),
)
"""What the page on comparisons has to answer."""


def outcomes(claim: Claim, scores: Mapping[str, Sequence[float]], better: str) -> list[Outcome]:
    """Return how a claim came out for those of its rows that were run.

    Args:
        claim: What was claimed.
        scores: By row, the reported figure for each seed.
        better: ``"lower"`` or ``"higher"``.
    """
    if claim.against not in scores:
        return []
    sign = 1.0 if better == "lower" else -1.0
    other = [sign * figure for figure in scores[claim.against]]
    own = {
        name: [sign * figure for figure in scores[name]] for name in claim.rows if name in scores
    }
    tests = [_test(claim, series, other) for series in own.values()]
    corrected = holm([test["p"] for test in tests])
    return [
        Outcome(
            name,
            sign * test["difference"],
            p,
            p < SURE and (claim.kind != "ahead" or test["difference"] < 0),
        )
        for name, test, p in zip(own, tests, corrected, strict=True)
    ]


def _test(claim: Claim, own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    if claim.kind == "ahead":
        return paired(own, other)
    return (equivalent if claim.kind == "level" else below)(own, other, claim.margin)
