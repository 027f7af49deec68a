"""For the documentation: our docstrings, which pydoc and editors show as they are, as Markdown.

Griffe knows ``Examples:`` as a section of doctests and takes ``Example:`` for an admonition; roles
such as ``:class:`~a.b.C``` and tables ruled by ``====`` would be printed as they stand.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

__all__ = ["AsMarkdown", "as_markdown"]

ROLE = re.compile(r":(?:attr|class|exc|func|meth|mod):`(~?)([^`]+)`")
RULE = re.compile(r"(=+)  +=+$")


class AsMarkdown(griffe.Extension):
    """Translates every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Translate the docstring of ``obj``."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """Return a docstring with its example, roles and ruled tables in Griffe's and Markdown's form.

    Example:
        >>> as_markdown("See :class:`~neurms.core.ground.errors.NeurmsError`.")
        'See `NeurmsError`.'
    """
    text = text.replace("\nExample:\n", "\nExamples:\n")
    text = ROLE.sub(lambda m: f"`{m[2].rpartition('.')[2] if m[1] else m[2]}`", text)
    lines: list[str] = []
    second = 0
    for line in text.splitlines():
        rule = RULE.match(line)
        if rule and not second:
            second = len(line) - len(line[len(rule[1]) :].lstrip())
            lines += ["| Name | What it is |", "|---|---|"]
        elif rule:
            second = 0
        elif second:
            first, rest = line[:second].rstrip(), line[second:].strip()
            # Roles have become shorter than their column was: cut where two spaces are.
            if "  " in line.strip():
                first, _, rest = (part.strip() for part in line.strip().partition("  "))
            lines.append(f"| {first} | {rest} |")
        else:
            lines.append(line)
    return "\n".join(lines)
