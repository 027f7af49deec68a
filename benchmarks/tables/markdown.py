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


def p_value(p: float | None) -> str:
    """Return a p value as text, empty for none.

    Example:
        >>> p_value(0.02345), p_value(1e-5), p_value(0.99999)
        ('.023', '< .001', '1')
    """
    if p is None:
        return ""
    return "< .001" if p < 0.001 else "1" if p > 0.9995 else f"{p:.3f}".removeprefix("0")


def p_said(p: float) -> str:
    """Return a p value as a sentence has it.

    Example:
        >>> p_said(0.02345), p_said(1e-5)
        ('p = .023', 'p < .001')
    """
    shown = p_value(p)
    return f"p {shown}" if shown.startswith("<") else f"p = {shown}"
