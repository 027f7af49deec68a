"""Tables as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, first column left, the others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def counted(numbers: Iterable[int]) -> str:
    """Return the numbers that occur, such as "3" or "3 or 5"."""
    return " or ".join(map(str, sorted(set(numbers))))
