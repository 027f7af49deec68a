"""What became of one case of another library's test suite, and which failures are expected."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Outcome", "Refusal", "Verdict", "judge"]


@dataclass(frozen=True)
class Outcome:
    """One case: a test of theirs on a rule of ours.

    Args:
        rule: The rule's name.
        test: Name of the test, its module first.
        result: What became of it.
        error: Last line of the error's text and what leads up to it; empty without one.
    """

    rule: str
    test: str
    result: Literal["passed", "failed", "skipped"]
    error: str = ""


@dataclass(frozen=True)
class Refusal:
    """Failures that are right.

    Args:
        reason: Why the test cannot pass, in words for a reader who knows neither suite.
        tests: Regular expression that the whole test's name matches.
        error: Regular expression found in its error, so that no other failure hides behind it.
        rules: Regular expression that the whole rule's name matches.
    """

    reason: str
    tests: str
    error: str
    rules: str = ".*"

    def covers(self, outcome: Outcome) -> bool:
        """Return whether the outcome is one of these failures."""
        return bool(
            outcome.result == "failed"
            and re.fullmatch(self.rules, outcome.rule)
            and re.fullmatch(self.tests, outcome.test)
            and re.search(self.error, outcome.error)
        )


@dataclass(frozen=True)
class Verdict:
    """What a suite says of the rules.

    Args:
        passed: Number of cases that pass.
        skipped: Number of cases that their suite leaves out itself.
        refused: Number of expected failures by reason.
        unexplained: Failures that no refusal covers.
        idle: Refusals that cover nothing any more; they must go.
    """

    passed: int
    skipped: int
    refused: Counter[str]
    unexplained: Sequence[Outcome]
    idle: Sequence[Refusal]

    @property
    def good(self) -> bool:
        """Whether every failure is explained, and every explanation needed."""
        return bool(self.passed) and not self.unexplained and not self.idle

    def lines(self) -> Iterable[str]:
        """Yield the verdict as text."""
        refused = sum(self.refused.values())
        yield f"{self.passed} pass, {refused} refused, {self.skipped} skipped by their suite"
        for reason, count in self.refused.most_common():
            yield f"  {count:5} {reason}"
        for outcome in self.unexplained:
            yield f"UNEXPLAINED {outcome.rule} {outcome.test}: {outcome.error[-300:]}"
        for refusal in self.idle:
            yield f"NOT NEEDED {refusal.reason}: {refusal.tests}"


def judge(outcomes: Iterable[Outcome], refusals: Sequence[Refusal]) -> Verdict:
    """Return the verdict; the first refusal that covers a failure explains it."""
    passed = skipped = 0
    refused: Counter[str] = Counter()
    used: set[Refusal] = set()
    unexplained = []
    for outcome in outcomes:
        passed += outcome.result == "passed"
        skipped += outcome.result == "skipped"
        if outcome.result != "failed":
            continue
        refusal = next((r for r in refusals if r.covers(outcome)), None)
        if refusal is None:
            unexplained.append(outcome)
        else:
            refused[refusal.reason] += 1
            used.add(refusal)
    return Verdict(passed, skipped, refused, unexplained, [r for r in refusals if r not in used])
