"""Docstrings become Markdown for the site, and nothing else changes in them."""

import textwrap

import pytest

pytest.importorskip("griffe")

from tools.docstrings import as_markdown


def test_a_ruled_table_becomes_a_markdown_table() -> None:
    text = textwrap.dedent(
        """
        What is here:

        ===============  ==================
        :class:`Alpha`   the first
        :func:`beta`     the second, longer
        ===============  ==================

        The end.
        """
    )
    assert as_markdown(text).split("\n\n")[1].splitlines() == [
        "| Name | What it is |",
        "|---|---|",
        "| `Alpha` | the first |",
        "| `beta` | the second, longer |",
    ]


def test_roles_become_code() -> None:
    text = "As :meth:`~a.b.C.run` of :class:`a.b.C` and :attr:`x` do."
    assert as_markdown(text) == "As `run` of `a.b.C` and `x` do."


def test_the_example_is_a_section() -> None:
    assert "\nExamples:\n    >>> 1" in as_markdown("What.\n\nExample:\n    >>> 1\n    1\n")


def test_maths_and_code_stay() -> None:
    text = "v <- b v + (1 - b) x\n\n    a == b  # ``code``\n    [0.5, 1.0]"
    assert as_markdown(text) == text
