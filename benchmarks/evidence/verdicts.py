"""What the rows of a comparison show, all rows and budgets in one family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.significance import equivalent, holm, paired

__all__ = ["SURE", "Verdict", "verdicts"]

SURE = 0.05

Place = tuple[str, str]


@dataclass(frozen=True)
class Verdict:
    """One row against the baseline, in one budget.

    Args:
        difference: The row's mean figure less the baseline's.
        better: Whether that is an improvement.
        p: Of no difference: paired t-test, after Holm's correction.
        p_level: Of a difference of the margin or more: TOST, after Holm's correction.
    """

    difference: float
    better: bool
    p: float
    p_level: float

    @property
    def word(self) -> str:
        """Ahead, behind, level, ahead or behind within the margin, or open."""
        level = self.p_level < SURE
        if self.p < SURE:
            return f"{'ahead' if self.better else 'behind'}{' within the margin' * level}"
        return "level" if level else "open"


def verdicts(
    budgets: Mapping[str, Mapping[str, Sequence[float]]],
    baseline: str,
    *,
    margin: float,
    better: str,
) -> dict[Place, Verdict]:
    """Return every row's verdict against the baseline of its budget.

    Args:
        budgets: By budget, then by row, the reported figure for each seed, in the order of seeds.
        baseline: A row that every budget has.
        margin: Within which two rows count as level.
        better: ``"lower"`` or ``"higher"``.

    Returns:
        By budget and row. The p values of all of them are corrected together, those for a
        difference as one family and those for its absence as another.
    """
    places = [(b, name) for b, found in budgets.items() for name in found if name != baseline]
    pairs = [(budgets[b][name], budgets[b][baseline]) for b, name in places]
    differences = [paired(own, other) for own, other in pairs]
    p = holm([test["p"] for test in differences])
    level = holm([equivalent(own, other, margin)["p"] for own, other in pairs])
    return {
        place: Verdict(
            test["difference"],
            (test["difference"] < 0) == (better == "lower"),
            p[index],
            level[index],
        )
        for index, (place, test) in enumerate(zip(places, differences, strict=True))
    }
