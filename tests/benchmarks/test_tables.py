"""The results pages say what the results files say."""

from __future__ import annotations

from benchmarks import tables


def test_pages_are_made_from_the_files() -> None:
    for path, text in tables.pages().items():
        assert path.read_text() == text, path
